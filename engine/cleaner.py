"""Writing values to file tiers: what clients wait for at once, the rest ahead of eviction.

Dirty values are written when there are many of them, oldest first, in batches; one that was used
since it became dirty gets a second chance, because it will stay in memory and may change again.
While a value is being written its slot is held; whether it still is the entry's value is looked at
in the turn in which the tier says that it has it.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

import anyio
from anyio.abc import TaskGroup

from respkv.engine.actor import Actor
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry
from respkv.engine.journeys import Dirt, Writing
from respkv.engine.loads import Loader
from respkv.engine.messages import WriteValues
from respkv.engine.placement import BATCH_BYTES_MAX, MoveSettings, choose_tier
from respkv.engine.tier import Tier
from respkv.errors import CacheError
from respkv.tiers.format import hash64, read_header
from respkv.tiers.record import Level, Record, Value
from respkv.tiers.slab import Slot

BATCH_VALUES_MAX = 2048
ARENA_SHARE = 4  # one in so many bytes of it may be on its way to files
CHANCES_MAX = 256  # values that a batch passes over because they were used
RETRY_S = 0.2


class Cleaner:
    """The writes of a cache.

    epochs:      of each tier, how often it was emptied.
    on_end:      called when a write has ended.
    idle_bytes:  so much more is to be written, because there is nothing else to do.
    is_draining: everything is to be written, whatever the watermarks say.
    """

    def __init__(
        self,
        cache: Cache,
        tiers: list[Tier],
        actors: list[Actor],
        loader: Loader,
        epochs: list[int],
        on_end: Callable[[], None],
    ) -> None:
        self.settings = MoveSettings()
        self.is_draining = False
        self.idle_bytes = 0
        self.num_writes = 0
        self.tiers = tiers
        self._cache = cache
        self._copies = cache.copies
        self._actors = actors
        self._loader = loader
        self._epochs = epochs
        self._on_end = on_end
        self._tasks: TaskGroup | None = None
        self._write_bytes = 0
        self._retry_at = [0.0] * len(tiers)
        self._raising: set[Entry] = set()

    def run_in(self, tasks: TaskGroup) -> None:
        """Write in tasks of this group from now on."""
        self._tasks = tasks

    def look(self) -> None:
        """Start writing what is due."""
        if self._tasks is not None:
            self._write_urgent()
            self._write_dirty()

    def _write_urgent(self) -> None:
        """Start writing what clients wait for; what is cold has to be read first."""
        groups: dict[tuple[int, Level], list[Entry]] = {}
        for entry in list(self._copies.urgent):
            if entry in self._copies.writing:
                continue  # again when that has ended
            if entry.is_cold:
                self._raise_urgent(entry)
                continue
            tier = choose_tier(self.tiers, entry.nbytes)
            if tier is None:
                self._copies.refuse(entry, f"not written: {self.why_not(entry.nbytes)}")
            else:
                groups.setdefault((tier, entry.level), []).append(entry)
        for (tier, level), entries in groups.items():
            self._start_write(tier, entries, level)

    def _raise_urgent(self, entry: Entry) -> None:
        assert self._tasks is not None
        if entry not in self._raising:
            self._raising.add(entry)
            self._tasks.start_soon(self._raise, entry)

    async def _raise(self, entry: Entry) -> None:
        load = self._loader.start(entry)
        try:
            await load.wait()
            if load.error is not None and entry in self._copies.urgent:
                self._copies.refuse(entry, str(load.error))
            self._write_urgent()
        finally:
            self._raising.discard(entry)
            self._loader.release(load)

    def why_not(self, nbytes: int = 0) -> str:
        """Say why no tier takes a value of this size now."""
        healths = [
            f"{tier.name} is {tier.health.state}"
            + (f" ({tier.health.reason})" if tier.health.reason else "")
            for tier in self.tiers
            if tier.health.state != "ok"
        ]
        sizes = [
            f"{tier.name} takes values of at most {tier.payload_bytes_max} bytes, not {nbytes}"
            for tier in self.tiers
            if tier.health.state == "ok" and nbytes > tier.payload_bytes_max
        ]
        return "; ".join([*healths, *sizes]) or "there was no time"

    def _write_dirty(self) -> None:
        """Start writing as much as the watermarks ask for and may be on its way at a time."""
        # What is being written cannot be evicted: the rest must do for those who need room.
        share = self._cache.slabs.budget_bytes // ARENA_SHARE
        limit = min(self.settings.move_bytes_max, share)
        while self._write_bytes < limit:
            num_refused = self._copies.admission.num_refused
            batches = self._next_batches(limit - self._write_bytes)
            if not batches:
                if self._copies.admission.num_refused != num_refused:
                    self._copies.on_work()  # there may be more, and others have their turn
                return
            for tier, entries in batches.items():
                self._start_write(tier, entries, Level.MEMORY)

    def _next_batches(self, limit: int) -> dict[int, list[Entry]]:
        """Choose the next dirty values to write, by tier."""
        copies = self._copies
        large, small = copies.queued_bytes, copies.queued_small_bytes
        wanted = copies.marks.excess(large), copies.small_marks.excess(small)
        left = (
            max(wanted[0], copies.hurried_bytes, self.idle_bytes),
            max(wanted[1], self.idle_bytes),
        )
        if self.is_draining:
            left = large, small
        batches: dict[int, list[Entry]] = {}
        self._choose(copies.dirty_large, min(left[0], limit, BATCH_BYTES_MAX), batches)
        self._choose(copies.dirty_small, min(left[1], limit, BATCH_BYTES_MAX), batches)
        return batches

    def _choose(
        self, dirty: OrderedDict[Entry, Dirt], limit: int, batches: dict[int, list[Entry]]
    ) -> None:
        """Add the oldest of a queue to the batches, ``limit`` bytes of them."""
        count = chances = 0
        now = anyio.current_time()
        looked_at = islice(dirty.items(), BATCH_VALUES_MAX + CHANCES_MAX) if limit > 0 else ()
        for entry, dirt in list(looked_at):
            if limit <= 0 or count == BATCH_VALUES_MAX:
                break
            if entry in self._copies.urgent:
                continue
            if 0 <= dirt.touched < entry.touched and chances < CHANCES_MAX and not self.is_draining:
                chances += 1
                dirty[entry] = dirt._replace(touched=entry.touched)
                dirty.move_to_end(entry)
                continue
            if not self.is_draining and not self._copies.admission.admits(entry):
                self._copies.leave_out(entry)
                self._copies.requeue(entry)
                limit -= dirt.nbytes
                count += 1
                continue
            tier = choose_tier(self.tiers, entry.nbytes)
            if tier is None or self._retry_at[tier] > now:
                continue
            self._copies.admission.note(dirt.nbytes, is_admitted=True)
            batches.setdefault(tier, []).append(entry)
            limit -= dirt.nbytes
            self.idle_bytes = max(0, self.idle_bytes - dirt.nbytes)
            count += 1

    def _start_write(
        self, tier: int, entries: list[Entry], level: Level, *, is_again: bool = False
    ) -> None:
        """Take values out of their queues and start writing them."""
        values: list[Value] = []
        writings: list[Writing] = []
        slots: dict[Writing, Slot] = {}
        for entry in entries:
            self._copies.take_along(entry)
            value, slot = self._value_of(entry, level)
            writing = self._copies.begin_write(entry, tier, level, value.meta.generation)
            writing.is_again = is_again
            if slot is not None:
                self._cache.borrow(slot)
                slots[writing] = slot
            values.append(value)
            writings.append(writing)
        assert self._tasks is not None
        nbytes = sum(value.meta.payload_bytes for value in values)
        self._write_bytes += nbytes
        self.num_writes += 1
        self._tasks.start_soon(self._write, tier, values, writings, slots, level, nbytes)

    def _value_of(self, entry: Entry, level: Level) -> tuple[Value, Slot | None]:
        """Describe a value in memory for writing; a small one gets its generation now."""
        cache, slot = self._cache, entry.slot
        if slot is None:
            assert entry.value is not None
            generation, checksum = cache.slabs.next_generation(), hash64(entry.value)
            payload, image = memoryview(entry.value), None
        else:
            if read_header(cache.header(slot)).generation != entry.generation:
                cache.renew(entry)
            generation, checksum = entry.generation, read_header(cache.header(slot)).checksum
            payload, image = cache.payload(slot), cache.image(slot)
        meta = self._copies.describe(entry, checksum, generation, level)
        return Value(meta, payload, image, entry), slot

    async def _write(
        self,
        tier: int,
        values: list[Value],
        writings: list[Writing],
        slots: dict[Writing, Slot],
        level: Level,
        nbytes: int,
    ) -> None:
        """Write values and attach their records; try the next tier with what a client waits for."""
        epoch, todo = self._epochs[tier], dict.fromkeys(writings)

        def attach(records: list[Record | None]) -> None:
            for writing, record in zip(writings, records, strict=True):
                if record is not None and epoch == self._epochs[tier]:
                    del todo[writing]
                    if writing in slots:
                        self._cache.restore(slots.pop(writing))
                    self._copies.end_write(writing, record)
                    if record.is_gone:
                        self._copies.detach(record, "evicted")
                    self._cache.stats.written_behind_bytes += record.payload_bytes

        reason = f"{self.tiers[tier].name}: the value could not be written"

        def is_wanted(number: int) -> bool:
            return not writings[number].is_void

        try:
            with anyio.CancelScope(shield=True):
                await self._actors[tier].ask(WriteValues(values, level, is_wanted, attach))
        except CacheError as error:
            reason = str(error)
        finally:
            for writing in todo:
                self._copies.end_write(writing, None)
                self._retry(writing, reason)
            for slot in slots.values():
                self._cache.restore(slot)
            if todo:
                self._retry_at[tier] = anyio.current_time() + RETRY_S
            self._write_bytes -= nbytes
            self.num_writes -= 1
            self._on_end()

    def _retry(self, writing: Writing, reason: str) -> None:
        """Try the next tier for those who wait for a value, or tell them that it failed."""
        entry = writing.entry
        if writing.is_void:
            self._copies.hand_on(writing)
            return
        if not writing.notes and not writing.level:
            return
        self._copies.doubt(writing)
        # A tier that is well may have had no room for a moment.
        first = writing.tier + writing.is_again
        following = choose_tier(self.tiers, entry.nbytes, first)
        if following is None or entry.is_cold:
            self._copies.fail(writing, reason)
            return
        self._copies.urgent.setdefault(entry, []).extend(writing.notes)
        is_again = following == writing.tier
        self._start_write(following, [entry], entry.level, is_again=is_again)
