"""Group commit: records that wait are written together, in one round trip."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg

from backend.cc.errors import STALE_CONNECTION, DatabaseError, DatabaseUnavailableError, database_error

QUEUE_MAX: Final = 10_000  # records that may wait; a call beyond that fails at once
BATCH_CHARACTERS: Final = 131_072  # of text in a batch; a record with more travels alone
CLOSE_SECONDS: Final = 3.0  # how long a connection may take to close

# Writes WAL, so that its commit waits for a synchronous standby. An insert that finds its row already there writes none
# and waits for nobody: the row may be on the primary alone, and lost at the failover.
BARRIER: Final = "SELECT pg_logical_emit_message(true, 'cos-cc', '')"

# SQLSTATEs, or how they begin, after which the statement may have been committed all the same.
_UNKNOWN_OUTCOME: Final = ("08", "40003", "57P", "XX")

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Record:
    statement: str
    values: Sequence[Any]
    deadline: float
    outcome: asyncio.Future[bool | DatabaseError]
    known: bool  # the id may be stored already
    tried: bool = False  # it has failed once, with others or on a connection that died
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = sum(len(value) for value in self.values if isinstance(value, str))

    @property
    def alone(self) -> bool:
        """Whether it would be a risk to others: it may wait for another transaction, fail again, or take long."""
        return self.known or self.tried or self.size > BATCH_CHARACTERS

    def end(self, outcome: bool | DatabaseError) -> None:  # noqa: FBT001 - what `write` returns or raises
        if not self.outcome.done():
            self.outcome.set_result(outcome)
        elif self.outcome.cancelled() and isinstance(outcome, DatabaseError):
            logger.error("Record %s, whose caller was cancelled, is not stored: %s", self.values[0], outcome)


class Writer:
    """Write records on up to `size` connections of its own, each opened when first needed.

    A connection takes whatever waits, up to `batch` records, and is never idle while something waits. Nothing waits for
    a batch to fill up: a lone record goes at once. A batch is one statement, pipelined: one round trip, one transaction.

    Belongs to the event loop in which it is first used.

    Args:
        connect: Returns a new asyncpg connection within so many seconds.
        size: Connections at most, 1 or more.
        batch: Records in a batch at most, 1 or more.
        seconds: Timeout of a record, from the call of `write` to its end.
    """

    def __init__(
        self, connect: Callable[[float], Awaitable[asyncpg.Connection]], *, size: int, batch: int, seconds: float
    ) -> None:
        self._connect = connect
        self._size = size
        self._batch = batch
        self._seconds = seconds
        # A queue for each statement, since a batch is one statement with many values.
        self._queues: dict[str, deque[_Record]] = {}
        self._idle: list[asyncpg.Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def write(self, statement: str, values: Sequence[Any], *, known: bool = False) -> bool:
        """Execute `statement`, and return once it is committed. There is no `await` before the record is queued.

        A caller that is cancelled takes nothing with it: the record is written all the same.

        Args:
            statement: An INSERT that is safe to repeat (ON CONFLICT DO NOTHING) and ends in RETURNING $1.
            values: Its parameters. The first is the id.
            known: Whether a row with this id may be there already, from an earlier call or in an open transaction.

        Returns:
            Whether the row is stored. False: a trigger or a rule has suppressed it.

        Raises:
            DatabaseUnavailableError: The outcome is unknown, or too many records wait.
            DatabaseError: PostgreSQL refused.
        """
        if sum(map(len, self._queues.values())) >= QUEUE_MAX:
            raise DatabaseUnavailableError(f"{QUEUE_MAX} records wait for the database", "QueueFull")
        loop = asyncio.get_running_loop()
        record = _Record(statement, values, loop.time() + self._seconds, loop.create_future(), known)
        self._queues.setdefault(statement, deque()).append(record)
        self._wake()
        outcome = await record.outcome
        if isinstance(outcome, DatabaseError):
            raise outcome
        return outcome

    async def aclose(self) -> None:
        """Write what waits, until the deadline of the last record, and close the connections."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                while self._tasks:
                    await asyncio.wait(self._tasks)
        while self._idle:
            self._discard(self._idle.pop())
        if self._closing:
            await asyncio.wait(self._closing)

    def _wake(self) -> None:
        """Start a task, if one is allowed and none is about to start: then all that is ready by then goes together."""
        if (self._starting is None or self._starting.done()) and len(self._tasks) < self._size and self._waits():
            # In a context of its own, since it serves many callers, each with its own trace.
            self._starting = asyncio.get_running_loop().create_task(self._work(), context=Context())
            self._tasks.add(self._starting)
            self._starting.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake()  # for what has come since it looked at the queue, and for what it left if it was cancelled

    def _waits(self) -> bool:
        return any(self._queues.values())

    async def _work(self) -> None:
        """Write batches on one connection until nothing waits."""
        self._starting = None
        connection: asyncpg.Connection | None = None
        batch: list[_Record] = []
        try:
            while batch := self._take():
                self._wake()  # what is left goes with another connection
                try:
                    connection = connection or await self._open(batch[0].deadline)
                    await self._insert(connection, batch)
                except Exception as error:  # noqa: BLE001 - whatever it is, the callers must be told
                    connection = self._failed(batch, connection, error)
        finally:
            for record in batch:  # none, unless this task was cancelled
                record.end(DatabaseUnavailableError("the event loop is ending", "CancelledError"))
            if connection is not None and batch:
                connection.terminate()
            elif connection is not None:
                self._idle.append(connection)

    def _take(self) -> list[_Record]:
        """Return the records that have waited longest and may share a round trip; [] if none wait."""
        now = asyncio.get_running_loop().time()
        while self._waits():
            queue = min(filter(None, self._queues.values()), key=lambda queue: queue[0].deadline)
            batch = [queue.popleft()]
            if batch[0].deadline <= now:
                batch[0].end(database_error(TimeoutError()))
                continue
            size = batch[0].size
            while queue and len(batch) < self._batch and not (batch[0].alone or queue[0].alone):
                size += queue[0].size
                if size > BATCH_CHARACTERS:
                    break
                batch.append(queue.popleft())
            return batch
        return []

    async def _open(self, deadline: float) -> asyncpg.Connection:
        """Return the connection that was used last, so that the others may stay idle, or a new one."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return await self._connect(deadline - asyncio.get_running_loop().time())

    async def _insert(self, connection: asyncpg.Connection, batch: list[_Record]) -> None:
        remaining = batch[0].deadline - asyncio.get_running_loop().time()
        # asyncpg's own timeout, since it doesn't end at a cancellation. A batch has half of the time, so that its
        # records can be tried alone in the other half: one that waits for a lock would take its mates with it.
        seconds = remaining if len(batch) == 1 else remaining / 2
        rows = await connection.fetchmany(batch[0].statement, [record.values for record in batch], timeout=seconds)
        stored = {row[0] for row in rows}
        for record in batch:
            if record.known and not stored:  # it is the only one
                await connection.execute(BARRIER, timeout=record.deadline - asyncio.get_running_loop().time())
            record.end(record.known or record.values[0] in stored)

    def _failed(
        self, batch: list[_Record], connection: asyncpg.Connection | None, error: Exception
    ) -> asyncpg.Connection | None:
        """Let each record of a failed batch be tried once more, alone. Returns the connection if it is still good."""
        state = error.sqlstate or "" if isinstance(error, asyncpg.PostgresError) else None
        is_unknown = state is None or state.startswith(_UNKNOWN_OUTCOME)
        is_good = connection and not (state is None or state in STALE_CONNECTION or connection.is_closed())
        is_final = connection is None or (len(batch) == 1 and (is_good or isinstance(error, TimeoutError)))
        for record in reversed(batch):
            if is_final or record.tried:
                record.end(database_error(error))
                continue
            record.tried = True
            record.known |= is_unknown
            self._queues[record.statement].appendleft(record)
        if connection is None or is_good:
            return connection
        self._discard(connection)
        while self._idle and not isinstance(error, TimeoutError):
            self._discard(self._idle.pop())  # a server that ended one, or has become read-only, has others like it
        return None

    def _discard(self, connection: asyncpg.Connection) -> None:
        task = asyncio.get_running_loop().create_task(_close(connection))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _close(connection: asyncpg.Connection) -> None:
    # `close` tells the server to cancel what still runs. After `terminate` its process would wait on for its lock or
    # its standby, and the processes would pile up.
    with contextlib.suppress(Exception):  # nobody waits for it
        async with asyncio.timeout(CLOSE_SECONDS):
            await connection.close()
