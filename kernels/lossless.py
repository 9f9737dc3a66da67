"""Lossless codecs for bytes of any kind: byte planes, then zstd or lz4.

The high bytes of bfloat16 numbers (sign and most of the exponent) repeat, the low ones (the
mantissa) are noise. Between the noise no compressor finds the repeats: lz4 alone makes Gaussian
bfloat16 larger, zstd alone gains less than half of what is there. So elements are split into planes,
the first bytes of all, then the second ones, and a plane in which a compressor finds nothing stays
as it is, which is also what makes decoding fast: half the bytes are only copied.

A stored payload is one byte, the planes of an element, then blocks of ``BLOCK_BYTES`` of payload,
the last one shorter. A block is, for each plane, 4 bytes of length and so many bytes, and at last
the bytes of the payload that fill no element. A length equal to the plane's means stored as is. So
every size is known from the payload's size but for the lengths, which are checked against what is
there; blocks bound the memory that coding takes.

Blosc's bitshuffle was left: faster, but it would be one more dependency, and gains less.
"""

import struct
import threading
from collections.abc import Iterator
from typing import Protocol, cast

import lz4.block
import numpy as np
import zstandard

from respkv.errors import PageCorrupt

Buffer = bytes | bytearray | memoryview

RAW = 0
ZSTD = 1
LZ4 = 2

# By the name that a setting uses. An id on a disk keeps its meaning for ever: a change of the
# format, BLOCK_BYTES included, is a new id.
CODECS = {"raw": RAW, "zstd": ZSTD, "lz4": LZ4}
CODEC_NAMES = {codec: name for name, codec in CODECS.items()}

BLOCK_BYTES = 1 << 20
# A codec that saves less than this part of the payload is not worth the decoding.
GAIN_SHARE_MIN = 64
# What is looked at to tell whether a plane is worth compressing, at the start, middle and end.
LOOK_BYTES = 64 << 10

_ZSTD_LEVEL = 1
# In a plane of numbers, matches of a few bytes are accidents that cost more than Huffman's codes;
# those of whole rows are still found. Gaussian bfloat16: 1.487 instead of 1.464, a third faster.
_ZSTD_MATCH_MIN = 7
_ZSTD_HASH_LOG = 11
_LENGTH = struct.Struct("<I")
_WORDS = {2: "<u2", 4: "<u4"}

_Plane = np.ndarray[tuple[int], np.dtype[np.uint8]]


class _Coder(Protocol):
    def compress(self, plane: Buffer, *, is_split: bool) -> bytes: ...

    def decompress(self, stored: memoryview, nbytes: int) -> bytes:
        """Return ``nbytes``, or fewer; takes memory for no more. Raises PageCorrupt."""
        ...


class _Zstd:
    """One pair of contexts; of one thread, since they keep their working memory."""

    def __init__(self) -> None:
        # Without zstd's own checksum: the page's covers what it would.
        self._compress = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress
        of_numbers = zstandard.ZstdCompressionParameters.from_level(
            _ZSTD_LEVEL, min_match=_ZSTD_MATCH_MIN, hash_log=_ZSTD_HASH_LOG
        )
        self._compress_plane = zstandard.ZstdCompressor(compression_params=of_numbers).compress
        self._decompress = zstandard.ZstdDecompressor().decompress

    def compress(self, plane: Buffer, *, is_split: bool) -> bytes:
        return self._compress_plane(plane) if is_split else self._compress(plane)

    def decompress(self, stored: memoryview, nbytes: int) -> bytes:
        try:
            # The decompressor takes as much memory as the frame claims.
            claimed = zstandard.get_frame_parameters(stored).content_size
            if claimed != nbytes:
                raise PageCorrupt(f"a zstd frame claims {claimed} bytes, not {nbytes}")
            return self._decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise PageCorrupt(f"a zstd frame is damaged: {error}") from error


class _Lz4:
    def compress(self, plane: Buffer, *, is_split: bool) -> bytes:
        return cast(bytes, lz4.block.compress(plane, store_size=False))

    def decompress(self, stored: memoryview, nbytes: int) -> bytes:
        try:
            return cast(bytes, lz4.block.decompress(stored, uncompressed_size=nbytes))
        except lz4.block.LZ4BlockError as error:
            raise PageCorrupt(f"an lz4 block is damaged: {error}") from error


class _Coders(threading.local):
    """The coders of this thread, by codec id."""

    def __init__(self) -> None:
        self.by_codec: dict[int, _Coder] = {ZSTD: _Zstd(), LZ4: _Lz4()}


_coders = _Coders()


def encode(
    payload: memoryview, *, element_bytes: int, codec: str
) -> tuple[int, bytes | memoryview]:
    """Encode a payload, or leave it as it is where that would save less than 1/64.

    It takes the time of compressing: a large one belongs into a thread, and any number of threads
    may encode at once. Beside the result it takes about 3 x ``BLOCK_BYTES`` of memory.

    element_bytes: of the numbers in it, 2 or 4; 1 for text, bytes and what is not known.
    codec:   a name from ``CODECS``.
    Returns: the id of the codec, and the stored bytes: for ``RAW`` the payload itself, not a copy.
    """
    assert payload.contiguous
    assert element_bytes in (1, *_WORDS)
    coder_id = CODECS[codec]
    if coder_id == RAW or payload.nbytes < GAIN_SHARE_MIN:
        return RAW, payload
    octets = payload.cast("B")
    coder = _coders.by_codec[coder_id]
    worth = _look(octets, element_bytes, coder)
    if not any(worth):
        return RAW, payload
    stored_max = payload.nbytes - payload.nbytes // GAIN_SHARE_MIN
    stored = bytearray([element_bytes])
    for block in _blocks(octets):
        _encode_block(block, element_bytes, worth, coder, stored)
        if len(stored) > stored_max:
            return RAW, payload
    return coder_id, memoryview(stored).toreadonly()


def decode(codec: int, stored: memoryview, into: memoryview) -> None:
    """Decode a payload into memory of exactly its size.

    It takes memory for at most ``BLOCK_BYTES`` beside ``into``, whatever ``stored`` claims.

    Raises PageCorrupt when ``stored`` is not a payload of that size in that codec; ``into`` holds
    anything then. A change that still decodes to so many bytes is left to the page's checksum.
    """
    stored, into = stored.cast("B"), into.cast("B")
    if codec == RAW:
        if stored.nbytes != into.nbytes:
            raise PageCorrupt(f"{stored.nbytes} bytes are stored, not {into.nbytes}")
        into[:] = stored
        return
    coder = _coders.by_codec.get(codec)
    if coder is None:
        raise PageCorrupt(f"this program knows no codec {codec}")
    if not stored or stored[0] not in (1, *_WORDS):
        raise PageCorrupt("the stored payload does not start with the bytes of an element")
    at = 1
    for block in _blocks(into):
        at = _decode_block(stored, at, stored[0], coder, block)
    if at != stored.nbytes:
        raise PageCorrupt(f"{stored.nbytes - at} bytes follow the stored payload")


def _blocks(payload: memoryview) -> Iterator[memoryview]:
    for start in range(0, payload.nbytes, BLOCK_BYTES):
        yield payload[start : start + BLOCK_BYTES]


def _look(payload: memoryview, element_bytes: int, coder: _Coder) -> list[bool]:
    """Tell for each plane whether compressing it seems to pay, from a part of the payload."""
    if payload.nbytes <= 3 * LOOK_BYTES:
        return [True] * element_bytes
    middle = payload.nbytes // 2 - payload.nbytes // 2 % element_bytes
    end = payload.nbytes - LOOK_BYTES - payload.nbytes % element_bytes
    gain_bytes = [0] * element_bytes
    for start in (0, middle, end):
        planes = _split(payload[start : start + LOOK_BYTES], element_bytes)
        for index, plane in enumerate(planes):
            small = coder.compress(plane.data, is_split=element_bytes > 1)
            gain_bytes[index] += max(0, plane.nbytes - len(small))
    return [gain * GAIN_SHARE_MIN >= 3 * LOOK_BYTES // element_bytes for gain in gain_bytes]


def _encode_block(
    block: memoryview, element_bytes: int, worth: list[bool], coder: _Coder, stored: bytearray
) -> None:
    """Append one block to ``stored``."""
    for plane, is_worth in zip(_split(block, element_bytes), worth, strict=True):
        data: Buffer = plane.data
        if is_worth:
            small = coder.compress(data, is_split=element_bytes > 1)
            data = small if len(small) < plane.nbytes else data
        stored += _LENGTH.pack(len(data))
        stored += data
    stored += block[block.nbytes - block.nbytes % element_bytes :]


def _decode_block(
    stored: memoryview, at: int, element_bytes: int, coder: _Coder, block: memoryview
) -> int:
    """Fill ``block`` from what is stored from byte ``at`` on; return where the next one starts."""
    plane_bytes, rest_bytes = divmod(block.nbytes, element_bytes)
    planes: list[Buffer] = []
    for _ in range(element_bytes):
        if at + _LENGTH.size > stored.nbytes:
            raise PageCorrupt("the stored payload ends early")
        (length,) = _LENGTH.unpack_from(stored, at)
        at += _LENGTH.size
        if length > plane_bytes or at + length > stored.nbytes:
            raise PageCorrupt(f"{length} bytes are claimed for {plane_bytes} where fewer are left")
        part = stored[at : at + length]
        at += length
        planes.append(part if length == plane_bytes else _whole(coder, part, plane_bytes))
    _join(planes, block[: block.nbytes - rest_bytes])
    if at + rest_bytes > stored.nbytes:
        raise PageCorrupt("the stored payload ends early")
    block[block.nbytes - rest_bytes :] = stored[at : at + rest_bytes]
    return at + rest_bytes


def _whole(coder: _Coder, part: memoryview, nbytes: int) -> bytes:
    plane = coder.decompress(part, nbytes)
    if len(plane) != nbytes:
        raise PageCorrupt(f"{len(plane)} bytes were compressed, not {nbytes}")
    return plane


def _split(block: memoryview, element_bytes: int) -> list[_Plane]:
    """Return the planes of the whole elements of a block, the lowest bytes first."""
    if element_bytes == 1:
        return [np.frombuffer(block, dtype=np.uint8)]
    words = np.frombuffer(block, dtype=_WORDS[element_bytes], count=block.nbytes // element_bytes)
    # Shifting words and narrowing them is five times as fast as numpy's strided copies.
    return [(words >> 8 * index).astype(np.uint8) for index in range(element_bytes)]


def _join(planes: list[Buffer], block: memoryview) -> None:
    """Write the planes of its elements into a block."""
    if len(planes) == 1:
        block[:] = planes[0]
        return
    words = np.frombuffer(block, dtype=_WORDS[len(planes)])
    low, *middle, high = (np.frombuffer(plane, dtype=np.uint8) for plane in planes)
    words[:] = high
    for plane in reversed([low, *middle]):
        np.left_shift(words, 8, out=words)
        np.bitwise_or(words, plane, out=words)
