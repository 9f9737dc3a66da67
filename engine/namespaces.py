"""Namespaces: each has a schema that every page put into it must fit.

A worker whose model differs is told at once, by KV.SCHEMA SET or by its first KV.PUT, instead of
reading pages that would decode into noise.
"""

from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from respkv.errors import SchemaMismatch
from respkv.page import Geometry, namespace_of
from respkv.tiers.record import Level


@dataclass(frozen=True, slots=True)
class Schema:
    """What the pages of a namespace look like, and how they are kept.

    fingerprint: of the model's weights; hash_algorithm, seed: of the page-id chain. Opaque here.
    codecs:      (tier, codec) pairs.
    ttl_ms:      of new pages, 0: none.
    level:       what new pages must survive; None: what the cache says.
    """

    namespace: bytes
    geometry: Geometry
    fingerprint: bytes = b""
    hash_algorithm: bytes = b"sha256"
    seed: bytes = b""
    codecs: tuple[tuple[bytes, bytes], ...] = ()
    ttl_ms: int = 0
    level: Level | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """What two workers must agree on to share pages."""
        return (self.geometry, self.fingerprint, self.hash_algorithm, self.seed)

    @property
    def fingerprint_hash(self) -> int:
        """64 bits of identity for page headers."""
        return xxh3_64_intdigest(repr((self.namespace, *self.identity)).encode())


class Namespaces:
    """The schemas by name, and the bytes each namespace holds."""

    def __init__(self) -> None:
        self._schemas: dict[bytes, Schema] = {}

    def __len__(self) -> int:
        return len(self._schemas)

    def names(self) -> list[bytes]:
        """Return the names, in order."""
        return sorted(self._schemas)

    def find(self, namespace: bytes) -> Schema | None:
        """Return the schema of a namespace, or None."""
        return self._schemas.get(namespace)

    def of_key(self, key: bytes) -> Schema | None:
        """Return the schema that a page key falls under, or None."""
        return self._schemas.get(namespace_of(key)) if self._schemas else None

    def put(self, schema: Schema) -> None:
        """Register a schema, or change the policies of one with the same identity.

        Raises SchemaMismatch naming what differs.
        """
        known = self._schemas.get(schema.namespace)
        if known is not None and known.identity != schema.identity:
            raise SchemaMismatch(
                f"namespace {_shown(schema.namespace)} has {_described(known)}, "
                f"not {_described(schema)}; use another namespace or KV.SCHEMA DEL this one"
            )
        self._schemas[schema.namespace] = schema

    def drop(self, namespace: bytes) -> bool:
        """Forget a schema; its pages stay until they are evicted. False if there was none."""
        return self._schemas.pop(namespace, None) is not None

    def clear(self) -> None:
        """Forget every schema."""
        self._schemas.clear()


def check_payload(schema: Schema, nbytes: int) -> None:
    """Raise SchemaMismatch unless a page of ``nbytes`` fits the schema."""
    expected = schema.geometry.page_bytes
    if nbytes != expected:
        raise SchemaMismatch(
            f"a page of namespace {_shown(schema.namespace)} has {expected} bytes, "
            f"this payload has {nbytes}"
        )


def _shown(namespace: bytes) -> str:
    return repr(namespace.decode(errors="replace"))


def _described(schema: Schema) -> str:
    shape = schema.geometry
    return (
        f"layers {shape.layers}, heads {shape.heads}, dim {shape.dim}, tokens {shape.tokens}, "
        f"dtype {shape.dtype}, fingerprint {_shown(schema.fingerprint)}, "
        f"hash {_shown(schema.hash_algorithm)}, seed {_shown(schema.seed)}"
    )
