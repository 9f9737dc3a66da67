"""A file tier: a log of values in the files of one directory.

The parts, each in its module: a Writer for each of two streams (what is asked, what reclaim copies)
puts batches into segments that Space opens, Order acknowledges them, the Syncer makes them durable,
the Reclaimer empties old segments, the Checkpointer saves time at the next start, the Reader
believes nothing, and the Caretaker looks after the tier's health. They share a Log, which is plain
state. This module is what the engine sees of them, and starts and stops them.

Whose memory is whose: ``write`` and ``read`` use the memory they are given until they return or
raise, and not after. A cancelled asker is therefore told a little later than it asks; whatever it
holds it may give back when the call is over.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic

import anyio

from respkv.errors import TierError
from respkv.tiers.caretaker import Caretaker
from respkv.tiers.closing import close_after, finish, leave_clean
from respkv.tiers.device import Device
from respkv.tiers.estimate import Estimate
from respkv.tiers.health import Health, why
from respkv.tiers.log import Hooks
from respkv.tiers.meta import can_be_kept
from respkv.tiers.opening import Recovery, open_log
from respkv.tiers.parts import Parts, TierConfig, assemble
from respkv.tiers.pending import Pending
from respkv.tiers.reader import Reader
from respkv.tiers.record import Level, Meta, Record, Value
from respkv.tiers.segments import SegmentTable
from respkv.tiers.tickets import Tickets
from respkv.tiers.tier_stats import TierStats
from respkv.tiers.writer import Codec

_CLOSE = 0.2  # of the time to stop in, the share of a device that does not answer

logger = logging.getLogger(__name__)


class FileTier:
    """A bounded, restart-safe store of values in files.

    The engine sets the hooks before ``start``. They are called synchronously, but for ``leave``,
    and only with records that ``start`` offered or ``write`` returned:

    describe: present Meta of a live record.
    keep:     its segment is to be reclaimed: is it worth copying?
    leave:    about to be dropped by reclaim; it may read them and move them elsewhere.
    release:  may it be buried and dropped now? If so, its value gets another generation.
    dropped:  this copy is gone: "evicted", "corrupt" or "lost". May call ``free`` and ``bury``.
    generation: the next generation that nobody has used.
    """

    def __init__(
        self,
        config: TierConfig,
        connect: Callable[[], Awaitable[Device]],
        *,
        codec: Codec | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        hooks = Hooks()
        self.config = config
        self.name = config.name
        self.letter = config.letter
        self.capacity_bytes = config.capacity_bytes
        self.payload_bytes_max = 0  # until ``start``
        self.health = Health(config.name)
        self.estimate = Estimate(latency_us=config.latency_us, bytes_per_s=config.bytes_per_s)
        self.describe: Callable[[Record], Meta] = hooks.describe
        self.keep: Callable[[Record], bool] = hooks.keep
        self.leave: Callable[[list[Record]], Awaitable[None]] = hooks.leave
        self.release: Callable[[Record], bool] = hooks.release
        self.dropped: Callable[[Record, str], None] = hooks.dropped
        self.generation: Callable[[], int] = lambda: 0
        self._connect = connect
        self.codec = codec
        self._clock = clock
        self._stats = TierStats()
        self._parts: Parts | None = None
        self._caretaker: Caretaker | None = None
        self._open_tickets: Tickets | None = None
        self._running: anyio.CancelScope | None = None
        self._ended = anyio.Event()
        self._is_stopping = False

    @property
    def device(self) -> Device:
        return self._started.log.device

    @property
    def latency_us(self) -> float:
        return self.estimate.latency_us

    @property
    def bytes_per_s(self) -> float:
        return self.estimate.bytes_per_s

    @property
    def next_generation(self) -> int:
        """Greater than every generation that was found or written."""
        return self._started.log.next_generation

    @property
    def stats(self) -> TierStats:
        """The counters, those of now brought up to date."""
        if (parts := self._parts) is not None:
            table = parts.log.table
            self._stats.records = table.live_records
            self._stats.live_bytes = table.live_bytes
            self._stats.file_bytes = table.file_bytes + parts.checkpointer.other_bytes
        return self._stats

    def load_us(self, nbytes: int) -> int:
        """Return how long a read of ``nbytes`` should take."""
        return self.estimate.load_us(nbytes)

    @property
    def _tickets(self) -> Tickets:
        assert self._open_tickets is not None, f"tier {self.name} was not started"
        return self._open_tickets

    @property
    def _started(self) -> Parts:
        assert self._parts is not None, f"tier {self.name} was not started"
        return self._parts

    # Life

    async def start(self, found: Callable[[Meta, Record], bool]) -> Recovery:
        """Take the directory, recover what is there and offer each value.

        found: returns False for what is not wanted; it is freed.
        Raises TierError: in use by another server, of a newer version or of another tier, or it
        cannot be read or written. Nothing is served then, and every record that was offered is
        ``dropped``.
        """
        device = await self._connect()
        opened = None
        try:
            opened = await open_log(self.config, device, self._assemble, self._clock)
            self._parts, self._caretaker = opened.parts, Caretaker(self.config, opened.parts)
            self._open_tickets = Tickets(opened.parts)
            self.payload_bytes_max = opened.parts.log.table.payload_bytes_max(self.config.alignment)
            await opened.offer(found)
            await opened.secure(self._caretaker)
        except BaseException as error:
            if opened is not None:
                opened.parts.log.forget(why="lost")
            self._parts = None
            with anyio.CancelScope(shield=True):
                await device.close()
            if isinstance(error, OSError):
                raise TierError(f"{self._place} cannot start: {why(error)}") from error
            if isinstance(error, TierError):
                raise TierError(f"{self._place}: {error}") from error
            raise
        logger.info("%s: %d bytes at most", self._place, self.capacity_bytes)
        return opened.recovery

    @property
    def _place(self) -> str:
        where = f" in {self.config.path}" if self.config.path else ""
        return f"tier {self.name}{where}"

    async def run(self) -> None:
        """Write, reclaim, take checkpoints and probe, until cancelled or stopped.

        Ended: everything that was asked is answered; a start of ``run`` anew goes on.
        """
        if self._is_stopping:
            return
        parts = self._started
        assert self._caretaker is not None
        self._ended = anyio.Event()
        try:
            async with anyio.create_task_group() as group:
                self._running = group.cancel_scope
                for part in (
                    parts.writer,
                    parts.copier,
                    parts.syncer,
                    parts.reclaimer,
                    parts.checkpointer,
                    self._caretaker,
                ):
                    group.start_soon(part.run)
                group.start_soon(self._tickets.run)
        finally:
            parts.order.abandon()
            self._tickets.abandon("the tier has stopped")  # else some wait for ever after a crash
            self._running = None
            self._ended.set()

    async def stop(self, seconds: float = 10.0) -> None:
        """Finish what was asked, write a checkpoint that says all, and let the directory go.

        seconds: after these all has ended, whatever the device does. What it had not finished a
                 little earlier is given up, and the tier is left like after a crash.
        """
        if self._is_stopping or self._parts is None:
            self._is_stopping = True
            return
        self._is_stopping = True
        parts, caretaker = self._parts, self._caretaker
        assert caretaker is not None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(close_after, parts, seconds * (1 - _CLOSE), seconds * _CLOSE)
                if self._running is not None:
                    with anyio.move_on_after(seconds / 2):
                        await finish(parts)
                if self._running is not None:
                    self._running.cancel()
                    await self._ended.wait()
                await leave_clean(parts, caretaker)
                group.cancel_scope.cancel()
        finally:
            self._parts = None
            with anyio.CancelScope(shield=True):
                await parts.log.device.close()

    async def clear(self) -> None:
        """Forget everything, durably. Nobody is told: the asker knows.

        The records are gone before the first wait. Raises TierError when a crash might bring them
        back.
        """
        assert self._caretaker is not None
        self._started.log.forget()
        try:
            await self._caretaker.write_superblock(is_clean=False)
        except OSError as error:
            self.health.write_failed(error)
            raise TierError(f"tier {self.name} could not forget durably: {why(error)}") from error

    async def reset(self) -> None:
        """After a crash of ``run``: forget everything, tell the engine so, and start empty."""
        parts = self._started
        assert self._caretaker is not None
        parts.order.abandon()
        try:
            await self._caretaker.empty()
        except OSError as error:
            parts.log.forget(why="lost")
            self.health.worsen("off", f"it crashed and cannot be emptied: {why(error)}")
        else:
            self._tickets.clear()
        parts.reopen()

    # Values

    async def write(self, values: Sequence[Value], level: Level) -> list[Record | None]:
        """Write values, and return when ``level`` holds for all of them.

        Returns: a record for each; None for one that was not written: the tier is not ok, it is
        too large, it was buried meanwhile, or the device failed. One that is gone is not to be kept.
        Cancelled: what was not on its way is not written; the records of the others are freed.
        """
        log = self._started.log
        pendings = [self._ask(value, level) for value in values]
        try:
            for pending in pendings:
                await pending.done.wait()
        except BaseException:
            self._started.writer.withdraw(pendings)
            with anyio.CancelScope(shield=True):
                for pending in pendings:
                    await pending.done.wait()
            for pending in pendings:
                if (record := pending.done.return_value) is not None:
                    log.young.pop(record, None)
                    log.discard(record)
            raise
        finally:
            for pending in pendings:
                self._tickets.value_ended(pending)
        return [self._hand_over(pending) for pending in pendings]

    async def read(
        self, record: Record, key: bytes, into: memoryview, image: memoryview | None
    ) -> int:
        """Read a copy, and prove that it is what was put under this key.

        into:  where the payload goes; has its size.
        image: what surrounds it: the 64 bytes of its page header in front, and up to a multiple of
               4096 bytes behind, all in one 4096-aligned piece. It saves a copy; the header is
               there afterwards. None when there is no such piece.
        Returns: the checksum of what is there now: a lossy codec makes it another than was put.
        Raises PageCorrupt (the record is dropped already) or TierError (it is gone, or the device
        failed); ``into`` holds anything then.
        """
        return await self._reader.read(record, key, into, image)

    async def read_stored(self, record: Record, key: bytes) -> tuple[int, bytes]:
        """Read a copy as it is stored, for who decodes it elsewhere; else as ``read`` does.

        Returns: the codec as in the record, and the stored payload.
        """
        return record.codec, await self._reader.read_stored(record, key)

    @property
    def _reader(self) -> Reader:
        if self._parts is None:
            raise TierError(f"tier {self.name} is stopped")
        return self._parts.reader

    def free(self, record: Record) -> None:
        """Give up a copy that nobody wants; harmless when it is gone.

        Its place is not used for anything else before the reads of it have ended.
        """
        if self._parts is not None:
            self._parts.log.discard(record)

    def bury(self, key: bytes, generation: int) -> int:
        """Note that all values of a key up to this generation are void. Returns a ticket."""
        return self._tickets.bury(key, generation)

    def change(self, meta: Meta) -> int:
        """Note how the value of this generation is described now; it may have a higher level.

        Returns: a ticket.
        """
        return self._tickets.change(meta)

    async def settle(self, ticket: int, level: Level) -> None:
        """Return when ``level`` holds for a note, and for the value whose level it raised.

        Raises TierError when it never will.
        """
        await self._tickets.settle(ticket, level)

    # Small files beside the log

    async def save(self, name: str, data: bytes) -> None:
        """Replace a small file of the directory durably, under the cap. Raises TierError."""
        checkpointer = self._started.checkpointer
        checkpointer.saved[name] = max(checkpointer.saved.get(name, 0), len(data))
        checkpointer.reserve()
        try:
            with anyio.CancelScope(shield=True):
                await self.device.replace(name, data)
        except OSError as error:
            self.health.write_failed(error)
            raise TierError(f"tier {self.name} could not save {name}: {why(error)}") from error

    async def load(self, name: str) -> bytes | None:
        """Return a small file of the directory, None when there is none. Raises TierError."""
        try:
            return await self.device.load(name)
        except OSError as error:
            raise TierError(f"tier {self.name} could not load {name}: {why(error)}") from error

    def _assemble(self, device: Device, table: SegmentTable) -> Parts:
        return assemble(
            self.config,
            device,
            table,
            health=self.health,
            stats=self._stats,
            hooks=Hooks(self.describe, self.keep, self.leave, self.release, self.dropped),
            codec=self.codec,
            estimate=self.estimate,
            generation=self.generation,
            clock=self._clock,
        )

    def _ask(self, value: Value, level: Level) -> Pending:
        parts = self._started
        meta = value.meta
        assert value.payload.nbytes == meta.payload_bytes, "a value is not as it is described"
        pending = Pending(
            max(level, Level.WRITTEN),
            parts.log.epoch,
            value=value,
            payload=value.payload.cast("B"),
            image=value.image,
        )
        self._tickets.value_asked(pending)
        is_too_large = meta.payload_bytes > self.payload_bytes_max or not can_be_kept(meta)
        if is_too_large or self._is_stopping or not self.health.can_write:
            pending.fail("not written")
        else:
            parts.writer.submit([pending])
        return pending

    def _hand_over(self, pending: Pending) -> Record | None:
        record = pending.done.return_value
        if record is None:
            return None
        log = self._started.log
        log.young.pop(record, None)
        return record if log.is_live(record) or record.is_gone else None
