"""How files hold the planes of ``rhz*``: what comes before the codes as it is, the codes through zstd.

A packed plane is the sections before ``codes``, 4 bytes of length and so many bytes: one zstd frame
of the codes, or the codes themselves where zstd finds nothing in them, which the length, being
theirs, then says. So a packed plane takes at most 4 bytes more than the plane, less its padding.

The nibbles go in as they are packed: a byte is then a pair of codes, and Huffman's codes of pairs
come to fewer bits than those of single ones. Level 1 does little more than that, and no match is
there for a higher level to find.
"""

import struct
import threading
from typing import Final

import zstandard

from respkv.errors import PageCorrupt
from respkv.kernels.layout import PlaneLayout

LEVEL: Final = 1
LENGTH: Final = struct.Struct("<I")


class _Coders(threading.local):
    """The coders of this thread: they keep their working memory, so no two threads may share one."""

    def __init__(self) -> None:
        # Without zstd's own checksum: the page's covers what it would.
        self.compress = zstandard.ZstdCompressor(level=LEVEL).compress
        self.decompress = zstandard.ZstdDecompressor().decompress


_coders = _Coders()


def pack(plane: memoryview, layout: PlaneLayout) -> bytes:
    """Return a plane as files hold it.

    plane: contiguous bytes, as ``layout`` has them.
    Raises ValueError when it is not of that size.
    """
    if plane.nbytes != layout.nbytes:
        raise ValueError(f"a plane of {plane.nbytes} bytes is not one of {layout.nbytes}")
    plane = plane.cast("B")
    _, offset, nbytes = layout["codes"]
    codes: bytes | memoryview = plane[offset : offset + nbytes]
    small = _coders.compress(codes)
    if len(small) < nbytes:
        codes = small
    return b"".join((plane[:offset], LENGTH.pack(len(codes)), codes))


def packed_bytes_max(layout: PlaneLayout) -> int:
    """Return how many bytes a packed plane has at most."""
    _, offset, nbytes = layout["codes"]
    return offset + LENGTH.size + nbytes


def unpack(stored: memoryview, layout: PlaneLayout, into: memoryview) -> None:
    """Undo ``pack``.

    It takes memory for the codes once beside ``into``, whatever ``stored`` claims.

    into: writable, contiguous, of the plane's size.
    Raises PageCorrupt when ``stored`` is not such a plane packed; ``into`` holds anything then. A
    change that still decodes to so many bytes is left to the page's checksum. Raises ValueError
    when ``into`` is not of the plane's size.
    """
    if into.nbytes != layout.nbytes:
        raise ValueError(f"memory of {into.nbytes} bytes is not for a plane of {layout.nbytes}")
    stored, into = stored.cast("B"), into.cast("B")
    _, offset, nbytes = layout["codes"]
    start = offset + LENGTH.size
    if stored.nbytes < start:
        raise PageCorrupt(f"a packed plane of {stored.nbytes} bytes ends before its codes")
    (length,) = LENGTH.unpack_from(stored, offset)
    if length != stored.nbytes - start or length > nbytes:
        raise PageCorrupt(f"{length} bytes are claimed where {stored.nbytes - start} are left")
    codes = stored[start:]
    into[:offset] = stored[:offset]
    into[offset : offset + nbytes] = codes if length == nbytes else _unpacked(codes, nbytes)
    into[offset + nbytes :] = bytes(layout.nbytes - offset - nbytes)


def _unpacked(frame: memoryview, nbytes: int) -> bytes:
    try:
        # The decompressor takes as much memory as the frame claims.
        claimed = zstandard.get_frame_parameters(frame).content_size
        if claimed != nbytes:
            raise PageCorrupt(f"a zstd frame claims {claimed} bytes, not {nbytes}")
        codes = _coders.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PageCorrupt(f"a zstd frame is damaged: {error}") from error
    if len(codes) != nbytes:
        raise PageCorrupt(f"{len(codes)} bytes were compressed, not {nbytes}")
    return codes
