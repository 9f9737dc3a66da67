"""The superblock: whose directory this is, how it was left, and what of it is void.

It is replaced whole, so it is the old one or the new one; it has two copies, so that one flipped
bit does not cost the tier. Its first 32 bytes stay as they are in every version of the format, so
that any program can tell which version made a directory.
"""

import struct
from pathlib import Path
from typing import NamedTuple

from respkv.errors import PageCorrupt, TierError
from respkv.tiers.format import hash64

FORMAT_VERSION = 2  # 2: pages have more (meta.py)
SUPERBLOCK_BYTES = 8192
SUPERBLOCK_NAME = "superblock"
MAGIC = b"respkv\0\n"
_COPY_BYTES = SUPERBLOCK_BYTES // 2
_FIXED = struct.Struct("<8sI12x")  # magic, version; the seal of these 24 bytes follows
_SEAL = struct.Struct("<Q")
# tier, alignment, segment bytes, clean, boot id, void below, next sequence, next generation
_FIELDS = struct.Struct("<16sIQB64sQQQ")
_FIELDS_AT = 32
_SEAL_AT = _FIELDS_AT + _FIELDS.size


class Superblock(NamedTuple):
    """What is known of a directory before anything in it is read.

    is_clean:      the last use ended with a checkpoint that says all.
    boot_id:       of the machine's run in which it was last used.
    void_below:    what batches with a smaller sequence say is void: it was flushed.
    next_sequence, next_generation: a hint, at most what is true.
    """

    tier: str
    alignment: int
    segment_bytes: int
    is_clean: bool
    boot_id: str
    void_below: int = 0
    next_sequence: int = 1
    next_generation: int = 1


def encode_superblock(superblock: Superblock) -> bytes:
    """Return the content of the file."""
    fixed = _FIXED.pack(MAGIC, FORMAT_VERSION)
    tier, boot_id = superblock.tier.encode(), superblock.boot_id.encode()
    assert 0 < len(tier) <= 16
    assert len(boot_id) <= 64
    data = fixed + _SEAL.pack(hash64(fixed))
    data += _FIELDS.pack(
        tier,
        superblock.alignment,
        superblock.segment_bytes,
        superblock.is_clean,
        boot_id,
        superblock.void_below,
        superblock.next_sequence,
        superblock.next_generation,
    )
    data += _SEAL.pack(hash64(data))
    return data.ljust(_COPY_BYTES, b"\0") * 2


def decode_superblock(data: bytes, *, tier: str, alignment: int) -> Superblock:
    """Read a superblock.

    Raises TierError when this program must leave the directory alone: it was made by a newer
    version, by another tier, with another alignment, or by another program. Raises PageCorrupt
    when it is ours, but no copy is whole.
    """
    copies = (data[:_COPY_BYTES], data[_COPY_BYTES:])
    for copy in copies:
        version = _version(copy)
        if version is not None and version > FORMAT_VERSION:
            raise TierError(
                f"the files were written in format {version}, this program reads formats up to "
                f"{FORMAT_VERSION}: use a newer respkv, or an empty directory"
            )
    for copy in copies:
        if _version(copy) is not None and (found := _decode(copy)) is not None:
            _check_same("belong to the tier", found.tier, tier)
            _check_same("have the alignment", found.alignment, alignment)
            return found
    if not any(copy.startswith(MAGIC) for copy in copies):
        raise TierError(
            "the file superblock is not one of respkv: give it a directory of its own, or delete "
            "what is there"
        )
    raise PageCorrupt("both copies of the superblock are damaged")


def read_boot_id() -> str:
    """Return what names this run of the machine; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:64]
    except OSError:
        return ""


def _version(copy: bytes) -> int | None:
    if len(copy) < _SEAL_AT + _SEAL.size:
        return None
    magic, version = _FIXED.unpack_from(copy)
    if magic != MAGIC or _SEAL.unpack_from(copy, _FIXED.size)[0] != hash64(copy[: _FIXED.size]):
        return None
    return int(version)


def _decode(copy: bytes) -> Superblock | None:
    if _SEAL.unpack_from(copy, _SEAL_AT)[0] != hash64(copy[:_SEAL_AT]):
        return None
    tier, alignment, segment_bytes, is_clean, boot_id, *numbers = _FIELDS.unpack_from(
        copy, _FIELDS_AT
    )
    return Superblock(
        tier.rstrip(b"\0").decode(),
        alignment,
        segment_bytes,
        bool(is_clean),
        boot_id.rstrip(b"\0").decode(),
        *numbers,
    )


def _check_same(what: str, found: str | int, wanted: str | int) -> None:
    if found != wanted:
        raise TierError(f"the files {what} {found}, not {wanted}: give each its own directory")
