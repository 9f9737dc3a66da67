"""Namespaces: each has a schema that every page put into it must fit.

A worker whose model differs is told at once, by KV.SCHEMA SET or by its first KV.PUT, instead of
reading pages that would decode into noise.
"""

from dataclasses import dataclass, field, replace
from enum import Enum

from xxhash import xxh3_64_intdigest

from respkv.errors import SchemaMismatch
from respkv.kernels.layout import Codec
from respkv.page import Geometry, Latents, Part, group_of, namespace_of, part_of
from respkv.tiers.record import Level

AUTO = b"auto"
TAG_BYTES = 8


class Kind(Enum):
    """What a group of layers keeps of a prompt, and what of it a position needs.

    FULL:    K and V of every token; all of them.
    SLIDING: the same; those of the last tokens, as many as the window has.
    STATE:   one object at a position: what the layers carry on (convolution and recurrence); that
             of this very position.
    MLA:     a latent of every token; all of them.
    """

    FULL = "full"
    SLIDING = "sliding"
    STATE = "state"
    MLA = "mla"


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of a hybrid model that keep the same, beside those of the namespace's own geometry.

    geometry: of a full page; None: STATE, whose objects have ``nbytes`` and no shape.
    window:   tokens, of SLIDING.
    """

    name: bytes
    kind: Kind
    geometry: Geometry | None = None
    window: int = 0
    nbytes: int = 0

    def piece_geometry(self, tokens: int) -> Geometry | None:
        """Return the shape of a page or tail of so many tokens; None: it has none."""
        if self.geometry is None or self.geometry.tokens == tokens:
            return self.geometry
        return replace(self.geometry, tokens=tokens)

    def piece_bytes(self, tokens: int) -> int:
        """Return the bytes of a page or tail of so many tokens, or of a state."""
        if self.geometry is None:
            return self.nbytes
        return self.geometry.page_bytes // self.geometry.tokens * tokens

    def check_piece(self, tokens: int, nbytes: int) -> None:
        """Raise SchemaMismatch unless a page of so many tokens, or a state, has ``nbytes``."""
        expected = self.piece_bytes(tokens)
        if nbytes != expected:
            what = "a state" if self.geometry is None else f"a page of {tokens} tokens"
            raise SchemaMismatch(
                f"{what} of group {_shown(self.name)} has {expected} bytes, "
                f"this payload has {nbytes}"
            )


@dataclass(frozen=True, slots=True)
class Schema:
    """What the pages of a namespace look like, and how they are kept.

    fingerprint: of the model's weights; hash_algorithm, seed: of the page-id chain. Opaque here;
        chains of tokens need an algorithm of respkv.chain.
    codecs:      (tier, codec) pairs; a codec is a name, or two with a slash: of keys and of values;
        "auto" is whichever was chosen by measuring.
    ttl_ms:      of new pages, 0: none.
    level:       what new pages must survive; None: what the cache says.
    exact_first, exact_last: so many tokens of a page stay exact in any codec: the first ones of a
        page that stands behind no other, and the last ones.
    error_max:   what "auto" keeps to: relative L2 error of every plane; 0: none is allowed.
    ratio_min:   or what it has to reach: raw bytes over stored ones; 0: nothing.
    groups:      the other layers of a hybrid model, by name.
    fingerprint_hash: 64 bits of identity, for page headers; tag: the same as TAG_BYTES bytes, with
        which the branch of each of its pages begins.
    """

    namespace: bytes
    geometry: Geometry
    fingerprint: bytes = b""
    hash_algorithm: bytes = b"blake3"
    seed: bytes = b""
    codecs: tuple[tuple[bytes, bytes], ...] = ()
    ttl_ms: int = 0
    level: Level | None = None
    exact_first: int = 0
    exact_last: int = 0
    error_max: float = 0.0
    ratio_min: float = 0.0
    groups: tuple[Group, ...] = ()
    fingerprint_hash: int = field(init=False, repr=False, compare=False)
    tag: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        number = xxh3_64_intdigest(repr((self.namespace, *self.identity)).encode())
        object.__setattr__(self, "fingerprint_hash", number)
        object.__setattr__(self, "tag", number.to_bytes(TAG_BYTES, "little"))

    @property
    def identity(self) -> tuple[object, ...]:
        """What two workers must agree on to share pages."""
        shared = (self.geometry, self.fingerprint, self.hash_algorithm, self.seed)
        return (*shared, self.groups) if self.groups else shared  # files name it by its hash

    def group(self, name: bytes) -> Group:
        """Return a group; the empty name is that of the namespace's own geometry.

        Raises SchemaMismatch naming the groups that there are.
        """
        if not name:
            kind = Kind.MLA if isinstance(self.geometry, Latents) else Kind.FULL
            return Group(b"", kind, self.geometry)
        found = self.find_group(name)
        if found is not None:
            return found
        there = ", ".join(_shown(group.name) for group in self.groups) or "none"
        raise SchemaMismatch(
            f"namespace {_shown(self.namespace)} has no group {_shown(name)}; it has {there}"
        )

    def find_group(self, name: bytes) -> Group | None:
        """Return one of the other groups, or None."""
        return next((group for group in self.groups if group.name == name), None)

    @property
    def piece_sizes(self) -> list[int]:
        """Bytes of a full page of each group, and of each state."""
        tokens = self.geometry.tokens
        return [self.geometry.page_bytes, *(group.piece_bytes(tokens) for group in self.groups)]

    @property
    def is_tuned(self) -> bool:
        """Whether a tier's codec is chosen by measuring."""
        return any(codec == AUTO for _, codec in self.codecs)


class Namespaces:
    """The schemas by name.

    chosen: of namespaces whose codec is "auto", the codecs of keys and values, by layer. Until one
            is chosen, pages are stored without loss.
    version: how often a schema has come, changed or gone.
    """

    def __init__(self) -> None:
        self.version = 0
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
                f"not {_described(schema)}{_if_of_other_weights(known, schema)}; "
                "use another namespace or KV.SCHEMA DEL this one"
            )
        if known is not None and _targets(known) != _targets(schema):
            self.chosen.pop(schema.namespace, None)
        if known != schema:
            self.version += 1
        self._schemas[schema.namespace] = schema

    def drop(self, namespace: bytes) -> bool:
        """Forget a schema; its pages stay until they are evicted. False if there was none."""
        self.chosen.pop(namespace, None)
        self.version += 1
        return self._schemas.pop(namespace, None) is not None

    def clear(self) -> None:
        """Forget every schema."""
        self.version += 1
        self._schemas.clear()
        self.chosen.clear()


def tag_of(schema: Schema | None) -> bytes:
    """Return how the branch of a page begins that was put under a schema, or under none."""
    return b"" if schema is None else schema.tag


def shape_of(schema: Schema, key: bytes, nbytes: int, tokens: int) -> Geometry | None:
    """Return the shape of a page, a tail or the page of a group; None: it has none.

    tokens: as the page was put with. A state has no shape, nor has what does not fit the schema,
            which may be another one than that with which it was put.
    """
    part, shape = part_of(key), schema.geometry
    if part is not None:
        group = schema.find_group(group_of(key)) if part is Part.BOUND else None
        if group is None or group.geometry is None:
            return None
        shape = group.geometry
    if nbytes == shape.page_bytes:
        return shape
    is_tail = 0 < tokens < shape.tokens and nbytes == shape.page_bytes // shape.tokens * tokens
    return replace(shape, tokens=tokens) if is_tail else None


def check_part(schema: Schema, key: bytes, nbytes: int) -> None:
    """Raise SchemaMismatch unless ``nbytes`` fit the part that a key names, of a full page."""
    name = group_of(key)
    if name:
        schema.group(name).check_piece(schema.geometry.tokens, nbytes)


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


def _shown(text: bytes) -> str:
    """Return bytes for a message: hashes, which fingerprints and seeds are, as hexadecimal digits."""
    shown = text.decode(errors="replace")
    return repr(shown) if shown.isprintable() and shown.encode() == text else text.hex()


def _described(schema: Schema) -> str:
    shape = schema.geometry
    groups = "".join(f", group {_group_described(group)}" for group in schema.groups)
    return (
        f"{_shape_described(shape)}, tokens {shape.tokens}, "
        f"dtype {shape.dtype}, fingerprint {_shown(schema.fingerprint)}, "
        f"hash {_shown(schema.hash_algorithm)}, seed {_shown(schema.seed)}{groups}"
    )


def _if_of_other_weights(known: Schema, schema: Schema) -> str:
    """Say so when weights are all that differs; who hashes them may take the hash as seed, too."""
    alike = replace(known, fingerprint=schema.fingerprint, seed=schema.seed)
    is_so = known.fingerprint != schema.fingerprint and _described(alike) == _described(schema)
    return ": the same shape, of other weights" if is_so else ""


def _shape_described(shape: Geometry) -> str:
    if isinstance(shape, Latents):
        return f"mla, layers {shape.layers}, dim {shape.dim}"
    return f"layers {shape.layers}, heads {shape.heads}, dim {shape.dim}"


def _group_described(group: Group) -> str:
    name, kind = _shown(group.name), group.kind.value
    if group.geometry is None:
        return f"{name} {kind} of {group.nbytes} bytes"
    window = f" {group.window}" if group.window else ""
    shape = _shape_described(group.geometry).removeprefix("mla, ")
    return f"{name} {kind}{window} ({shape}, dtype {group.geometry.dtype})"
