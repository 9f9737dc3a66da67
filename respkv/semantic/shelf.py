"""What one process knows of a namespace's entries: all their keys, and the embeddings of the tenants
that it serves.

The store is the truth; this is a view of it that may lag behind, and is corrected by whatever shows
that it does: an event, a rescan, an entry that is not what the index says.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

from respkv.semantic.embeddings import Metric, Vector
from respkv.semantic.index import Index, Kind, open_index


@dataclass(slots=True)
class Known:
    """An entry whose embedding is in the index. digest: of the embedding."""

    digest: bytes
    created_ms: int


def digest_of(vector: Vector) -> bytes:
    """Return what tells embeddings apart."""
    return blake2b(vector.tobytes(), digest_size=16).digest()


class Shelf:
    """The entries of one tenant, in the order in which they were last used here, or else stored."""

    def __init__(self, index: Index, stale: Iterable[bytes]) -> None:
        self.index = index
        self.entries: OrderedDict[bytes, Known] = OrderedDict()
        # Entries of which something is not known: what they are in the store has to be read.
        self.stale: set[bytes] = set(stale)
        self.is_loaded = False  # all that were there at first have been read

    def put(self, entry: bytes, vector: Vector, created_ms: int) -> None:
        """Take note of an entry's embedding."""
        self.stale.discard(entry)
        known = self.entries.get(entry)
        digest = digest_of(vector)
        if known is None or known.digest != digest:
            self.index.put(entry, vector)
        self.entries[entry] = Known(digest, created_ms)
        if known is not None and known.created_ms != created_ms:
            self.entries.move_to_end(entry)

    def drop(self, entry: bytes) -> bool:
        """Forget an entry; say whether it was there."""
        self.stale.discard(entry)
        self.index.drop(entry)
        return self.entries.pop(entry, None) is not None

    def is_current(self, entry: bytes, vector: Vector) -> bool:
        """Whether this is the embedding that the index has for an entry."""
        known = self.entries.get(entry)
        return known is not None and known.digest == digest_of(vector)

    def use(self, entry: bytes) -> None:
        """Count an entry as used now."""
        if entry in self.entries:
            self.entries.move_to_end(entry)

    def order_by_age(self, own: Iterable[bytes]) -> None:
        """Put all entries in the order in which they were stored: of their use nothing is known.

        own: entries that were put here, oldest first. Of those of one millisecond they are the
        younger ones: what others had stored was there before.
        """
        for entry in own:
            self.use(entry)
        self.entries = OrderedDict(
            sorted(self.entries.items(), key=lambda each: each[1].created_ms)
        )

    def surplus(self, most: int, keep: bytes) -> list[bytes]:
        """Return which entries have to go so that ``most`` are left."""
        excess = len(self.entries) - most
        if excess <= 0:
            return []
        return list(islice((entry for entry in self.entries if entry != keep), excess))


@dataclass(slots=True)
class Shelves:
    """The entries of all tenants. At most ``tenants_max`` have their embeddings here."""

    dim: int
    metric: Metric
    kind: Kind
    tenants_max: int
    keys: dict[bytes, set[bytes]] = field(default_factory=dict)  # of entries, by tenant
    num_changes: int = 0  # told of by events and rescans
    _open: OrderedDict[bytes, Shelf] = field(default_factory=OrderedDict, init=False)

    def open(self, tenant: bytes) -> Shelf:
        """Return a tenant's shelf; the one that was asked for least recently may have to go."""
        shelf = self._open.get(tenant)
        if shelf is None:
            index = open_index(self.kind, self.dim, self.metric)
            shelf = self._open[tenant] = Shelf(index, self.keys.get(tenant, ()))
        self._open.move_to_end(tenant)
        while len(self._open) > self.tenants_max:
            self._open.popitem(last=False)
        return shelf

    def note(self, tenant: bytes, entry: bytes) -> None:
        """Take note that an entry is in the store."""
        self.keys.setdefault(tenant, set()).add(entry)

    def changed(self, tenant: bytes, entry: bytes, *, is_there: bool) -> None:
        """Take note of an event: an entry was stored or has gone, be it by this very object.

        Events come later than answers, so what they tell may be past: an entry that has gone may have
        been put again. What it is now is read from the store before it is next asked for.
        """
        self.num_changes += 1
        shelf = self._open.get(tenant)
        is_known = entry in self.keys.get(tenant, ()) or (shelf and entry in shelf.entries)
        if is_there:
            self.note(tenant, entry)
        else:
            self._forget(tenant, entry)
        if shelf is not None and (is_there or is_known):
            shelf.stale.add(entry)

    def removed(self, tenant: bytes, entry: bytes) -> None:
        """Take note that an entry was not in the store just now."""
        self._forget(tenant, entry)
        if tenant in self._open:
            self._open[tenant].drop(entry)

    def _forget(self, tenant: bytes, entry: bytes) -> None:
        keys = self.keys.get(tenant, set())
        keys.discard(entry)
        if not keys:
            self.keys.pop(tenant, None)

    def restart(self, keys: dict[bytes, set[bytes]]) -> None:
        """Take note of all entries that there are; whatever was known of them may be old."""
        self.num_changes += 1
        self.keys = keys
        for tenant, shelf in self._open.items():
            there = keys.get(tenant, set())
            for entry in [entry for entry in shelf.entries if entry not in there]:
                shelf.drop(entry)
            shelf.stale = set(there)

    @property
    def num_open(self) -> int:
        """Tenants whose embeddings are here."""
        return len(self._open)

    @property
    def num_keys(self) -> int:
        """Entries of all tenants."""
        return sum(map(len, self.keys.values()))

    @property
    def index_bytes(self) -> int:
        """Bytes of the indexes."""
        return sum(shelf.index.nbytes for shelf in self._open.values())
