"""Group commit: records that wait are written together, in one round trip."""

import asyncio
import bisect
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Final

from asyncpg import Connection, PostgresError, TooManyConnectionsError

from backend.cc.connection import Connect, Connections
from backend.cc.errors import STALE_CONNECTION, UNKNOWN_OUTCOME, DatabaseError, DatabaseUnavailableError, database_error

QUEUE_MAX: Final = 10_000  # records that may wait; a call beyond that fails at once
BATCH_CHARACTERS: Final = 131_072  # of text in a batch; a record with more travels alone
GATHER_SECONDS: Final = 0.002  # how long what arrives is left to the task whose batch is on its way
CONNECT_PAUSE: Final = 0.1  # seconds until a task tries again to connect, if the server allows no more connections
# Writes WAL, so its commit waits for a synchronous standby. An insert that finds its row already there writes none and
# doesn't wait, though the row may be on the primary alone.
BARRIER: Final = "SELECT pg_logical_emit_message(true, 'cos-cc', '')"

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False, repr=False)
class _Record:
    statement: str
    values: Sequence[Any]
    deadline: float
    size: int
    known: bool  # its id may be stored already, or be in another transaction that it must wait for
    alone: bool  # it shares no batch, because it may have to wait, or fail again
    ended: asyncio.Future[None]
    result: bool | DatabaseError | None = None
    tried: bool = False  # it has failed once, with others or on a connection that died

    def end(self, result: bool | DatabaseError) -> None:  # noqa: FBT001 - what `write` returns or raises
        self.result = result
        if self.ended.cancelled():
            self.report_loss()
        else:
            self.ended.set_result(None)

    def report_loss(self) -> None:
        if self.result not in (None, True):
            reason = self.result or "a trigger has suppressed it"
            logger.error("Record %s, whose caller was cancelled, may be lost: %s", self.values[0], reason)


class Writer:
    """Write records on up to `size` connections, in the event loop that runs when it is made.

    A free one takes what waits at once, up to `batch` records of one statement, in one round trip and one transaction.
    What arrives within GATHER_SECONDS after that waits for it, unless it fills a batch of its own.

    Args:
        connect: Returns a new asyncpg connection within so many seconds.
        size: Connections at most, 1 or more. Each is opened when first needed.
        batch: Records in a batch at most, 1 or more.
        seconds: Timeout of a record, from the call of `write` to its end.
    """

    def __init__(self, connect: Connect, *, size: int, batch: int, seconds: float) -> None:
        self._connections, self._size, self._batch, self._seconds = Connections(connect), size, batch, seconds
        self._loop = asyncio.get_running_loop()
        self._queues: dict[str, deque[_Record]] = {}  # by statement, and each in the order of its deadlines
        self._tasks: set[asyncio.Task[None]] = set()
        self._recent: set[_Record] = set()  # the first record of each batch that was sent less than GATHER_SECONDS ago
        self._starting = False  # whether a task is about to run

    async def write(self, statement: str, values: Sequence[Any], *, known: bool) -> bool:
        """Execute `statement`, and return once it is committed: True, or False if a trigger has suppressed the row.

        The record is queued before the first `await`. If the caller is then cancelled, it is written all the same.

        Args:
            statement: An INSERT that is safe to repeat (ON CONFLICT DO NOTHING) and ends in RETURNING $1.
            values: Its parameters. The first is the id.
            known: Whether a row with this id may be there already, from an earlier call or in an open transaction.

        Raises:
            DatabaseError: PostgreSQL refused. DatabaseUnavailableError: the outcome is unknown, or too many wait.
        """
        if sum(map(len, self._queues.values())) >= QUEUE_MAX:
            raise DatabaseUnavailableError(f"{QUEUE_MAX} records wait for the database", "QueueFull")
        size = sum(len(value) for value in values if isinstance(value, str))
        deadline = self._loop.time() + self._seconds
        record = _Record(statement, values, deadline, size, known, known, self._loop.create_future())
        self._queues.setdefault(statement, deque()).append(record)
        self._wake()
        try:
            await record.ended
        except asyncio.CancelledError:
            record.report_loss()
            raise
        if isinstance(record.result, DatabaseError):
            raise record.result
        return bool(record.result)

    async def aclose(self) -> None:
        """Write what waits, for as long as a record may take, and close the connections."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds + 1):  # the last record's own timeout ends first
                while self._tasks:
                    await asyncio.wait(self._tasks)
        await self._connections.aclose()

    def _wake(self) -> None:
        """Start a task if something waits. What becomes ready before the task runs goes with it: this makes batches."""
        if self._starting or len(self._tasks) >= self._size:
            return
        waiting = [queue for queue in self._queues.values() if queue]
        if any(not self._recent or len(queue) >= self._batch or queue[0].alone for queue in waiting):
            self._starting = True
            task = self._loop.create_task(self._work(), context=Context())  # not in the first caller's trace
            task.add_done_callback(self._ended)
            self._tasks.add(task)

    def _gather_no_more(self, first: _Record) -> None:
        self._recent.discard(first)
        self._wake()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._starting = False  # it is still set if the task was cancelled before it ran
        while task.cancelled() and (waiting := [queue for queue in self._queues.values() if queue]):
            waiting[0].popleft().end(database_error(asyncio.CancelledError()))  # the event loop is ending
        self._wake()  # for a record that came after the task's last look at the queues

    async def _work(self) -> None:
        """Write batches until nothing waits."""
        self._starting = False
        while batch := self._take():
            self._recent.add(batch[0])
            self._loop.call_later(GATHER_SECONDS, self._gather_no_more, batch[0])
            self._wake()  # what is left may need another connection
            connection = None
            try:
                connection = await self._connections.get(self._seconds_left(batch))
                await self._insert(connection, batch)
                self._connections.put(connection)
            except (Exception, asyncio.CancelledError) as error:  # whatever it is, the callers must be told
                if connection is None and isinstance(error, TooManyConnectionsError) and len(self._tasks) > 1:
                    self._put_back(batch)  # the tasks that have a connection take it
                    await asyncio.sleep(min(CONNECT_PAUSE, self._seconds_left(batch)))
                    continue
                self._failed(batch, connection, error)
                if isinstance(error, asyncio.CancelledError):
                    raise
            finally:
                self._recent.discard(batch[0])

    def _take(self) -> list[_Record]:
        """Return the records that have waited longest and may share a round trip; [] if none wait."""
        while waiting := [queue for queue in self._queues.values() if queue]:
            queue = min(waiting, key=lambda queue: queue[0].deadline)
            batch = [queue.popleft()]
            if self._seconds_left(batch) <= 0:
                batch[0].end(database_error(TimeoutError()))
                continue
            size = batch[0].size
            while queue and len(batch) < self._batch and not (batch[0].alone or queue[0].alone):
                if (size := size + queue[0].size) > BATCH_CHARACTERS:
                    break
                batch.append(queue.popleft())
            return batch
        return []

    def _seconds_left(self, batch: list[_Record]) -> float:
        return batch[0].deadline - self._loop.time()

    async def _insert(self, connection: Connection, batch: list[_Record]) -> None:
        # asyncpg's own timeout, since it swallows a cancellation. A batch has half of the time, so that its records can
        # be tried alone in the other half: otherwise one that waits for a lock would take its mates with it.
        seconds = self._seconds_left(batch) / (1 if len(batch) == 1 else 2)
        rows = await connection.fetchmany(batch[0].statement, [record.values for record in batch], timeout=seconds)
        if batch[0].known and not rows:
            await connection.execute(BARRIER, timeout=self._seconds_left(batch))
        stored = {row[0] for row in rows}
        for record in batch:
            record.end(record.known or record.values[0] in stored)

    def _failed(self, batch: list[_Record], connection: Connection | None, error: BaseException) -> None:
        """Let each record of a failed batch be tried once more, alone."""
        state = error.sqlstate or "" if isinstance(error, PostgresError) else None
        is_good = connection and not (state is None or state in STALE_CONNECTION or connection.is_closed())
        is_final = len(batch) == 1 and (is_good or isinstance(error, TimeoutError))
        if connection is None:  # there is no server for any of them, unless it took the time of the first alone
            is_final = self._seconds_left(batch) > 0
        for record in batch:
            if is_final or record.tried:
                record.end(database_error(error))
                continue
            if connection is not None:
                record.tried = record.alone = True
                record.known |= state is None or state.startswith(UNKNOWN_OUTCOME)
            self._put_back([record])
        if is_good:
            self._connections.put(connection)
        elif connection is not None:
            if not isinstance(error, TimeoutError):
                self._connections.distrust()
            self._connections.discard(connection)

    def _put_back(self, batch: list[_Record]) -> None:
        for record in batch:  # each to its place: tasks that failed may return records in any order
            bisect.insort_left(self._queues[record.statement], record, key=lambda other: other.deadline)
