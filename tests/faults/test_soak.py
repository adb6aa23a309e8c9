"""Load for a long time: nothing grows. `scripts/soak` runs it and prints how it goes."""

import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest

from devtools.otlp import otlp_receiver
from devtools.service import Service
from support.cluster import FAULTS, Client, Run, faulty_receiver, processes, progress, stored, waiting

SECONDS = float(os.environ.get("CC_SOAK_SECONDS", "600"))
"""How long the steady load lasts."""

REQUESTS = int(os.environ.get("CC_SOAK_REQUESTS", "100000"))
"""How many requests a receiver that fails has to bear."""

CLIENTS = 4

OTHERS = "pid <> pg_backend_pid()"

GROWTH = 30 * 2**20
"""Bytes that a process may grow after its first tenth: fragmentation, a queue that is full, caches."""


def memory(service: Service) -> int:
    return sum(process.memory_info().rss for process in processes(service))


@pytest.mark.soak
def test_nothing_grows_under_a_steady_load(run: Run, database_url: str) -> None:
    before = stored(database_url)["base"]
    stop = threading.Event()
    samples: list[tuple[int, int, float, float]] = []
    with ExitStack() as stack:
        receiver = stack.enter_context(otlp_receiver(keep=False))
        service = stack.enter_context(run(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint))
        clients = [stack.enter_context(closing(Client(service))) for _ in range(CLIENTS)]

        def load(client: Client) -> None:
            while not stop.is_set():
                client.send(10)

        with ThreadPoolExecutor(CLIENTS) as pool:
            loads = [pool.submit(load, client) for client in clients]
            try:
                for _ in range(10):
                    seen = [len(client.seconds) for client in clients]
                    stop.wait(SECONDS / 10)
                    recent = sorted(s for client, n in zip(clients, seen, strict=True) for s in client.seconds[n:])
                    median, p99 = 1000 * statistics.median(recent), 1000 * recent[int(len(recent) * 0.99)]
                    samples.append((memory(service), waiting(database_url, OTHERS), median, p99))
                    progress(
                        f"{len(recent) * 10 / SECONDS:7.0f} requests/s  {samples[-1][0] / 2**20:6.1f} MiB"
                        f"  {samples[-1][1]:3} connections  median {median:5.2f} ms  p99 {p99:6.2f} ms",
                    )
            finally:
                stop.set()
            for each in loads:
                each.result()
        requests = sum(len(client.seconds) for client in clients)
    first, last = samples[0], samples[-1]
    after = stored(database_url)
    progress(f"{requests} requests, {after['base'] - before} records")
    assert after["base"] - before == 2 * requests
    assert after["half"] == 0
    assert last[0] - first[0] < GROWTH
    assert last[1] <= CLIENTS  # connections
    # Not the first tenth alone: whatever else the machine did meanwhile is in it.
    assert last[2] < 1.5 * statistics.median(sample[2] for sample in samples)


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS)
def test_memory_is_bounded_while_the_receiver_fails(run: Run, fault: str) -> None:
    with ExitStack() as stack:
        endpoint = stack.enter_context(faulty_receiver(fault))
        service = stack.enter_context(run(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint))
        sizes = []
        clients = [stack.enter_context(closing(Client(service))) for _ in range(CLIENTS)]
        for _ in range(10):
            with ThreadPoolExecutor(CLIENTS) as pool:
                for each in [pool.submit(client.send, REQUESTS // 10 // CLIENTS) for client in clients]:
                    each.result()
            sizes.append(memory(service))
            progress(f"{fault}: {len(sizes) * REQUESTS // 10} requests, {sizes[-1] / 2**20:.1f} MiB")
        started = time.monotonic()
        service.stop(10)
        progress(f"{fault}: ended in {time.monotonic() - started:.1f} s")
    assert sizes[-1] - sizes[0] < GROWTH
