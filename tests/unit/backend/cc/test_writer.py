"""The writer, simulated: schedules that Hypothesis draws, a server that fails as they say, a clock moved by hand."""

import asyncio
import contextlib
import gc
import logging
import os
import selectors
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import chain, product, repeat, starmap
from typing import Any, TypeVar

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import backend.cc.writer
from backend.cc.connection import CLOSE_SECONDS
from backend.cc.errors import DatabaseError, DatabaseUnavailableError
from backend.cc.writer import BARRIER, BATCH_CHARACTERS, Writer

EXAMPLES = int(os.environ.get("CC_TEST_EXAMPLES", "2000"))
SECONDS = 4.0
QUEUE_MAX = 10
GATHER = 1 / 512  # seconds; as all times in here it is exact in binary
T = TypeVar("T")
current: ContextVar[Any] = ContextVar("current")  # a caller, in its own context


class Clock(selectors.SelectSelector):
    """Instead of sleeping, it moves the time on."""

    now = 0.0
    turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "somebody waits, and nothing will ever happen"
        self.turns = 0 if timeout else self.turns + 1
        assert self.turns < 1000, "the loop spins"
        self.now += timeout
        return []


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = Clock()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


# The schedule


@dataclass(frozen=True)
class Call:
    """So many callers arrive. `bad` is what the server does at the record of the first."""

    statement: str = "prompt"
    characters: int = 1
    bad: str = ""
    known: bool = False
    callers: int = 1


# Several callers arrive in one turn of the loop (None), or in turns or moments that follow each other.
PAUSES = (None, None, 0, 0, 1 / 64, 1 / 16, 1.0, 3.5)
LATENCIES = (0, 1 / 64, 1 / 16)
SIZES = (1, BATCH_CHARACTERS // 2, BATCH_CHARACTERS, BATCH_CHARACTERS + 1)
BAD = ("", "is suppressed", "is refused", "kills", "hangs", "can't be encoded")
CONNECTS = (*[""] * 8, "refuses", "hangs", "57P03", "odd", "cancelled")
FAULTS = (*[""] * 8, "dies before", "dies after", "57P01", "hangs", "loses", "late", "25006", "XX000")
# A step is one draw, because drawing takes most of the time. The more of a step there are, the more often it's drawn.
STEPS = (
    *[Call(), Call(callers=3)] * 20,
    *[Call("event"), Call("event", callers=2), Call(known=True)] * 7,
    *[Call(bad=bad, callers=callers) for bad in BAD[1:] for callers in (1, 4)] * 3,
    *starmap(Call, product(("prompt", "event"), SIZES, BAD[:4], (False, True))),
    *[*product(("again", "cancel", "cancel"), range(8))] * 2,  # the caller of this number; again: with the same id
    # Every connection ends, and the idle ones see it at once or not; or now leads to a server that is read-only.
    *[("dies before", True), ("dies before", False), ("25006", False), ("freeze or thaw",), ("close",)] * 4,
)
connects = st.lists(st.sampled_from(list(product(CONNECTS, LATENCIES))), max_size=4)
faults = st.lists(st.sampled_from(list(product(FAULTS, LATENCIES, (1, 1, 4)))), max_size=8)  # so many times
steps = st.lists(st.sampled_from(list(product(PAUSES, STEPS))), min_size=3, max_size=15)

KILLED = [(None, Call(bad=bad)) for bad in ("", "kills", "")]

# What asyncpg raises. Whatever else happens, the connection has died.
ERRORS: dict[str, type[BaseException]] = {
    "57P03": asyncpg.CannotConnectNowError,
    "odd": RuntimeError,
    "cancelled": asyncio.CancelledError,
    "57P01": asyncpg.AdminShutdownError,
    "25006": asyncpg.ReadOnlySQLTransactionError,
    "XX000": asyncpg.InternalServerError,
    "is refused": asyncpg.CheckViolationError,
    "can't be encoded": asyncpg.DataError,
}


@dataclass
class Server:
    """What a schedule makes of PostgreSQL, and what it sees of the writer."""

    size: int
    batch: int
    connects: Iterator[tuple[str, float]]
    faults: Iterator[tuple[str, float]]
    calls: dict[int, Call] = field(default_factory=dict)  # by id
    stored: set[int] = field(default_factory=set)
    confirmed: set[int] = field(default_factory=set)  # on the standby, too, and the client was told so
    hits: defaultdict[int, set[float]] = field(default_factory=lambda: defaultdict(set))  # the numbers of faults, by id
    refusals: set[float] = field(default_factory=set)  # when a connection was refused
    hangs: int = 0
    hanging_connects: int = 0
    number: int = 0
    is_frozen: bool = False
    connections: list["Connection"] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def expect(self, holds: object, promise: str) -> None:
        if not holds:  # an error raised here would be one more that the writer handles
            self.broken.append(promise)

    def new_number(self) -> int:
        self.number += 1
        return self.number

    async def connect(self, seconds: float) -> "Connection":
        await asyncio.sleep(0)  # in which what was discarded before begins to close
        connection = Connection(self)
        self.connections.append(connection)
        is_open = [not (each.is_ended or each.is_closing) for each in self.connections]
        self.expect(sum(is_open) <= self.size, f"never more than {self.size} connections")
        fault, latency = ("hangs", 0) if self.is_frozen else next(self.connects, ("", 0))
        has_time = fault != "hangs" and latency < seconds
        self.hanging_connects += fault == "hangs"
        await asyncio.sleep(latency if has_time else seconds)
        if fault or not has_time:
            connection.is_ended = True
            if has_time:
                self.refusals.add(asyncio.get_running_loop().time())
            raise ERRORS.get(fault if has_time else "", asyncpg.ClientCannotConnectError)(fault)
        return connection


class Connection:
    """What the writer uses of asyncpg's."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.ids: list[int] = []
        self.is_busy = self.is_ended = self.is_closing = self.has_failed = False
        self.fault = (0, "")  # what has happened to it, and the next statement will notice
        self.late: Callable[[], object] | None = None
        self.inserted: set[int] = set()

    def is_closed(self) -> bool:
        return self.is_ended

    async def fetchmany(self, statement: str, rows: Sequence[Sequence[Any]], **limits: float) -> list[tuple[int]]:
        server, self.ids = self.server, [row[0] for row in rows]
        if not set(self.ids) <= set(server.calls):
            server.expect(holds=False, promise="no id is sent that no caller has given")
            return []
        calls = [server.calls[each] for each in self.ids]
        server.expect(len(rows) <= server.batch, "a batch is never larger than `batch`")
        server.expect({call.statement for call in calls} == {statement}, "a batch has one statement")
        if len(rows) > 1:
            server.expect(not any(call.known for call in calls), "a known record travels alone")
            server.expect(sum(call.characters for call in calls) <= BATCH_CHARACTERS, "a large record travels alone")

        def commit() -> set[int]:
            good = {each for each in self.ids if server.calls[each].bad != "is suppressed"}
            inserted = good - server.stored
            server.stored |= inserted
            return inserted

        server.expect(current.get(None) is None, "no caller's context is that of a batch")
        self.inserted = await self._run(commit, **limits)
        server.confirmed |= self.inserted
        return [(each,) for each in self.inserted]

    async def execute(self, statement: str, **limits: float) -> None:
        self.server.expect(
            statement == BARRIER and not self.inserted, "only the barrier is executed, and only if needed"
        )
        # What a standby has of the log, it has from the beginning.
        self.server.confirmed |= await self._run(lambda: set(self.server.stored), **limits)

    async def _run(self, commit: Callable[[], T], *, timeout: float) -> T:  # noqa: ASYNC109 - asyncpg's
        server = self.server
        server.expect(not self.is_busy, "a connection has one statement at a time")
        server.expect(not self.has_failed, "a connection that died, timed out or is read-only isn't used again")
        is_alone = len(self.ids) == 1
        bad = next(filter(None, (server.calls[each].bad.replace("is suppressed", "") for each in self.ids)), "")
        fault, latency = ("hangs", 0) if server.is_frozen else next(server.faults, ("", 0))
        self.is_busy = True
        if "hangs" in (bad, fault) or fault in ("loses", "late") or latency >= timeout:
            server.hangs += 1
            self._hit(server.new_number(), is_final=is_alone)  # there's no time left for another try
            self.has_failed = True
            if fault == "loses" and not bad:
                commit()
            elif fault == "late" and not bad:
                self.late = commit
            await asyncio.sleep(timeout)
            raise TimeoutError
        await asyncio.sleep(latency)
        self.is_busy = False
        if self.fault[0]:
            number, fault = self.fault
        else:
            number, fault = server.new_number(), fault or bad
        if not fault:
            return commit()
        # A connection that is good has brought an answer, so the writer doesn't ask again.
        is_clear = fault in ("is refused", "25006")  # nothing is stored then: its number is a half one
        self._hit(number + is_clear / 2, is_final=is_alone and fault == "XX000")
        if fault in ("dies after", "XX000") and not bad:
            commit()
        self.has_failed = fault not in ("XX000", "is refused")
        if self.is_ended:
            raise asyncpg.InterfaceError("connection is closed")
        self.is_ended = fault not in ("XX000", "is refused", "25006")
        raise ERRORS.get(fault, asyncpg.ConnectionDoesNotExistError)(fault)

    def _hit(self, number: float, *, is_final: bool) -> None:
        for each in self.ids:
            self.server.hits[each] |= {number, -number} if is_final else {number}

    async def close(self) -> None:
        self.server.expect(not self.is_closing, "a connection is closed once")
        self.is_closing = True
        if self.late is not None:  # committed before the request to cancel it arrived
            self.late()
        try:
            # A server that has left a statement without an answer has none to this either.
            await asyncio.sleep(60 if self.has_failed and not self.is_ended else 0)
        finally:
            self.is_ended = True


@dataclass(eq=False)
class Caller:
    id: int
    call: Call
    arrived: float = -1  # it was cancelled before it called `write`
    outcome: bool | BaseException | None = None
    ended: float = -1
    is_cancelled: bool = False
    task: asyncio.Task[None] = field(init=False, repr=False)

    @property
    def waits(self) -> bool:
        return self.arrived >= 0 > self.ended


class Simulation:
    """One schedule, and what must hold in each."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.expect = server.expect
        self.writer = Writer(server.connect, size=server.size, batch=server.batch, seconds=SECONDS)
        self.now = asyncio.get_running_loop().time
        self.callers: list[Caller] = []
        self.closes: list[asyncio.Task[None]] = []

    async def run(self, schedule: list[tuple[float | None, Any]]) -> None:
        for pause, step in schedule:
            if pause is not None:
                await asyncio.sleep(pause)
            self._do(step)
            if self.server.broken:
                return
        # Each ends by itself, or the clock finds that nothing will ever happen.
        await asyncio.gather(*(caller.task for caller in self.callers), return_exceptions=True)
        await asyncio.gather(*self.closes)
        await self._close()
        for caller in self.callers:
            if isinstance(caller.outcome, asyncio.CancelledError):
                self._judge_after(caller)
        self.expect(asyncio.all_tasks() == {asyncio.current_task()}, "no task is left")

    def _do(self, step: Any) -> None:
        server = self.server
        match step:
            case Call():
                for number in range(step.callers):
                    self._arrive(len(self.callers), replace(step, bad="" if number else step.bad))
            case ("cancel", of) if self.callers:
                caller = self.callers[of % len(self.callers)]
                caller.is_cancelled |= caller.task.cancel()
            case ("again", of) if self.callers:
                caller = self.callers[of % len(self.callers)]
                # A new id is known to the caller alone, and only after an error.
                if caller.call.known or (caller.task.done() and not caller.is_cancelled):
                    self._arrive(caller.id, replace(caller.call, known=True))
            case ("close",):
                self.closes.append(asyncio.create_task(self._close()))
            case ("freeze or thaw",):
                server.is_frozen = not server.is_frozen
            case (str(fault), bool(is_seen)):
                number = server.new_number()
                for connection in server.connections:
                    connection.fault = (number, fault)
                    connection.is_ended |= is_seen and not connection.is_busy

    def _arrive(self, id_: int, call: Call) -> None:
        caller = Caller(id_, call)
        self.server.calls[id_] = call
        self.callers.append(caller)
        caller.task = asyncio.create_task(self._call(caller))

    async def _call(self, caller: Caller) -> None:
        current.set(caller)
        caller.arrived = self.now()
        waiting = sum(each.waits or each.is_cancelled for each in self.callers) - 1
        values = (caller.id, "x" * caller.call.characters)
        try:
            caller.outcome = await self.writer.write(caller.call.statement, values, known=caller.call.known)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - judged below
            caller.outcome = error.with_traceback(None)
        caller.ended = self.now()
        if getattr(caller.outcome, "code", None) == "QueueFull":
            self.expect(waiting >= QUEUE_MAX, "only a full queue takes no more")
        else:
            self._judge(caller)

    def _judge(self, caller: Caller) -> None:
        """Whether the outcome is right."""
        expect, bad = self.expect, caller.call.bad
        expect(caller.ended <= caller.arrived + SECONDS, f"a call ends within its time: {caller}")
        match caller.outcome:
            case True:
                is_stored = caller.id in self.server.confirmed or self._seems_stored(caller)
                expect(is_stored, f"what is acknowledged is committed: {caller}")
            case False:
                expect(bad == "is suppressed", f"only a suppressed record is reported so: {caller}")
            case asyncio.CancelledError():
                expect(caller.is_cancelled, f"nobody else is cancelled: {caller}")
            case DatabaseUnavailableError():
                is_early = caller.outcome.code == "TimeoutError" and caller.ended < caller.arrived + SECONDS
                expect(not is_early, f"a call has all of its time: {caller}")
                expect(bad in ("kills", "hangs") or self._is_excused(caller), f"one fault costs nothing: {caller}")
            case error:
                is_refused = isinstance(error, DatabaseError) and bad in ("is refused", "can't be encoded")
                expect(is_refused, f"only a bad record is refused: {caller}")

    def _judge_after(self, caller: Caller) -> None:
        """Whether the record of a cancelled caller was written all the same."""
        is_stored = caller.id in self.server.confirmed
        is_known = is_stored or caller.id in lost or self._seems_stored(caller)
        self.expect(is_known, f"the loss of a cancelled caller's record is logged: {caller}")
        is_excused = caller.call.bad or self.server.refusals or self._is_excused(caller)
        self.expect(is_stored or is_excused, f"a cancelled caller's record is written: {caller}")

    def _seems_stored(self, caller: Caller) -> bool:
        """Whether a record is suppressed, but at a second try, which can't tell it from one that was there already."""
        hits = self.server.hits[caller.id]
        return caller.call.bad == "is suppressed" and (caller.call.known or any(hit % 1 == 0 for hit in hits))

    def _is_excused(self, caller: Caller) -> bool:
        """Whether more has gone wrong than a record must survive."""
        server = self.server
        if caller.ended in server.refusals or len(server.hits[caller.id]) > 1:
            return True
        is_late = caller.is_cancelled or caller.ended == caller.arrived + SECONDS
        return is_late and (server.hangs >= server.size or server.hanging_connects > 0)

    async def _close(self) -> None:
        started, before = self.now(), [caller for caller in self.callers if caller.arrived >= 0]
        await self.writer.aclose()
        self.expect(self.now() <= started + SECONDS + CLOSE_SECONDS + 1, "closing ends in time")
        await asyncio.sleep(0)
        self.expect(
            not any(caller.waits for caller in before), "what was queued is written, or fails, before it closes"
        )
        if before == [caller for caller in self.callers if caller.arrived >= 0]:
            self.expect(all(each.is_ended for each in self.server.connections), "every connection is closed")


lost: set[int] = set()  # the records whose loss the writer has logged
unhandled: list[str] = []  # what event loops complained of


@pytest.fixture
def _watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handler = logging.Handler()
    reasons = ("the database", "PostgreSQL", "a trigger")
    monkeypatch.setattr(handler, "emit", lambda r: lost.add(r.args[0] if str(r.args[1]).startswith(reasons) else -1))
    monkeypatch.setattr(backend.cc.writer.logger, "handlers", [handler])
    monkeypatch.setattr(backend.cc.writer.logger, "propagate", False)
    monkeypatch.setattr(backend.cc.writer, "QUEUE_MAX", QUEUE_MAX)
    monkeypatch.setattr(backend.cc.writer, "GATHER_SECONDS", GATHER)
    yield
    gc.collect()
    assert not unhandled


@pytest.mark.usefixtures("_watched")
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=set(Phase) - {Phase.explain},
    suppress_health_check=list(HealthCheck),
)
# The records of two batches are tried alone, and each of them has its own deadline.
@example(2, 2, [], [("hangs", 0, 5)], [(None, Call(callers=2)), (1.0, Call(callers=2))])
# A connection takes longer to open than the first record of the batch can wait, but not the second.
@example(1, 2, [("hangs", 0), ("", 1 / 16)], [], [(None, Call()), (1 / 64, Call()), (1.0, Call())])
@example(1, 2, [("hangs", 0), ("", 1 / 16)], [("dies after", 0, 1)], [(None, Call()), (1 / 64, Call()), (1.0, Call())])
# Connections end after one of them has ended by itself, and one that is busy is the first to say so.
@example(2, 1, [], [("", 1 / 16, 1)], [*KILLED, (1 / 64, ("dies before", False))])
# One that is refused and one that is suppressed share a batch, and then each is alone.
@example(1, 4, [], [], [(None, Call(bad="is refused")), (None, Call(bad="is suppressed"))])
@given(st.integers(1, 3), st.sampled_from((1, 2, 4, 16)), connects, faults, steps)
def test_whatever_happens_each_caller_has_one_outcome_and_it_is_true(
    size: int,
    batch: int,
    connects: list[tuple[str, float]],
    faults: list[tuple[str, float, int]],
    schedule: list[tuple[float | None, Any]],
) -> None:
    lost.clear()

    async def run() -> Server:
        each = chain.from_iterable([(fault, latency)] * times for fault, latency, times in faults)
        server = Server(size, batch, iter(connects), each)
        await Simulation(server).run(schedule)
        return server

    with contextlib.closing(Loop()) as loop:
        loop.set_exception_handler(lambda _, context: unhandled.append(context["message"]))
        server = loop.run_until_complete(run())
    assert not server.broken, server.broken
    found, unhandled[:] = list(unhandled), []
    assert not found


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize(
    ("call", "batch", "latency", "pause", "connections", "ended"),
    [
        (Call(), 16, 1 / 2, 1 / 8, 1, 1),  # the connection of the first takes all others
        (Call(), 16, 2, 1 / 8, 2, 3),  # it is away for too long
        (Call(), 2, 1 / 2, 1 / 8, 2, 1),  # the next two are a full batch
        (Call(known=True), 16, 1 / 2, 1 / 8, 4, 7 / 8),  # each travels alone
        (Call(bad="is refused"), 16, 1 / 2, 3 / 4, 1, 11 / 4),  # each is alone, sent at once, and sent once
    ],
)
def test_what_arrives_soon_after_a_batch_waits_for_its_connection(
    *, call: Call, batch: int, latency: float, pause: float, connections: int, ended: float
) -> None:
    server = Server(9, batch, iter(()), repeat(("", latency * GATHER)))

    async def run() -> float:
        simulation = Simulation(server)
        await simulation.run([(number and pause * GATHER, call) for number in range(4)])
        return max(caller.ended for caller in simulation.callers)

    with contextlib.closing(Loop()) as loop:
        assert loop.run_until_complete(run()) == ended * GATHER
    assert (len(server.connections), server.broken) == (connections, [])
