"""Namespaces: each has a schema that every page put into it must fit.

A worker whose model differs is told at once, by KV.SCHEMA SET or by its first KV.PUT, instead of
reading pages that would decode into noise.
"""

from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from respkv.errors import SchemaMismatch
from respkv.kernels.layout import Codec
from respkv.page import Geometry, namespace_of
from respkv.tiers.record import Level

AUTO = b"auto"


@dataclass(frozen=True, slots=True)
class Schema:
    """What the pages of a namespace look like, and how they are kept.

    fingerprint: of the model's weights; hash_algorithm, seed: of the page-id chain. Opaque here.
    codecs:      (tier, codec) pairs; a codec is a name, or two with a slash: of keys and of values;
        "auto" is whichever was chosen by measuring.
    ttl_ms:      of new pages, 0: none.
    level:       what new pages must survive; None: what the cache says.
    exact_first, exact_last: so many tokens of a page stay exact in any codec: the first ones of a
        page that stands behind no other, and the last ones.
    error_max:   what "auto" keeps to: relative L2 error of every plane; 0: none is allowed.
    ratio_min:   or what it has to reach: raw bytes over stored ones; 0: nothing.
    """

    namespace: bytes
    geometry: Geometry
    fingerprint: bytes = b""
    hash_algorithm: bytes = b"sha256"
    seed: bytes = b""
    codecs: tuple[tuple[bytes, bytes], ...] = ()
    ttl_ms: int = 0
    level: Level | None = None
    exact_first: int = 0
    exact_last: int = 0
    error_max: float = 0.0
    ratio_min: float = 0.0

    @property
    def identity(self) -> tuple[object, ...]:
        """What two workers must agree on to share pages."""
        return (self.geometry, self.fingerprint, self.hash_algorithm, self.seed)

    @property
    def is_tuned(self) -> bool:
        """Whether a tier's codec is chosen by measuring."""
        return any(codec == AUTO for _, codec in self.codecs)

    @property
    def fingerprint_hash(self) -> int:
        """64 bits of identity for page headers."""
        return xxh3_64_intdigest(repr((self.namespace, *self.identity)).encode())


class Namespaces:
    """The schemas by name.

    chosen: of namespaces whose codec is "auto", the codecs of keys and values, by layer. Until one
            is chosen, pages are stored without loss.
    """

    def __init__(self) -> None:
        self.chosen: dict[bytes, tuple[tuple[Codec, Codec], ...]] = {}
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
        if known is not None and _targets(known) != _targets(schema):
            self.chosen.pop(schema.namespace, None)
        self._schemas[schema.namespace] = schema

    def drop(self, namespace: bytes) -> bool:
        """Forget a schema; its pages stay until they are evicted. False if there was none."""
        self.chosen.pop(namespace, None)
        return self._schemas.pop(namespace, None) is not None

    def clear(self) -> None:
        """Forget every schema."""
        self._schemas.clear()
        self.chosen.clear()


def check_payload(schema: Schema, nbytes: int) -> None:
    """Raise SchemaMismatch unless a page of ``nbytes`` fits the schema."""
    expected = schema.geometry.page_bytes
    if nbytes != expected:
        raise SchemaMismatch(
            f"a page of namespace {_shown(schema.namespace)} has {expected} bytes, "
            f"this payload has {nbytes}"
        )


def _targets(schema: Schema) -> tuple[float, float, bool]:
    return schema.error_max, schema.ratio_min, schema.is_tuned


def _shown(namespace: bytes) -> str:
    return repr(namespace.decode(errors="replace"))


def _described(schema: Schema) -> str:
    shape = schema.geometry
    return (
        f"layers {shape.layers}, heads {shape.heads}, dim {shape.dim}, tokens {shape.tokens}, "
        f"dtype {shape.dtype}, fingerprint {_shown(schema.fingerprint)}, "
        f"hash {_shown(schema.hash_algorithm)}, seed {_shown(schema.seed)}"
    )
