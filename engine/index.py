"""Which keys are resident: lookup, scanning, expiry order, and the links between pages.

One event loop makes every synchronous method atomic, so this is a plain object without locks.

``entries`` is a dict, because a lookup is the hot path. SCAN needs more: every entry also has a
position in ``_table`` that it keeps for life, so a cursor is a position, needs no state on the
server, and meets every key that was there throughout exactly once. Redis reaches the same promise
by iterating hash buckets in reverse binary order; a position is simpler and cheaper here.

TTLs wait in a heap and are looked at when due. An entry whose TTL changed leaves its old ticket
behind; such tickets are recognised when they surface and swept when they outnumber the entries.

A page may be put before its parent (workers write in parallel). It then waits in ``_orphans`` and
is adopted when the parent comes.
"""

import heapq
from collections.abc import Iterator

from respkv.engine.entry import Entry

_HEAP_SLACK = 1024


class Index:
    """The resident entries by key."""

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self._table: list[Entry | None] = []
        self._free: list[int] = []
        self._orphans: dict[bytes, set[Entry]] = {}
        self._expiry: list[tuple[int, int, Entry]] = []
        self._ticket = 0
        self.num_volatile = 0  # entries with a TTL
        self.has_parts = False  # a page has, or had, a part

    def __len__(self) -> int:
        return len(self.entries)

    def insert(self, entry: Entry) -> None:
        """Make an entry visible. Its key must be absent."""
        assert entry.key not in self.entries
        assert entry.position < 0
        self.entries[entry.key] = entry
        if self._free:
            entry.position = self._free.pop()
            self._table[entry.position] = entry
        else:
            entry.position = len(self._table)
            self._table.append(entry)
        if self._orphans:
            self._adopt(entry)

    def remove(self, entry: Entry) -> Entry | None:
        """Forget an entry; return its parent if that has become a leaf."""
        del self.entries[entry.key]
        self._table[entry.position] = None
        self._free.append(entry.position)
        entry.position = -1
        if entry.expires_ms:
            entry.expires_ms = 0
            self.num_volatile -= 1
        if not self.entries:
            self._table.clear()
            self._free.clear()
        for each in *(entry.children or ()), *(entry.parts or ()):
            each.parent = None
            self._orphans.setdefault(entry.key, set()).add(each)
        entry.children = entry.parts = None
        return self._unlink(entry)

    def is_circle(self, entry: Entry, parent_key: bytes) -> bool:
        """Whether an entry would stand behind itself if it were put behind ``parent_key``."""
        if parent_key == entry.key:
            return True
        if not entry.children and not entry.parts:
            return False
        ancestor = self.entries.get(parent_key)
        while ancestor is not None and ancestor is not entry:
            ancestor = ancestor.parent
        return ancestor is entry

    def link(self, entry: Entry, parent_key: bytes) -> Entry | None:
        """Put a resident entry behind its parent; return its old parent if now a leaf.

        A link that would close a circle is not made: nothing in it could ever be evicted.
        """
        if parent_key == entry.parent_key or self.is_circle(entry, parent_key):
            return None
        parent = self.entries.get(parent_key) if parent_key else None  # a string may have no name
        leaf = self._unlink(entry)
        entry.parent_key = parent_key
        if parent is not None:
            self._attach(entry, parent)
        elif parent_key:
            self._orphans.setdefault(parent_key, set()).add(entry)
        return leaf if leaf is not parent else None

    def expire_at(self, entry: Entry, wall_ms: int) -> None:
        """Give an entry a TTL that ends at ``wall_ms``; 0 takes its TTL away."""
        self.num_volatile += bool(wall_ms) - bool(entry.expires_ms)
        entry.expires_ms = wall_ms
        if wall_ms:
            self._ticket += 1
            heapq.heappush(self._expiry, (wall_ms, self._ticket, entry))
            if len(self._expiry) > 2 * self.num_volatile + _HEAP_SLACK:
                self._sweep()

    def due(self, wall_ms: int, count_max: int) -> Iterator[Entry]:
        """Yield up to ``count_max`` entries whose TTL has ended; the caller removes each."""
        heap = self._expiry
        while heap and heap[0][0] <= wall_ms and count_max > 0:
            expires_ms, _, entry = heapq.heappop(heap)
            if entry.position >= 0 and entry.expires_ms == expires_ms:
                count_max -= 1
                yield entry

    def scan(self, cursor: int, count: int) -> tuple[int, list[Entry]]:
        """Return the next cursor (0: done) and the entries at the next ``count`` positions."""
        stop = cursor + count
        found = [entry for entry in self._table[cursor:stop] if entry is not None]
        return (stop if stop < len(self._table) else 0), found

    def at(self, position: int) -> Entry | None:
        """Return the entry at a position modulo the table, or None. For random choice."""
        return self._table[position % len(self._table)] if self._table else None

    def clear(self) -> list[Entry]:
        """Forget everything; return what was resident."""
        removed = list(self.entries.values())
        for entry in removed:
            entry.position = -1
            entry.expires_ms = 0
            entry.parent = entry.children = entry.parts = None
        self.entries.clear()
        self._table.clear()
        self._free.clear()
        self._orphans.clear()
        self._expiry.clear()
        self.num_volatile = 0
        return removed

    def check(self) -> None:
        """Assert that dict, table, links and TTLs agree."""
        assert len(self._table) - len(self._free) == len(self.entries)
        waiting = {entry for orphans in self._orphans.values() for entry in orphans}
        tickets = {(entry, expires_ms) for expires_ms, _, entry in self._expiry}
        volatile = 0
        for key, entry in self.entries.items():
            assert entry.key == key
            assert self._table[entry.position] is entry
            if entry.parent is not None:
                assert self.entries[entry.parent_key] is entry.parent
                assert entry in (_siblings(entry, entry.parent) or ())
            assert (entry in waiting) == bool(entry.parent_key and entry.parent is None)
            for each in *(entry.children or ()), *(entry.parts or ()):
                assert each.parent is entry
            if entry.expires_ms:
                volatile += 1
                assert (entry, entry.expires_ms) in tickets
        assert volatile == self.num_volatile
        for parent_key, orphans in self._orphans.items():
            assert orphans
            assert parent_key not in self.entries
            assert all(self.entries[orphan.key] is orphan for orphan in orphans)

    def _adopt(self, entry: Entry) -> None:
        for orphan in self._orphans.pop(entry.key, ()):
            self._attach(orphan, entry)

    def _attach(self, entry: Entry, parent: Entry) -> None:
        entry.parent = parent
        if entry.part is not None:
            if parent.parts is None:
                parent.parts = set()
            parent.parts.add(entry)
            self.has_parts = True
            return
        if parent.children is None:
            parent.children = set()
        parent.children.add(entry)

    def _unlink(self, entry: Entry) -> Entry | None:
        parent_key, entry.parent_key = entry.parent_key, b""
        parent, entry.parent = entry.parent, None
        if parent is not None:
            siblings = _siblings(entry, parent)
            assert siblings is not None
            siblings.discard(entry)
            if siblings:
                return None
            if entry.part is not None:
                parent.parts = None
                return None
            parent.children = None
            return parent
        elif parent_key:
            waiting = self._orphans[parent_key]
            waiting.discard(entry)
            if not waiting:
                del self._orphans[parent_key]
        return None

    def _sweep(self) -> None:
        self._expiry = [
            ticket
            for ticket in self._expiry
            if ticket[2].position >= 0 and ticket[2].expires_ms == ticket[0]
        ]
        heapq.heapify(self._expiry)


def _siblings(entry: Entry, parent: Entry) -> set[Entry] | None:
    return parent.children if entry.part is None else parent.parts
