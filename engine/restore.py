"""What file tiers found when they were opened, made entries again: cold ones.

A tier decides by its own log what may be believed after the way the process ended. Here only the
tiers are held against each other: of two values of one key the newer counts, wherever it is.
"""

from collections.abc import Sequence

from respkv.engine.cache import Cache
from respkv.engine.entry import Entry
from respkv.engine.tier import Tier
from respkv.tiers.record import Meta, Record


class Restore:
    """The entries of a cache that was empty, as tiers offer them."""

    def __init__(self, cache: Cache, tiers: Sequence[Tier]) -> None:
        self._cache = cache
        self._tiers = tiers

    def found(self, tier: int, meta: Meta, record: Record) -> bool:
        """Take a copy; False when it is not wanted: its time is over, or there is a newer value."""
        cache = self._cache
        record.tier = tier
        if 0 < meta.expires_ms <= cache.clock.wall_ms:
            return False
        entry = cache.entries.get(meta.key)
        if entry is not None and entry.generation > meta.generation:
            return False
        is_newer = entry is None or entry.generation != meta.generation
        if entry is None:
            if cache.copies.num_cold >= cache.copies.cold_max:
                cache.forget_cold()
            entry = Entry(meta.key, meta.kind, meta.payload_bytes, cache.clock.now)
            record.owner = entry
            entry.records = (record,)
            cache.copies.num_records += 1
            cache.index.insert(entry)
            cache.copies.demoted(entry)
        else:
            record.owner = entry
            cache.copies.attach(entry, record)  # frees those of older values
        if is_newer and entry.position >= 0:
            self._describe(entry, meta)
        return record in entry.records

    def finish(self) -> None:
        """Tell pages their namespaces, when the schemas are known."""
        cache = self._cache
        for name in cache.namespaces.names():
            schema = cache.namespaces.find(name)
            largest = cache.slabs.payload_bytes_max  # memory may be smaller than it was
            if schema is not None and schema.geometry.page_bytes <= largest:
                cache.slabs.add_class(schema.geometry.page_bytes)
        for entry in cache.entries.values():
            if entry.kind == "kvpage":
                schema = cache.namespaces.of_key(entry.key)
                entry.namespace = b"" if schema is None else schema.namespace

    def _describe(self, entry: Entry, meta: Meta) -> None:
        cache = self._cache
        now, wall_ms = cache.clock.now, cache.clock.wall_ms
        entry.kind, entry.nbytes = meta.kind, meta.payload_bytes
        entry.generation, entry.level = meta.generation, meta.level
        entry.priority, entry.tokens, entry.hits = meta.priority, meta.tokens, meta.hits
        idle_ms = max(0, wall_ms - meta.touched_ms) if meta.touched_ms else 0
        entry.touched = entry.born = now - idle_ms / 1000
        entry.pinned_until = now + (meta.pinned_ms - wall_ms) / 1000 if meta.pinned_ms else 0.0
        if meta.expires_ms != entry.expires_ms:
            cache.index.expire_at(entry, meta.expires_ms)
        if meta.parent != entry.parent_key:
            cache.index.link(entry, meta.parent)
