"""What file tiers found when they were opened, made entries again: cold ones.

A tier decides by its own log what may be believed after the way the process ended. Here only the
tiers are held against each other: of two values of one key the newer counts, wherever it is.
"""

import logging
from collections.abc import Container, Sequence

from respkv.engine.burials import Unburied
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry
from respkv.engine.lineage import pack_lineage, take_lineage
from respkv.engine.notes import Note
from respkv.engine.tier import Tier
from respkv.page import part_of
from respkv.tiers.meta import is_content_addressed
from respkv.tiers.record import Meta, Record

logger = logging.getLogger(__name__)


class Restore:
    """The entries of a cache that was empty, as tiers offer them.

    stale: numbers of tiers that were left out of the last run. What ended in it they do not know,
           so of theirs only values that no other can have replaced are taken.
    """

    def __init__(self, cache: Cache, tiers: Sequence[Tier], stale: Container[int] = ()) -> None:
        self._cache = cache
        self._tiers = tiers
        self._stale = stale
        self._losers: dict[bytes, Unburied] = {}  # older values, which logs have to forget
        self._ended: dict[bytes, int] = {}  # generations of values whose time is over
        self._differing: list[tuple[Entry, Record]] = []  # copies described as they are not

    def found(self, tier: int, meta: Meta, record: Record) -> bool:
        """Take a copy; False when it is not wanted: its time is over, or there is a newer value."""
        cache = self._cache
        record.tier = tier
        if tier in self._stale and not is_content_addressed(meta.key, meta.kind):
            self._reject(meta, record)
            self._tiers[tier].stats.stale += 1
            return False
        entry = cache.entries.get(meta.key)
        if 0 < meta.expires_ms <= cache.clock.wall_ms:
            self._reject(meta, record)
            self._ended[meta.key] = max(meta.generation, self._ended.get(meta.key, 0))
            if entry is not None and entry.generation < meta.generation:
                self._forget(entry)
            return False
        newest = max(self._ended.get(meta.key, 0), 0 if entry is None else entry.generation)
        if newest > meta.generation or (entry is None and self._is_full()):
            self._reject(meta, record)
            return False
        is_newer = entry is None or entry.generation != meta.generation
        if entry is None:
            entry = Entry(meta.key, meta.kind, meta.payload_bytes, cache.clock.now)
            cache.index.insert(entry)
            cache.copies.demoted(entry)
        elif is_newer:
            self._detach(entry)
        self._attach(entry, record)
        if is_newer:
            self._describe(entry, meta)
        elif meta.level and not _says(meta, entry):
            self._differing.append((entry, record))
        return True

    def bury(self) -> None:
        """Have the logs forget what is not wanted, when all of them have been read.

        What was told to one log alone would otherwise come back when the newer value has ended, or
        with another TTL when the copy that was believed has gone.
        """
        copies = self._cache.copies
        for entry, record in self._differing:
            if record in entry.records:
                copies.change(copies.meta(entry, record), record.tier, entry.level, Note())
        self._differing.clear()
        for key, what in self._losers.items():
            copies.suspect(key, what)
            copies.bury(key, set(), 0, what.level, waits=False)
        self._losers.clear()
        self._ended.clear()

    def tell(self) -> None:
        """Log what was not taken, and why."""
        for tier in self._tiers:
            if tier.stats.stale:
                logger.warning(
                    "tier %s was left out of the last run: %d values that may be old are dropped",
                    tier.name,
                    tier.stats.stale,
                )

    def finish(self) -> None:
        """Tell pages their namespaces, when the schemas are known."""
        cache = self._cache
        for name in cache.namespaces.names():
            schema = cache.namespaces.find(name)
            largest = cache.slabs.payload_bytes_max  # memory may be smaller than it was
            for nbytes in () if schema is None else schema.piece_sizes:
                if nbytes <= largest:
                    cache.slabs.add_class(nbytes)
        for entry in cache.entries.values():
            if entry.kind == "kvpage":
                schema = cache.namespaces.of_key(entry.key)
                entry.namespace = b"" if schema is None else schema.namespace
                cache.watchers.restored(entry)
            elif entry.pinned_until:
                cache.pins.note(entry)

    def _is_full(self) -> bool:
        copies = self._cache.copies
        if copies.num_cold >= copies.cold_max:
            self._cache.forget_cold()
        return copies.num_cold >= copies.cold_max

    def _reject(self, meta: Meta, record: Record) -> None:
        if meta.level and not is_content_addressed(meta.key, meta.kind):
            what = Unburied({record.tier: meta.generation}, meta.level)
            left = self._losers.get(meta.key)
            self._losers[meta.key] = what if left is None else what.merged(left)

    def _attach(self, entry: Entry, record: Record) -> None:
        record.owner = entry
        entry.records = tuple(sorted([*entry.records, record], key=lambda each: each.tier))
        self._cache.copies.num_records += 1

    def _detach(self, entry: Entry) -> None:
        """Give up the copies of a value that is not the newest of its key."""
        records, entry.records = entry.records, ()
        for record in records:
            self._reject(self._cache.copies.meta(entry, record), record)
            self._tiers[record.tier].free(record)
        self._cache.copies.num_records -= len(records)

    def _forget(self, entry: Entry) -> None:
        self._detach(entry)
        self._cache.copies.raised(entry)
        self._cache.index.remove(entry)

    def _describe(self, entry: Entry, meta: Meta) -> None:
        cache = self._cache
        now, wall_ms = cache.clock.now, cache.clock.wall_ms
        entry.kind, entry.nbytes = meta.kind, meta.payload_bytes
        entry.generation, entry.level = meta.generation, meta.level
        take_lineage(entry, meta.more)
        entry.priority, entry.tokens, entry.hits = meta.priority, meta.tokens, meta.hits
        idle_ms = max(0, wall_ms - meta.touched_ms) if meta.touched_ms else 0
        entry.touched = entry.born = now - idle_ms / 1000
        entry.pinned_until = now + (meta.pinned_ms - wall_ms) / 1000 if meta.pinned_ms else 0.0
        if meta.expires_ms != entry.expires_ms:
            cache.index.expire_at(entry, meta.expires_ms)
        entry.part = part_of(entry.key) if entry.kind == "kvpage" else None
        if meta.parent != entry.parent_key:
            cache.index.link(entry, meta.parent)


def _says(meta: Meta, entry: Entry) -> bool:
    """Say whether a copy is described as its value is: with its TTL, priority and place."""
    there = meta.expires_ms, meta.priority, meta.parent, meta.more
    return there == (entry.expires_ms, entry.priority, entry.parent_key, pack_lineage(entry))
