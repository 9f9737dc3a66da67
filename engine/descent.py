"""What becomes of copies whose place in a file is reclaimed: kept, moved down, or given up.

These are the hooks of the file tiers. A tier asks which records of a segment are worth writing
again, offers those that are not to the next slower tier, and says which have gone.
"""

import logging
from functools import partial
from itertools import islice
from typing import NamedTuple

import anyio

from respkv.engine.actor import Actor
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry
from respkv.engine.history import Reason
from respkv.engine.journeys import Move
from respkv.engine.messages import WriteValues
from respkv.engine.nodes import descendants, page_of
from respkv.engine.placement import BATCH_BYTES_MAX, Ages, choose_tier, idle_s
from respkv.engine.tier import Tier
from respkv.errors import CacheError
from respkv.tiers.record import Level, Meta, Record, Value

LIVE_PERCENT = 50  # of a tier; nothing is dropped while it holds less
RELATIVES_MAX = 256  # pages behind one that are looked at before it is dropped
LOAD_LOOK_S = 0.005
PATIENCE_S, PAUSE_S = 5.0, 10.0  # a tier that hangs does not take the one above it along
logger = logging.getLogger(__name__)

_REASONS: dict[str, Reason] = {"evicted": "evicted", "corrupt": "corrupt"}


class Leaving(NamedTuple):
    """A copy that is about to go, and what was read of it, which is not what was put if its codec
    loses something."""

    record: Record
    payload: bytearray
    checksum: int


class Descent:
    """The way down from one tier to the next.

    epochs: of each tier, how often it was emptied; what was begun before that does not count.
    """

    def __init__(self, cache: Cache, tiers: list[Tier], actors: list[Actor]) -> None:
        self.tiers = tiers
        self.epochs = [0] * len(tiers)
        self.ages = [Ages() for _ in tiers]
        self._not_before = [0.0] * len(tiers)
        self._cache = cache
        self._actors = actors

    def hook(self) -> None:
        """Give the tiers their hooks, before they start."""
        for number, tier in enumerate(self.tiers):
            tier.describe = self._describe
            tier.keep = partial(self._keep, number)
            tier.leave = partial(self._leave, number)
            tier.release = self._release
            tier.dropped = self._dropped
            tier.generation = self._cache.slabs.next_generation

    def _describe(self, record: Record) -> Meta:
        return self._cache.copies.meta(record.owner, record)

    def _dropped(self, record: Record, why: str) -> None:
        self._cache.copies.detach(record, _REASONS.get(why, "lost"))

    def _release(self, record: Record) -> bool:
        """Whether a log may be told now to forget a copy, or a copy may go."""
        copies, entry = self._cache.copies, record.owner
        if copies.is_awaited(entry):
            return False  # what is written has its generation, and may be read from it
        if record.level and entry not in copies.ghosts:
            entry.generation = 0  # the log forgets it, so it is written under another one
        return True

    def _keep(self, tier: int, record: Record) -> bool:
        """Whether a copy is to live on when its segment is reclaimed."""
        entry: Entry = record.owner
        if entry in self._cache.copies.ghosts:
            return True  # it goes when the value after it is written
        if entry is None or record not in entry.records or entry.records[-1] is not record:
            return False  # a slower tier has it too
        if self._has_room(self.tiers[tier]):
            return True
        is_promised = entry.held_until > self._cache.clock.now
        if is_promised or self._cache.room.is_held(entry) or (entry.level and not entry.is_cold):
            return True
        page, now = page_of(entry), self._cache.clock.now
        if page is not entry and self._must_stay(page):
            return True
        if any(self._must_stay(each) for each in islice(descendants(page), RELATIVES_MAX)):
            return True
        idle = min(idle_s(entry, now), idle_s(page, now))
        return self.ages[tier].is_worth_keeping(idle, has_level=entry.level > 0)

    @staticmethod
    def _has_room(tier: Tier) -> bool:
        """Whether all that lives in a tier fits, with enough to spare for reclaim to end."""
        return tier.stats.live_bytes * 100 < tier.capacity_bytes * LIVE_PERCENT

    def _must_stay(self, entry: Entry) -> bool:
        is_promised = entry.held_until > self._cache.clock.now
        return is_promised or entry.level > 0 or self._cache.room.is_held(entry)

    async def _leave(self, tier: int, records: list[Record]) -> None:
        """Copy what a tier is about to drop to a slower one."""
        with anyio.move_on_after(PATIENCE_S):
            await self._let_load(records)
        batch: list[Leaving] = []
        nbytes = 0
        ghosts = self._cache.copies.ghosts
        for record in records:
            entry: Entry = record.owner
            # What is being replaced is needed until the value after it is written.
            is_gone = entry.position < 0 and entry not in ghosts
            if is_gone or record not in entry.records or entry.records[-1] is not record:
                continue
            if self._next_tier(tier, record) is None:
                continue
            buffer = bytearray(record.payload_bytes)
            try:
                checksum = await self.tiers[tier].read(record, entry.key, memoryview(buffer), None)
            except CacheError:
                continue  # the tier has said what became of it
            batch.append(Leaving(record, buffer, checksum))
            nbytes += len(buffer)
            if nbytes >= BATCH_BYTES_MAX:
                await self._move_down(tier, batch)
                batch, nbytes = [], 0
        await self._move_down(tier, batch)

    async def _let_load(self, records: list[Record]) -> None:
        """Wait until memory has what is to be written again for those who wait for that.

        With its last copy gone, all that they could be told is that it failed.
        """
        urgent = self._cache.copies.urgent
        for record in records:
            entry: Entry = record.owner
            while entry.is_cold and entry in urgent and record in entry.records:  # noqa: ASYNC110
                await anyio.sleep(LOAD_LOOK_S)

    def _next_tier(self, tier: int, record: Record) -> int | None:
        to = choose_tier(self.tiers, record.payload_bytes, tier + 1)
        return None if to is None or self._not_before[to] > self._cache.clock.now else to

    async def _move_down(self, tier: int, batch: list[Leaving]) -> None:
        groups: dict[tuple[int, Level], list[Leaving]] = {}
        for leaving in batch:
            record = leaving.record
            to = self._next_tier(tier, record)
            if to is not None and record in record.owner.records:
                groups.setdefault((to, record.level), []).append(leaving)
        for (to, level), group in groups.items():
            await self._write_down(tier, to, level, group)

    async def _write_down(self, tier: int, to: int, level: Level, group: list[Leaving]) -> None:
        group = [each for each in group if each.record in each.record.owner.records]
        if not group:
            return
        copies, sources = self._cache.copies, [each.record for each in group]
        values = [self._value_of(each) for each in group]
        moves = [(value.owner, Move(to, value.meta.generation, level)) for value in values]
        for entry, move in moves:
            copies.moving.setdefault(entry, []).append(move)

        epoch, has_begun = self.epochs[to], False

        def is_wanted(number: int) -> bool:
            nonlocal has_begun
            has_begun = True
            source = sources[number]
            return source in source.owner.records

        def attach(records: list[Record | None]) -> None:
            self._attach_moved(to, epoch, sources, [move for _, move in moves], records)
            end()

        def end() -> None:
            for entry, move in moves:
                copies.end_move(entry, move)

        try:
            with anyio.move_on_after(PATIENCE_S) as scope:
                await self._actors[to].ask(WriteValues(values, level, is_wanted, attach))
            if scope.cancelled_caught:
                self._not_before[to] = self._cache.clock.now + PAUSE_S
                logger.warning(
                    "%s: %s is too slow to move copies to",
                    self.tiers[tier].name,
                    self.tiers[to].name,
                )
        except CacheError as error:
            logger.warning("%s: not moved down: %s", self.tiers[tier].name, error)
        finally:
            if not has_begun:  # else it goes on, however long that takes, and ends with attach
                end()

    def _value_of(self, leaving: Leaving) -> Value:
        source = leaving.record
        meta = self._describe(source)._replace(checksum=leaving.checksum)
        if not source.owner.generation:  # some log was told to forget the one that it has
            meta = meta._replace(generation=self._cache.slabs.next_generation())
        return Value(meta, memoryview(leaving.payload), None, source.owner)

    def _attach_moved(
        self,
        tier: int,
        epoch: int,
        sources: list[Record],
        moves: list[Move],
        records: list[Record | None],
    ) -> None:
        copies = self._cache.copies
        for source, move, record in zip(sources, moves, records, strict=True):
            entry: Entry = source.owner
            if record is None or record.is_gone or epoch != self.epochs[tier]:
                continue
            record.tier = tier
            if entry.position >= 0 and source in entry.records:
                copies.attach(entry, record)
                copies.catch_up(record, move)
                self._cache.stats.moved_down += 1
            elif copies.let_go(entry, record):
                copies.catch_up(record, move)
            else:
                copies.bury_copy(entry, record)
