"""The load generator: POST the same request over and over on N connections. A process of its own.

`python -m benchmarks.load PORT CONNECTIONS SECONDS FILE` writes JSON to FILE. A pipe may take only a part of a long
line, and with PYTHONUNBUFFERED `print` loses the rest. It ends after SECONDS, or as soon as the service has closed
every connection.
"""

import asyncio
import json
import re
import sys
import time
from pathlib import Path
from statistics import quantiles
from typing import cast

import uvloop

from devtools.ports import HOST

BODY = json.dumps({"role": "user", "content": "What is the capital of France?", "tokens_in": 12, "message": "hello"})
REQUEST = (
    f"POST /test-log HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n{BODY}"
).encode()
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_TRACE = re.compile(rb'"trace_id":"([0-9a-f]{32})"')


class Connection(asyncio.Protocol):
    """A connection that sends its next request when the answer to the last one has arrived."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.milliseconds: list[float] = []
        self.traces: list[str] = []
        self.failures = 0
        self.closed = asyncio.get_running_loop().create_future()
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._end = time.perf_counter() + self.seconds
        self._send()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, _, body = self._answer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not length or len(body) < int(length[1]):
            return
        now = time.perf_counter()
        self.milliseconds.append((now - self._sent) * 1e3)
        if head.startswith(b"HTTP/1.1 200"):
            self.traces += [trace.decode() for trace in _TRACE.findall(body)]
        else:
            self.failures += 1
        if now < self._end:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set_result(None)

    def _send(self) -> None:
        self._answer = b""
        self._sent = time.perf_counter()
        self._transport.write(REQUEST)


async def load(port: int, connections: int, seconds: float) -> dict[str, object]:
    """Keep the service busy.

    Args:
        port: Where it listens on the loopback interface.
        connections: How many requests are under way at a time.
        seconds: For how long.

    Returns:
        How many requests were answered, how many not with 200, how many per second, percentiles of their times in
        milliseconds, and the traces that the answers name.
    """
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    opened = [(await loop.create_connection(lambda: Connection(seconds), HOST, port))[1] for _ in range(connections)]
    await asyncio.gather(*(connection.closed for connection in opened))
    taken = time.perf_counter() - start
    walls = [value for connection in opened for value in connection.milliseconds]
    percentiles = quantiles(walls, n=100, method="inclusive")
    return {
        "requests": len(walls),
        "failures": sum(connection.failures for connection in opened),
        "rps": len(walls) / taken,
        **{f"p{percent}": percentiles[percent - 1] for percent in (50, 95, 99)},
        "traces": [trace for connection in opened for trace in connection.traces],
    }


if __name__ == "__main__":
    Path(sys.argv[4]).write_text(json.dumps(uvloop.run(load(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))))
