"""The Control Center (`cc`) module of COS."""

import os

# It would change nothing, because cc knows W3C Trace Context alone (`configure_logfire`). But a propagator in it that
# isn't installed, e.g. b3, fails whatever imports OpenTelemetry first, and pydantic does.
os.environ.pop("OTEL_PROPAGATORS", None)
