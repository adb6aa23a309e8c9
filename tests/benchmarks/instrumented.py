"""What a user would pick instead of cos-cc: the floor's endpoint, traced by Logfire's instrumentations."""

import logfire

from benchmarks.floor import create_app

logfire.configure(send_to_logfire=False, console=False)
logfire.instrument_asyncpg()
app = create_app(logfire.span)
logfire.instrument_fastapi(app)
