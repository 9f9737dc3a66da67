"""One entry as one value in the server: embedding, metadata and payload together.

One value, because then an entry is there or not: a writer that dies leaves nothing half-visible, an
entry's parts cannot be evicted apart, and one TTL is the TTL of all. The embedding stands in front,
at a place that depends on nothing, so that an index is built from the first bytes of each value
(GETRANGE) and payloads stay where they are.

The key is ``semantic:<namespace>:<tenant>-<id>``. Tenant and id are hashes, so no name, whatever is
in it, can be taken for another's; the record repeats the tenant's and is not believed without.
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy

from respkv.errors import ConfigError, PageCorrupt
from respkv.semantic.embeddings import LARGEST, Vector

MAGIC = b"KVSEM\x00\x01\x00"
# Magic, hash of the tenant, of the key, when it was stored (ms), numbers, bytes of the key's text,
# of the metadata, and whether the payload is text.
HEAD = struct.Struct("<8s16s16sQIIIB3x")
METADATA_BYTES_MAX = 64 * 1024
NAME_BYTES_MAX = 1024
_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ID = re.compile(rb"([0-9a-f]{32})-([0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class Record:
    """One entry. key: the name that its caller has for it; created_ms: by the writer's clock."""

    key: str
    embedding: Vector
    payload: bytes | str
    metadata: dict[str, Any] | None
    created_ms: int


@dataclass(frozen=True, slots=True)
class Front:
    """What an index needs of a record."""

    embedding: Vector
    created_ms: int


@dataclass(frozen=True, slots=True)
class Names:
    """The keys of one namespace. Raises ConfigError when it cannot be part of a key."""

    namespace: str

    def __post_init__(self) -> None:
        if not isinstance(self.namespace, str) or not _NAMESPACE.fullmatch(self.namespace):
            raise ConfigError(
                f"namespace = {self.namespace!r}: accepted are 1 to 64 letters, digits and . _ -"
            )

    @property
    def of_pages(self) -> str:
        """The server's namespace: of its events, its quota, its part of INFO."""
        return f"semantic:{self.namespace}"

    @property
    def pattern(self) -> str:
        """What SCAN finds the entries by."""
        return f"{self.of_pages}:*"

    @property
    def about(self) -> str:
        """The key that says which embeddings are kept here."""
        return f"semantic-about:{self.namespace}"

    def key(self, tenant: bytes, entry: bytes) -> bytes:
        """Return the key of an entry. tenant, entry: hashes, 16 bytes each."""
        return f"{self.of_pages}:{tenant.hex()}-{entry.hex()}".encode()

    def parse(self, key: bytes) -> tuple[bytes, bytes] | None:
        """Return the hashes of tenant and entry; None when the key is of no entry."""
        prefix = self.of_pages.encode() + b":"
        found = _ID.fullmatch(key, len(prefix)) if key.startswith(prefix) else None
        return found and (bytes.fromhex(found[1].decode()), bytes.fromhex(found[2].decode()))


def tenant_hash(tenant: str) -> bytes:
    """Return what stands for a tenant. Raises TypeError, or ValueError when the name is too long."""
    return _hash("tenant", tenant, b"tenant")


def entry_hash(key: str) -> bytes:
    """Return what stands for an entry's key, within its tenant."""
    return _hash("key", key, b"entry")


def name_of(embedding: Vector) -> str:
    """Return the key of an entry that was given none: equal embeddings replace each other."""
    return f"embedding-{blake2b(embedding.tobytes(), digest_size=16).hexdigest()}"


def _hash(what: str, name: str, person: bytes) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"{what} is a str, not {type(name).__name__}")
    encoded = name.encode("utf-8", "surrogatepass")  # each name has bytes of its own
    if len(encoded) > NAME_BYTES_MAX:
        raise ValueError(f"{what} has at most {NAME_BYTES_MAX} bytes, not {len(encoded)}")
    return blake2b(encoded, digest_size=16, person=person).digest()


def front_bytes(dim: int) -> int:
    """Return how many of a record's first bytes ``decode_front`` takes."""
    return HEAD.size + 4 * dim


def encode(tenant: bytes, record: Record) -> bytes:
    """Return the value of an entry. Raises ValueError or TypeError: metadata that JSON cannot say."""
    name = record.key.encode("utf-8", "surrogatepass")
    metadata = b"" if record.metadata is None else _json(as_metadata(record.metadata))
    text = isinstance(record.payload, str)
    payload = record.payload.encode() if isinstance(record.payload, str) else record.payload
    head = HEAD.pack(
        *(MAGIC, tenant, entry_hash(record.key), record.created_ms),
        *(record.embedding.size, len(name), len(metadata), text),
    )
    embedding = record.embedding.astype("<f4").tobytes()
    return b"".join((head, embedding, name, metadata, payload))


def decode_front(front: Any, tenant: bytes, entry: bytes, dim: int) -> Front:
    """Read the first bytes of an entry's value. Raises PageCorrupt: it is no entry, or another's."""
    data = memoryview(front)
    _head(data, tenant, entry, dim)
    (_, _, _, created_ms, _, _, _, _) = HEAD.unpack_from(data)
    return Front(_embedding(data, dim), created_ms)


def decode(value: Any, tenant: bytes, entry: bytes, dim: int) -> Record:
    """Read an entry's value. Raises PageCorrupt: it is no entry, or another's."""
    data = memoryview(value)
    created_ms, name_bytes, metadata_bytes, is_text = _head(data, tenant, entry, dim)
    start = front_bytes(dim)
    middle = start + name_bytes
    end = middle + metadata_bytes
    if len(data) < end:
        raise PageCorrupt(f"an entry of {len(data)} bytes ends before its payload")
    try:
        name = bytes(data[start:middle]).decode("utf-8", "surrogatepass")
        metadata = json.loads(bytes(data[middle:end])) if metadata_bytes else None
        payload: bytes | str = bytes(data[end:])
        if is_text:
            payload = bytes(data[end:]).decode()
    except (ValueError, RecursionError) as error:
        raise PageCorrupt(f"an entry that cannot be read: {error}") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise PageCorrupt("an entry whose metadata are no dict")
    return Record(name, _embedding(data, dim), payload, metadata, created_ms)


def _head(data: memoryview, tenant: bytes, entry: bytes, dim: int) -> tuple[int, int, int, bool]:
    if len(data) < front_bytes(dim):
        raise PageCorrupt(f"{len(data)} bytes are no entry with {dim} numbers")
    magic, owner, found, created_ms, numbers, name, metadata, is_text = HEAD.unpack_from(data)
    if magic != MAGIC or owner != tenant or found != entry:
        raise PageCorrupt("the value under an entry's key is not that entry")
    if numbers != dim:
        raise PageCorrupt(f"an entry with {numbers} numbers among those of {dim}")
    return created_ms, name, metadata, bool(is_text)


def _embedding(data: memoryview, dim: int) -> Vector:
    found = numpy.frombuffer(data, "<f4", dim, HEAD.size).astype(numpy.float32)
    if not (numpy.abs(found) <= LARGEST).all():
        raise PageCorrupt("an entry whose embedding is not finite, or too large to compare")
    return found


def as_metadata(metadata: object) -> dict[str, Any]:
    """Return metadata as a dict. Raises TypeError when they are none."""
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata is a dict, not {type(metadata).__name__}")
    return dict(metadata)


def _json(metadata: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(metadata, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise type(error)(f"metadata must be what JSON can say: {error}") from error
    except RecursionError as error:
        raise ValueError(f"metadata must be what JSON can say: {error}") from error
    if len(text) > METADATA_BYTES_MAX:
        raise ValueError(
            f"metadata takes {len(text)} bytes as JSON, at most {METADATA_BYTES_MAX}; put the rest"
            " into the payload"
        )
    return text
