"""Reading values back into memory: who waits for which, and how many are on their way.

All who want one entry share one load. What a load brought stays in memory until every one of them
has had its turn, and after that only if it is promoted. Loads begin in the order in which they were
asked for, prefetches after those that somebody waits for, and no more at a time than
``move_bytes_max`` from each tier, so that one that hangs does not stop those from another.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace

import anyio
from anyio.abc import TaskGroup

from respkv.engine.actor import Actor
from respkv.engine.cache import Cache
from respkv.engine.entry import SMALL_BYTES_MAX, Entry
from respkv.engine.gpu_actor import GpuActor
from respkv.engine.landing import Landing
from respkv.engine.messages import ReadRecord, ReadStored
from respkv.engine.placement import MoveSettings, is_promoted
from respkv.errors import CacheError, OutOfMemory, TierError
from respkv.tiers.record import Record
from respkv.tiers.slab import Slot

ROOM_PAUSE_S, ROOM_PAUSE_S_MAX = 0.005, 0.05
ARENA_SHARE = 4  # loads from one tier take one in so many bytes of the arena at a time
SPARE_S = 1.0  # at least so long a load waits before it evicts what has still to be written
PREFETCH_SHARE = 2  # prefetches take one in so many bytes on their way
GENTLE_BYTES_MAX = 8 << 20  # from one tier at a time, so that whoever comes waits for little


class Load:
    """One entry on its way into memory.

    error:   why it is not there; the entry may be gone as well, which is no error.
    is_kept: it stays when nobody waits any more.
    idle_s:  of a gentle one, which takes room only from what nobody has used for so long.
    """

    __slots__ = (
        "_event",
        "entry",
        "error",
        "idle_s",
        "is_done",
        "is_kept",
        "nbytes",
        "num_waiters",
        "on_end",
        "slot",
        "tier",
    )

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.nbytes = entry.nbytes
        self.tier = entry.records[0].tier if entry.records else 0  # it is asked first
        self.error: CacheError | None = None
        self.is_done = False
        self.is_kept = False
        self.num_waiters = 0
        self.idle_s: float | None = None
        self.on_end: Callable[[Load], None] | None = None
        self.slot: Slot | None = None  # held until nobody waits any more
        self._event: anyio.Event | None = None

    async def wait(self) -> None:
        """Wait until the entry is in memory, or gone, or ``error`` says why it is neither."""
        if not self.is_done:
            if self._event is None:
                self._event = anyio.Event()
            await self._event.wait()

    def end(self) -> None:
        """Wake those who wait."""
        self.is_done = True
        if self._event is not None:
            self._event.set()
        if self.on_end is not None:
            self.on_end(self)


class Loader:
    """The loads of a cache. ``actors`` are those of its tiers, in order."""

    def __init__(self, cache: Cache, actors: list[Actor], settings: MoveSettings) -> None:
        self.settings = settings
        self.gpu: GpuActor | None = None
        self.bytes_in_flight = [0] * len(actors)  # by tier
        self._cache = cache
        self._actors = actors
        self._tasks: TaskGroup | None = None
        self._loads: dict[Entry, Load] = {}
        self._wanted: list[OrderedDict[Load, None]] = [OrderedDict() for _ in actors]
        self._advised: list[OrderedDict[Load, None]] = [OrderedDict() for _ in actors]
        self._advised_bytes = 0
        self._gentle_bytes = [0] * len(actors)

    def __len__(self) -> int:
        return len(self._loads)

    def run_in(self, tasks: TaskGroup) -> None:
        """Read in tasks of this group from now on."""
        self._tasks = tasks
        self._begin()

    def stop(self) -> None:
        """Begin no more loads; those that wait for their turn fail."""
        self._tasks = None
        waiting = [load for queue in (*self._wanted, *self._advised) for load in queue]
        for queue in (*self._wanted, *self._advised):
            queue.clear()
        self._advised_bytes = 0
        for load in waiting:
            del self._loads[load.entry]
            load.error = TierError("the file tiers are being closed")
            load.end()

    def start(self, entry: Entry) -> Load:
        """Join the load of an entry, or begin one. ``release`` ends what this began."""
        load = self._loads.get(entry)
        if load is not None:
            self._cache.stats.loads_joined += 1
            if load in self._advised[load.tier]:
                del self._advised[load.tier][load]
                self._advised_bytes -= load.nbytes
                self._wanted[load.tier][load] = None
        else:
            load = Load(entry)
            if entry.is_cold and entry.position >= 0:
                self._loads[entry] = load
                self._wanted[load.tier][load] = None
            else:
                load.is_done = True
        load.num_waiters += 1
        self._begin()
        return load

    def release(self, load: Load) -> None:
        """End one ``start``: its caller has seen the entry, or does not wait any more."""
        load.num_waiters -= 1
        if not load.num_waiters and load.is_done:
            self._let_go(load)

    def advise(self, entries: Iterable[Entry]) -> int:
        """Raise entries ahead of use, as many as there is room on the way; return how many."""
        count = 0
        limit = self.settings.move_bytes_max // PREFETCH_SHARE
        for entry in entries:
            load = self._loads.get(entry)
            if load is not None:
                load.is_kept = True
                count += 1
            elif entry.is_cold and entry.position >= 0:
                if self._advised_bytes and self._advised_bytes + entry.nbytes > limit:
                    self._cache.stats.prefetch_dropped += 1
                    continue
                load = self._loads[entry] = Load(entry)
                load.is_kept = True
                self._advised[load.tier][load] = None
                self._advised_bytes += load.nbytes
                self._cache.stats.prefetched += 1
                count += 1
        self._begin()
        return count

    def raise_gently(self, entry: Entry, idle_s: float, on_end: Callable[[Load], None]) -> bool:
        """Begin to raise a cold entry if its tier reads nothing that was asked for.

        idle_s: memory that is in use makes room only where nobody has used it for so long, and
                only if nothing is lost by that; without room the entry stays cold.
        on_end: called when it is over, unless this returns False: nothing has begun then.
        Whoever asks for the entry meanwhile joins, and it is a load as any other from then on.
        """
        load = Load(entry)
        tier, gentle_bytes = load.tier, self._gentle_bytes
        is_busy = self._wanted[tier] or self._advised[tier] or self.bytes_in_flight[tier]
        if self._tasks is None or is_busy or entry in self._loads:
            return False
        if gentle_bytes[tier] and gentle_bytes[tier] + load.nbytes > GENTLE_BYTES_MAX:
            return False
        if not entry.is_cold or entry.position < 0:
            return False
        load.is_kept, load.idle_s, load.on_end = True, idle_s, on_end
        self._loads[entry] = load
        gentle_bytes[tier] += load.nbytes
        self._tasks.start_soon(self._load, load)
        return True

    async def read_stored(self, entry: Entry) -> tuple[int, bytes, Record] | None:
        """Read the fastest copy of an entry that can be read, as it is stored.

        Returns: the id of its codec, the bytes, and which copy it was; None when it has none, or
                 another value by then.
        Raises TierError when no copy can be read now.
        """
        failure: CacheError | None = None
        for record in entry.records:
            try:
                message = ReadStored(record, entry.key)
                codec, stored = await self._actors[record.tier].ask(message)
            except CacheError as error:
                failure = error
                continue
            is_there = record in entry.records and entry.position >= 0
            return (codec, stored, record) if is_there else None
        if failure is not None and entry.records and entry.position >= 0:
            raise failure
        return None

    # -- inside -------------------------------------------------------------------------------

    def _begin(self) -> None:
        for tier in range(len(self._actors)):
            self._begin_from(tier)

    def _begin_from(self, tier: int) -> None:
        whole = self._cache.slabs.budget_bytes
        limit = min(self.settings.move_bytes_max, whole // ARENA_SHARE)
        while self._tasks is not None and (self._wanted[tier] or self._advised[tier]):
            queue = self._wanted[tier] or self._advised[tier]
            load = next(iter(queue))
            in_flight = self.bytes_in_flight[tier]
            if in_flight and in_flight + load.nbytes > limit:
                return
            del queue[load]
            if queue is self._advised[tier]:
                self._advised_bytes -= load.nbytes
            self.bytes_in_flight[tier] += load.nbytes
            self._tasks.start_soon(self._load, load)

    async def _load(self, load: Load) -> None:
        entry = load.entry
        try:
            while entry.is_cold and entry.position >= 0:
                if entry.kind == "string" and entry.nbytes <= SMALL_BYTES_MAX:
                    await self._read_small(load)
                else:
                    await self._read_large(load)
                if load.idle_s is not None and not load.num_waiters:
                    break  # no room, and nobody waits for it
        except CacheError as error:
            load.error = error
            self._cache.stats.loads_failed += 1
        finally:
            in_flight = self.bytes_in_flight if load.idle_s is None else self._gentle_bytes
            in_flight[load.tier] -= load.nbytes
            del self._loads[entry]
            load.end()
            if not load.num_waiters:
                self._let_go(load)
            self._begin()

    async def _read_small(self, load: Load) -> None:
        entry, cache = load.entry, self._cache
        buffer = bytearray(entry.nbytes)
        record = await self._read(entry, memoryview(buffer), None)
        if record is not None and cache.raise_small(entry, bytes(buffer)):
            cache.copies.kept.add(entry)
            self._note_loaded(load, record, cache.room.small_max - cache.room.small_bytes)

    async def _read_large(self, load: Load) -> None:
        entry, cache = load.entry, self._cache
        if load.idle_s is not None and not load.num_waiters:
            landing = self._take_spare(entry, load.idle_s)
        else:
            landing = await self._find_room(entry)
        if landing is None:
            return
        try:
            slot = landing.slot
            if landing.nbytes != entry.nbytes:
                return  # it is another value by now
            record = await self._read_gpu(entry, landing.memory)
            if record is None:
                record = await self._read(entry, landing.memory, cache.image(slot))
            if record is not None:
                cache.raise_entry(entry, landing, record)
                cache.borrow(slot)
                load.slot = slot
                self._note_loaded(load, record, cache.slabs.budget_bytes - cache.slabs.used_bytes)
        finally:
            cache.abandon(landing)

    async def _read_gpu(self, entry: Entry, into: memoryview) -> Record | None:
        """Read the copy in the gpu tier, which is nearer than a file; None: there is none to use.

        Cancelled: after the read has ended.
        """
        gpu, copy = self.gpu, self._cache.gpu.find(entry)
        if gpu is None or copy is None or not await gpu.read(copy, into):
            return None
        if self._cache.gpu.find(entry) is not copy or not entry.is_cold:
            return None
        record = entry.records[0]
        record.touches += 1
        return replace(record, checksum=copy.checksum)

    async def _read(
        self, entry: Entry, into: memoryview, image: memoryview | None
    ) -> Record | None:
        """Read the fastest copy that can be read.

        Returns: the copy that was read, with the checksum of what came out of it; None when the
                 entry is not what it was.
        Raises TierError when no copy can be read now. What is damaged the tier has dropped itself.
        Cancelled: after the read has ended, because the tier writes into memory that is lent.
        """
        failure: CacheError | None = None
        for record in entry.records:
            if record not in entry.records or not entry.is_cold:
                break
            touches, checksum = record.touches, record.checksum
            try:
                with anyio.CancelScope(shield=True):
                    message = ReadRecord(record, entry.key, into, image)
                    checksum = await self._actors[record.tier].ask(message)
            except CacheError as error:
                failure = error
                continue
            if entry.is_cold and entry.position >= 0 and record in entry.records:
                record.touches = max(record.touches, touches + 1)
                is_exact = checksum == record.checksum
                return record if is_exact else replace(record, checksum=checksum)
            return None
        if failure is not None and entry.is_cold and entry.records and entry.position >= 0:
            raise failure
        return None

    def _take_spare(self, entry: Entry, idle_s: float) -> Landing | None:
        """Take free room, or that of what has a copy, is no dearer, and was not used for long."""
        cache = self._cache
        slot = cache.slabs.take(entry.nbytes)
        if slot is None:
            victim = cache.room.next_victim(entry.nbytes)
            if victim is None or not victim.records or victim.priority > entry.priority:
                return None
            if cache.clock.now - victim.touched < idle_s:
                return None
            cache.room.evict(victim)
            slot = cache.slabs.take(entry.nbytes)
        return None if slot is None else cache.adopt(slot)

    async def _find_room(self, entry: Entry) -> Landing | None:
        """Wait for a slot, and only after a while take one from what has still to be written.

        Returns None when the entry needs none any more. Raises OutOfMemory.
        """
        if entry.nbytes > self._cache.slabs.payload_bytes_max:
            return self._cache.reserve(entry.nbytes)  # raises, and says why
        cache, pause_s = self._cache, ROOM_PAUSE_S
        began = anyio.current_time()
        while entry.is_cold and entry.position >= 0:
            waited = anyio.current_time() - began
            is_last = waited >= max(SPARE_S, self.settings.reserve_timeout_s)
            may_lose = is_last or not cache.copies.can_write
            try:
                return cache.adopt(cache.room.take(entry.nbytes, may_lose=may_lose))
            except OutOfMemory:
                if is_last:
                    cache.stats.oom += 1
                    raise
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, ROOM_PAUSE_S_MAX)
        return None

    def _note_loaded(self, load: Load, record: Record, free_bytes: int) -> None:
        entry, cache = load.entry, self._cache
        cache.stats.loads += 1
        cache.stats.load_bytes += entry.nbytes
        whole = cache.room.small_max if entry.slot is None else cache.slabs.budget_bytes
        if not load.is_kept:
            load.is_kept = is_promoted(self.settings.promote, record.touches, free_bytes, whole)

    def _let_go(self, load: Load) -> None:
        """Drop what a load brought from memory, unless it stays or is another value by now."""
        entry, cache, slot = load.entry, self._cache, load.slot
        is_ours = entry.slot is slot if slot is not None else entry in cache.copies.kept
        cache.copies.kept.discard(entry)
        load.slot = None
        if is_ours and entry.position >= 0 and not entry.is_cold and load.error is None:
            if load.is_kept:
                cache.stats.promoted += 1
            elif entry.records and entry not in cache.copies.writing:
                cache.demote(entry)
        if slot is not None:
            cache.restore(slot)
