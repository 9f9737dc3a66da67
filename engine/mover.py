"""The mover: copies between memory and file tiers, made beside the commands.

It writes dirty values (cleaner.py), reads cold ones (loads.py), and tells the tiers what to do with
copies whose place they reclaim (descent.py). It works on the cache as the janitor does, between
commands. It asks the tiers' actors and nobody asks it, so there is no circle of waits.
"""

import logging
from collections.abc import Iterable, Sequence

import anyio
from anyio.abc import TaskGroup

from respkv.engine.actor import Actor
from respkv.engine.cache import Cache
from respkv.engine.cleaner import Cleaner
from respkv.engine.copies import RECORD_BYTES
from respkv.engine.demotions import Demotions
from respkv.engine.descent import Descent
from respkv.engine.entry import ENTRY_BYTES, Entry
from respkv.engine.loads import Loader
from respkv.engine.messages import ClearTier, SettleNotes
from respkv.engine.notes import Settle
from respkv.engine.placement import (
    MoveSettings,
    drain_order,
)
from respkv.engine.tier import Tier
from respkv.errors import CacheError, TierError
from respkv.tiers.record import Level, Record

logger = logging.getLogger(__name__)

DRAIN_LOOK_S = 0.2
LOOK_S = 1.0  # a tier that works again says so to nobody
COLD_MIN = 250_000  # entries in files alone that are known in any case, in about 200 MiB
IDLE_BYTES = 64 << 20  # that are cleaned in such a time in which nothing was put


class Mover:
    """The copies of a cache's values in ``tiers``, fastest first; ``actors`` are theirs."""

    def __init__(
        self, cache: Cache, tiers: Sequence[Tier], actors: list[Actor], settings: MoveSettings
    ) -> None:
        self.tiers = list(tiers)
        self.loader = Loader(cache, actors, settings)
        self.start_load = self.loader.start
        self.release = self.loader.release
        self.read_stored = self.loader.read_stored
        self.advise_prefetch = self.loader.advise
        self._cache = cache
        self._copies = cache.copies
        self._actors = actors
        self._tasks: TaskGroup | None = None
        self._wake = anyio.Event()
        self._ended = anyio.Event()
        self._done = anyio.Event()  # set, and replaced, when a write has ended
        self._paused = 0
        self._next_look = 0.0
        self._num_queued = 0
        self._descent = Descent(cache, self.tiers, actors)
        self._epochs = self._descent.epochs
        self._cleaner = Cleaner(
            cache, self.tiers, actors, self.loader, self._epochs, self._note_written
        )
        self.demotions = Demotions(cache)
        self.settings = settings
        share = cache.slabs.budget_bytes // 2 // (ENTRY_BYTES + RECORD_BYTES)
        self._copies.cold_max = max(COLD_MIN, share)

    @property
    def settings(self) -> MoveSettings:
        """How values move; may be replaced at any time."""
        return self._settings

    @settings.setter
    def settings(self, settings: MoveSettings) -> None:
        self._settings = self.loader.settings = self._cleaner.settings = settings
        self._set_marks()
        self.poke()

    def hook(self) -> None:
        """Give the tiers their hooks, before they start."""
        self._descent.hook()

    # -- asked by sessions --------------------------------------------------------------------

    def tier_of(self, record: Record) -> Tier:
        """Return the tier that a record is in."""
        return self.tiers[record.tier]

    def load_us(self, entries: Iterable[Entry]) -> int:
        """Estimate how long reading the cold ones among entries takes."""
        nbytes = [0] * len(self.tiers)
        for entry in entries:
            if entry.is_cold:
                nbytes[entry.records[0].tier] += entry.nbytes
        return max(
            (tier.load_us(n) for tier, n in zip(self.tiers, nbytes, strict=True) if n), default=0
        )

    async def settle(self, ticket: int, since: int | None = None) -> None:
        """Wait until everything noted after ``since`` up to ``ticket`` holds.

        since: the ticket before; None: ``ticket`` alone is meant.
        Raises TierError when one of them will not.
        """
        numbers = range(ticket if since is None else since + 1, ticket + 1)
        notes = [(number, self._copies.find(number)) for number in numbers]
        error = ""
        for number, note in notes:
            if note is not None and note.todo:
                ended = anyio.Event()
                note.waiters.append(ended.set)
                await ended.wait()
            error = error or (note.error if note is not None else self._copies.failure(number))
        if error:
            raise TierError(error)

    async def flush_all(self) -> None:
        """Forget everything, in memory and in files.

        Raises TierError when a tier could not; it is forgotten in memory all the same.
        """
        self._paused += 1
        try:
            self._cache.flush(frees=False)
            while (
                self._cleaner.num_writes
            ):  # or what is being written now would be there after a restart
                await self._done.wait()
            errors = []
            for number, actor in enumerate(self._actors):
                generation = self._cache.slabs.next_generation()
                try:
                    await actor.ask(ClearTier())
                except CacheError as error:
                    errors.append(str(error))
                else:
                    self._copies.emptied(number, generation)
            if errors:
                raise TierError("; ".join(errors))
        finally:
            self._paused -= 1
            self.poke()

    async def drain(self, seconds: float) -> None:
        """Write what has no copy in a file, for so long at most."""
        self._copies.recall()
        dirty = [*self._copies.dirty_large, *self._copies.dirty_small]
        order = drain_order(dirty, self._cache.clock.now)
        for entry in order:
            self._copies.dirty_of(entry).move_to_end(entry)
        self._cleaner.is_draining = True
        try:
            with anyio.move_on_after(seconds):
                while self._copies.can_write and (
                    self._copies.num_dirty or self._cleaner.num_writes or self._copies.urgent
                ):
                    self.poke()
                    with anyio.move_on_after(DRAIN_LOOK_S):
                        await self._done.wait()
        finally:
            self._cleaner.is_draining = False
        left = self._copies.num_dirty
        if left:
            logger.warning(
                "%d values are in no file and are lost: %s", left, self._cleaner.why_not()
            )

    # -- work ---------------------------------------------------------------------------------

    def poke(self) -> None:
        """Look for work."""
        self._wake.set()

    async def run(self) -> None:
        """Move values until cancelled; what is being written then is written first."""
        self._copies.on_work = self.poke
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                self.loader.run_in(tasks)
                self._cleaner.run_in(tasks)
                while True:
                    self._wake = anyio.Event()
                    self._look()
                    with anyio.move_on_after(LOOK_S):
                        await self._wake.wait()
        finally:
            self._tasks = None
            self.loader.stop()
            self._ended.set()

    async def stop(self) -> None:
        """End ``run``; what is being written or read then is finished first."""
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()
            await self._ended.wait()

    def _look(self) -> None:
        self._set_marks()
        self._settle_notes()
        if not self._paused:
            self._look_at_times()
            self.demotions.look()
            self._cleaner.look()

    def _look_at_times(self) -> None:
        """Do what is done once in a while: clean while nothing is put, bury what could not be."""
        now = anyio.current_time()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        is_idle = self._num_queued == self._copies.num_queued
        self._num_queued = self._copies.num_queued
        self._cleaner.idle_bytes = IDLE_BYTES if is_idle else 0
        self._copies.bury_again(self._cache.entries)

    def _set_marks(self) -> None:
        high, low = (
            self._settings.dirty_high,
            min(self._settings.dirty_low, self._settings.dirty_high),
        )
        self._copies.marks.set(self._cache.slabs.budget_bytes, high, low)
        self._copies.small_marks.set(self._cache.room.small_max, high, low)

    def _settle_notes(self) -> None:
        waves: dict[tuple[int, Level], list[Settle]] = {}
        settles, self._copies.settles = self._copies.settles, []
        for settle in settles:
            waves.setdefault((settle.tier, settle.level), []).append(settle)
        assert self._tasks is not None
        for wave in waves.values():
            self._tasks.start_soon(self._settle_wave, wave)

    async def _settle_wave(self, wave: list[Settle]) -> None:
        tier, _, level, _ = wave[0]
        tickets = [settle.ticket for settle in wave]
        errors = ["the file tiers are being closed"] * len(wave)
        try:
            errors = await self._actors[tier].ask(SettleNotes(tickets, level))
        except CacheError as failure:
            errors = [str(failure)] * len(wave)
        finally:
            for settle, error in zip(wave, errors, strict=True):
                settle.note.end(error)

    def _note_written(self) -> None:
        self._done.set()
        self._done = anyio.Event()
        self.poke()

    async def forget(self, tier: int) -> None:
        """Forget a tier's copies, because its state is suspect, and let it start empty."""
        self._epochs[tier] += 1
        self._copies.forget(tier, self._cache.entries.values())
        generation = self._cache.slabs.next_generation()
        await self.tiers[tier].reset()
        if self.tiers[tier].health.state == "ok":
            self._copies.emptied(tier, generation)
