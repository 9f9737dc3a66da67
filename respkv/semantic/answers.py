"""What a semantic cache answers with."""

from dataclasses import dataclass
from typing import Any, NamedTuple


class Hit(NamedTuple):
    """An entry that is near enough.

    payload:  as it was put, bytes or str.
    score:    how near, more is nearer: cosine, inner product, or minus the distance (l2).
    key:      its name within its tenant, for ``delete``; metadata: as it was put.
    """

    payload: bytes | str
    score: float
    key: str
    metadata: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class SemanticStats:
    """What this object has done, and what it knows of the store.

    entries, tenants: in the store, as far as is known; tenants_open: whose embeddings are here.
    hits, misses:     of get and search; hit_rate: of all of them, 0 when there was none.
    gone:             entries that the index named and the store had no longer.
    evicted:          entries deleted because a tenant had more than max_entries.
    unreadable:       values under entries' keys that are none; they are left alone.
    rescans:          how often all keys were asked for.
    """

    entries: int
    tenants: int
    tenants_open: int
    index_bytes: int
    hits: int
    misses: int
    hit_rate: float
    puts: int
    gone: int
    evicted: int
    unreadable: int
    rescans: int
