"""The 64 bytes in front of every payload, in the arena as on every slower tier.

A record that is read back may be wrong in three ways: its bytes changed (a flipped bit, a torn
write), it belongs to somebody else (a write or a read went to the wrong place), or it is an older
record of the same place (a write was lost). So the header names the key and the generation as well
as the checksum of the payload, and is sealed by a checksum of its own: a header that passes is
trusted whole, and its sizes may be used before the payload is there.

xxh3 guards against accidents, not against someone who forges pages; who may write is decided by
the file's mode and the server's login.
"""

import struct
from typing import NamedTuple

import xxhash

from respkv.errors import PageCorrupt

HEADER_BYTES = 64
MAGIC = b"RKV1"
VERSION = 1

# magic, version, codec, flags, namespace, key, generation, payload bytes, checksum, 8 reserved
_SEALED = struct.Struct("<4sBBHQQQQQ8x")
_SEAL = struct.Struct("<Q")
_SEALED_BYTES = _SEALED.size
assert _SEALED_BYTES + _SEAL.size == HEADER_BYTES

Buffer = bytes | bytearray | memoryview


class Header(NamedTuple):
    """What is known of a payload.

    namespace: fingerprint of the namespace and its schema, chosen by the engine; 0 for none.
    key_hash and checksum: ``hash64`` of the key and of the payload.
    generation: counts the uses of a place, so that a record left from an earlier use is recognised.
    """

    codec: int
    flags: int
    namespace: int
    key_hash: int
    generation: int
    payload_bytes: int
    checksum: int


class Checksum:
    """The checksum of a payload that arrives in pieces."""

    __slots__ = ("_state", "digest", "update")

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()
        # Bound once: update runs for every piece that a socket delivers.
        self.update = self._state.update
        self.digest = self._state.intdigest


def hash64(buffer: Buffer) -> int:
    """Return the xxh3_64 of a buffer, as the header stores it for keys and payloads."""
    return xxhash.xxh3_64_intdigest(buffer)


def write_header(into: memoryview, header: Header) -> None:
    """Write a sealed header into the first 64 bytes of ``into``."""
    assert into.nbytes >= HEADER_BYTES
    _SEALED.pack_into(
        into,
        0,
        MAGIC,
        VERSION,
        header.codec,
        header.flags,
        header.namespace,
        header.key_hash,
        header.generation,
        header.payload_bytes,
        header.checksum,
    )
    _SEAL.pack_into(into, _SEALED_BYTES, hash64(into[:_SEALED_BYTES]))


def read_header(buffer: Buffer) -> Header:
    """Read the header at the start of a buffer; what follows it is not looked at.

    Raises PageCorrupt unless it is a whole header of this version whose seal holds.
    """
    view = memoryview(buffer)[:HEADER_BYTES]
    if view.nbytes < HEADER_BYTES:
        raise PageCorrupt(f"a header has {HEADER_BYTES} bytes, there are {view.nbytes}")
    magic, version, *fields = _SEALED.unpack_from(view)
    if magic != MAGIC:
        raise PageCorrupt(f"a header starts with {MAGIC!r}, not {magic!r}")
    if _SEAL.unpack_from(view, _SEALED_BYTES)[0] != hash64(view[:_SEALED_BYTES]):
        raise PageCorrupt("the seal of the header does not match: it was changed or torn")
    if version != VERSION:
        raise PageCorrupt(f"the header is of version {version}, this program reads {VERSION}")
    return Header(*fields)


def check_page(
    header: Buffer, payload: Buffer, *, key: bytes, generation: int | None = None
) -> Header:
    """Check that header and payload are what was written for this key.

    header:     at least its 64 bytes; the payload may follow them in the same buffer.
    payload:    exactly the payload's bytes.
    generation: the use of the place that the reader expects; None when it does not know.
    Raises PageCorrupt naming what differs: the header, the key, the generation, the size or the
    checksum.
    """
    found = read_header(header)
    if found.key_hash != hash64(key):
        raise PageCorrupt(f"the record belongs to another key than {_short(key)}")
    if generation is not None and found.generation != generation:
        raise PageCorrupt(
            f"the record of {_short(key)} has generation {found.generation}, not {generation}"
        )
    size = memoryview(payload).nbytes
    if found.payload_bytes != size:
        raise PageCorrupt(f"{_short(key)} was written with {found.payload_bytes} bytes, not {size}")
    checksum = hash64(payload)
    if found.checksum != checksum:
        raise PageCorrupt(
            f"{_short(key)} has checksum {checksum:016x}, written with {found.checksum:016x}"
        )
    return found


def _short(key: bytes) -> str:
    return repr(key if len(key) <= 32 else key[:32] + b"...")
