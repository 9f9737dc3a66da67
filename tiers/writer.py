"""From what is asked to batches in the log.

A queue, and up to ``depth`` batches on their way at once, of at most ``flight_bytes_max`` together.
What comes while batches are on their way is gathered: so under load batches are large and heads are
few, and a lone value is written at once.

A batch that fails concerns its own members alone: its segment is fenced and they are tried once
more in another one.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import anyio

from respkv.tiers.batch import Batch
from respkv.tiers.device import Write
from respkv.tiers.health import NO_SPACE, why
from respkv.tiers.log import Log
from respkv.tiers.order import Flight, Order
from respkv.tiers.pending import Pending
from respkv.tiers.record import Meta
from respkv.tiers.segment_head import segment_name
from respkv.tiers.space import ASKED, Space
from respkv.tiers.staging import Staging

BATCH_BYTES_MAX = 8 << 20
FLIGHT_BYTES_MAX = 128 << 20
GATHER_BYTES = 256 << 10  # a batch of so much is worth a write of its own
GROUP_MAX = 512  # values and notes of a batch: more would hold up the event loop
_TRIES_MAX = 2


class Codec(Protocol):
    """How a tier stores payloads; both may raise PageCorrupt, and take their time."""

    async def encode(self, meta: Meta, payload: memoryview) -> tuple[int, memoryview]:
        """Return the codec's id and the payload as stored; 0 and the payload itself: raw."""
        ...

    async def decode(self, codec: int, stored: memoryview, into: memoryview) -> bool:
        """Fill ``into``, which has the size of the payload; return whether not a bit was lost."""
        ...


class _Start(NamedTuple):
    flight: Flight
    memory: memoryview
    pieces: list[Write]


class Writer:
    """Write what is submitted, to one stream of segments."""

    def __init__(
        self,
        log: Log,
        order: Order,
        space: Space,
        staging: Staging,
        codec: Codec | None,
        *,
        stream: int,
        depth: int,
    ) -> None:
        self._log = log
        self._order = order
        self._space = space
        self._staging = staging
        self._codec = codec
        self._stream = stream
        self._depth = depth
        self._batch_bytes_max = min(BATCH_BYTES_MAX, log.table.segment_bytes // 4)
        self._queue: deque[Pending] = deque()
        self._queued_bytes = 0
        self._num_flights = 0
        self._flight_bytes = 0
        self._refusals = 0
        self._why_refused = ""
        self.is_stopped = False
        self._placing = anyio.Lock()
        self._stirred = anyio.Event()

    @property
    def is_idle(self) -> bool:
        return not self._queue and not self._num_flights

    def submit(self, pendings: Iterable[Pending]) -> None:
        """Queue what is to be written. Each is answered by its ``done``, whatever happens."""
        for pending in pendings:
            if self.is_stopped:
                pending.fail("the tier has stopped")
                continue
            self._queue.append(pending)
            self._queued_bytes += pending.nbytes
        self._stir()

    def withdraw(self, pendings: Sequence[Pending]) -> None:
        """Their asker has gone: what is not on its way need not be written."""
        for pending in pendings:
            pending.is_void = True
        gone = set(pendings)
        for pending in [each for each in self._queue if each in gone]:
            self._queue.remove(pending)
            self._queued_bytes -= pending.nbytes
            pending.answer(None)

    def refuse(self, reason: str) -> None:
        """Answer all that is queued: it will not be written.

        So is what has left the queue and has no place yet, as soon as it would wait for one.
        """
        self._refusals += 1
        self._why_refused = reason
        queue, self._queue = self._queue, deque()
        self._queued_bytes = 0
        for pending in queue:
            pending.fail(reason)
        self._stir()

    async def drain(self) -> None:
        """Wait until all that was submitted is written or refused."""
        while not self.is_idle:
            await self._stirred.wait()

    async def run(self) -> None:
        """Write until cancelled. Whatever is still queued then is answered: not written."""
        self.is_stopped = False
        try:
            async with anyio.create_task_group() as flights:
                while True:
                    await self._wait()
                    group = self._gather()
                    self._num_flights += 1
                    nbytes = sum(each.nbytes for each in group)
                    self._flight_bytes += nbytes
                    flights.start_soon(self._write, group, nbytes)
        finally:
            self.is_stopped = True
            self.refuse("the tier has stopped")

    async def _wait(self) -> None:
        while not self._is_time():
            await self._stirred.wait()

    def _is_time(self) -> bool:
        if not self._queue or self._num_flights >= self._depth:
            return False
        if not self._num_flights:
            return True
        is_worth_it = self._num_flights < 2 or self._queued_bytes >= GATHER_BYTES
        first = self._queue[0].nbytes
        return is_worth_it and self._flight_bytes + first <= FLIGHT_BYTES_MAX

    def _gather(self) -> list[Pending]:
        """Take the next batch from the queue: one of any size, or as many as are not too large."""
        group: list[Pending] = []
        nbytes = 0
        while self._queue and len(group) < GROUP_MAX:
            first = self._queue[0].nbytes
            if group and nbytes + first > self._batch_bytes_max:
                break
            nbytes += first
            group.append(self._queue.popleft())
        # What waits may have been changed since it was counted.
        self._queued_bytes = self._queued_bytes - nbytes if self._queue else 0
        return group

    async def _write(self, group: list[Pending], nbytes: int) -> None:
        refusals = self._refusals
        try:
            await self._encode(group)
            start, rest = await self._place(group, refusals)
            self._requeue(rest)
            if start is not None:
                await self._carry_out(start)
        except OSError as error:
            self._failed(group, error)
        except BaseException:
            for pending in group:
                pending.fail("the tier has stopped")
            raise
        finally:
            self._num_flights -= 1
            self._flight_bytes -= nbytes
            self._stir()

    async def _encode(self, group: list[Pending]) -> None:
        if self._codec is None:
            return
        for pending in group:
            if pending.value is not None and not pending.is_encoded:
                meta, payload = pending.value.meta, pending.payload
                pending.codec, pending.payload = await self._codec.encode(meta, payload)
                pending.is_encoded = True
                if pending.codec:
                    pending.image = None

    async def _place(
        self, group: list[Pending], refusals: int
    ) -> tuple[_Start | None, list[Pending]]:
        """Give the group a sequence and a place; return what did not fit into the batch as well.

        refusals: how many there had been when the group left the queue. One after another the
                  groups would wait for a segment here, each until the next refusal.

        Between looking who is still wanted and the sequence there is no wait: what is buried later
        has a later sequence.
        """
        async with self._placing:
            while True:
                batch, members, rest = self._draft(group)
                if not batch.num_items:
                    return None, []
                memory = self._staging.take_now(batch.staging_bytes)
                if memory is None:
                    memory = await self._staging.take(batch.staging_bytes)
                    batch, members, rest = self._draft(group)
                    if not batch.num_items:
                        self._staging.give_back(memory)
                        return None, []
                start = self._start(batch, members, memory)
                if start is not None:
                    return start, rest
                self._staging.give_back(memory)
                if self._refusals != refusals:
                    for pending in group:
                        pending.fail(self._why_refused)
                    return None, []
                await self._space.open_next(self._stream)

    def _draft(self, group: list[Pending]) -> tuple[Batch, list[Pending], list[Pending]]:
        """Put a batch together. Returns: it, its members in order, and those it had no room for."""
        batch = Batch(self._log.alignment)
        members: list[Pending] = []
        rest: list[Pending] = []
        for pending in group:
            if not pending.is_wanted(self._log):
                pending.answer(None)
            elif not batch.has_room():
                rest.append(pending)
            else:
                members.append(pending)
                if pending.logged is not None:
                    batch.add_note(pending.logged.note)
                else:
                    batch.add_value(
                        pending.meta(self._log),
                        pending.payload,
                        codec=pending.codec,
                        image=pending.image,
                        is_copy=pending.source is not None,
                    )
        return batch, members, rest

    def _start(self, batch: Batch, members: list[Pending], memory: memoryview) -> _Start | None:
        log = self._log
        where = log.table.allocate(batch.total_bytes, stream=self._stream)
        if where is None:
            return None
        segment, offset = where
        sequence = log.next_sequence
        log.next_sequence += 1
        encoded = batch.encode(
            memory,
            offset=offset,
            nonce=segment.nonce,
            sequence=sequence,
            acked=log.acked,
            noted=segment.noted,
        )
        log.table.begin_write(
            segment, sequence=sequence, is_noted=batch.may_supersede, now=log.clock()
        )
        if batch.may_supersede:
            segment.noted_at = offset
        flight = Flight(segment, sequence, offset + batch.total_bytes, members, encoded.places)
        self._order.begin(flight)
        log.stats.writes += 1
        log.stats.written_bytes += batch.total_bytes
        return _Start(flight, memory, encoded.pieces)

    async def _carry_out(self, start: _Start) -> None:
        error: OSError | None = None
        # Shielded, so that what became of it is known even when the tier is being stopped.
        with anyio.CancelScope(shield=True):
            try:
                await self._log.device.write(segment_name(start.flight.segment.id), start.pieces)
                self._log.health.write_succeeded()
            except OSError as failed:
                error = failed
        self._staging.give_back(start.memory)
        if error is not None:
            self._log.table.fence(start.flight.segment)
            self._space.wanted.set()
        self._order.end(start.flight, error)
        if error is not None:
            self._failed(start.flight.members, error)

    def _failed(self, group: list[Pending], error: OSError) -> None:
        """Try the group once more, or tell it that it could not be written."""
        log = self._log
        log.stats.write_errors += 1
        is_last = any(each.tries + 1 >= _TRIES_MAX for each in group)
        if error.errno not in NO_SPACE:
            log.health.write_failed(error)
        elif is_last and self._stream == ASKED:
            log.health.worsen("read-only", f"there is no space: {why(error)}")
        else:
            self._space.met_the_end()
        again: list[Pending] = []
        for pending in group:
            pending.tries += 1
            if pending.tries < _TRIES_MAX and log.health.can_write:
                again.append(pending)
            else:
                pending.fail(f"tier {log.name} could not write: {why(error)}")
        self._requeue(again)

    def _requeue(self, pendings: list[Pending]) -> None:
        still = [each for each in pendings if each.is_wanted(self._log)]
        for pending in pendings:
            if pending not in still:
                pending.answer(None)
        self._queue.extendleft(reversed(still))
        self._queued_bytes += sum(each.nbytes for each in still)

    def _stir(self) -> None:
        self._stirred.set()
        self._stirred = anyio.Event()
