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
        # Entries that are in the store and have to be read, again or for the first time.
        self.stale: set[bytes] = set(stale)

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

    def order_by_age(self) -> None:
        """Put all entries in the order in which they were stored: of their use nothing is known."""
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
    own: dict[tuple[bytes, bytes], int] = field(default_factory=dict)  # puts not yet heard of
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

    def stored(self, tenant: bytes, entry: bytes) -> None:
        """Take note that an entry was stored, by whomever."""
        self.keys.setdefault(tenant, set()).add(entry)
        waiting = self.own.get((tenant, entry), 0)
        if waiting:
            self.settle(tenant, entry)
        elif tenant in self._open:
            self._open[tenant].stale.add(entry)

    def removed(self, tenant: bytes, entry: bytes) -> None:
        """Take note that an entry is gone."""
        keys = self.keys.get(tenant, set())
        keys.discard(entry)
        if not keys:
            self.keys.pop(tenant, None)
        if tenant in self._open:
            self._open[tenant].drop(entry)

    def expect(self, tenant: bytes, entry: bytes) -> None:
        """Take note of a put by this very object: when it is told of, nothing has to be read."""
        self.own[tenant, entry] = self.own.get((tenant, entry), 0) + 1

    def settle(self, tenant: bytes, entry: bytes) -> None:
        """Expect one put less."""
        left = self.own.pop((tenant, entry), 0) - 1
        if left > 0:
            self.own[tenant, entry] = left

    def restart(self, keys: dict[bytes, set[bytes]]) -> None:
        """Take note of all entries that there are; whatever was known of them may be old."""
        self.keys = keys
        self.own.clear()
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
