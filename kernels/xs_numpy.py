"""The lossless codec of bfloat16 numbers, with numpy alone.

Sign and mantissa of such numbers are noise, their exponents are not: nearly all of them lie in a
window of 7 or 15 neighbouring values. So a number becomes a code of 3 or 4 bits, its exponent less
the window's base, and a byte of sign and mantissa; a code of all ones says that the exponent is in
a list, in order. layout.py has the bytes. Base and width are those that make the result smallest,
which the counts of the exponents alone tell.

An entropy coder (zstd over the byte plane, kernels/lossless.py) gains 3 to 5 % more and is two to
three times as slow; a device would have to decode it bit by bit.

numpy works in whole passes, so what it does here is cut into blocks that stay in the cache.
"""

import struct
from functools import lru_cache
from typing import Final

import numpy as np

from respkv.errors import PageCorrupt
from respkv.kernels.layout import (
    ALIGN_BYTES,
    XS_BLOCK,
    XS_INFO_BYTES,
    PlaneLayout,
    num_groups,
    xs_layout,
)

WIDTHS: Final = (3, 4)
_INFO: Final = struct.Struct("<BB2xI8x")
_STEP: Final = 16 * XS_BLOCK  # numbers at a time
_COUNTED: Final = 1 << 18
_EXPONENTS: Final = 256
# The codes of escapes. Against a scalar numpy's minimum is ten times as slow.
_LIMITS: Final = {width: np.full(_STEP, (1 << width) - 1, np.uint8) for width in WIDTHS}

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Words = np.ndarray[tuple[int], np.dtype[np.uint16]]


def encode(words: Words) -> bytearray | None:
    """Encode a plane.

    words:   the numbers as they are in memory, [N] uint16, contiguous.
    Returns: the bytes of the plane, or None when they would not be fewer than 2 N.
    """
    count = words.size
    base, width, num_escapes = choose_window(_histogram(words), count)
    layout = _front(count, width)
    at = layout["escapes"].offset
    nbytes = at + _aligned(num_escapes)
    if nbytes >= 2 * count:
        return None
    stored = bytearray(nbytes)
    _INFO.pack_into(stored, 0, base, width, num_escapes)
    view = np.frombuffer(stored, np.uint8)
    starts, codes, rest = (_section(view, layout, name) for name in ("starts", "codes", "rest"))
    starts = starts.view("<u4")
    escapes = view[at : at + num_escapes]
    exponents = np.empty(min(count, _STEP), np.uint8)
    found = 0
    for start in range(0, count, _STEP):
        part = words[start : start + _STEP]
        there = exponents[: part.size]
        _split(part, there, rest[start : start + part.size])
        numbers = np.minimum(there - np.uint8(base), _LIMITS[width][: part.size])
        places = np.flatnonzero(numbers == _LIMITS[width][0])
        bounds = np.arange(0, part.size, XS_BLOCK)
        block = start // XS_BLOCK
        starts[block : block + bounds.size] = np.searchsorted(places, bounds) + found
        escapes[found : found + places.size] = there[places]
        found += places.size
        _pack(numbers, width, codes[start // 8 * width :][: num_groups(part.size, 8) * width])
    assert found == num_escapes
    return stored


def decode(stored: memoryview, into: Words) -> None:
    """Decode a plane into its numbers, [N] uint16, contiguous.

    Raises PageCorrupt when ``stored`` is not a plane of so many numbers; ``into`` holds anything
    then. It takes memory for one block beside ``into``.
    """
    count = into.size
    view = np.frombuffer(stored, np.uint8)
    if view.size < XS_INFO_BYTES:
        raise PageCorrupt("a plane of codec xs is cut short")
    base, width, num_escapes = _INFO.unpack_from(stored)
    if _INFO.pack(base, width, num_escapes) != stored[:XS_INFO_BYTES] or (
        width not in WIDTHS or base + (1 << width) > _EXPONENTS + 1 or num_escapes > count
    ):
        raise PageCorrupt(f"a plane of codec xs cannot have {width} bits, {num_escapes} escapes")
    layout = _front(count, width)
    at = layout["escapes"].offset
    nbytes = at + _aligned(num_escapes)
    if nbytes != view.size:
        raise PageCorrupt(f"a plane of codec xs has {view.size} bytes, not {nbytes}")
    starts, codes, rest = (_section(view, layout, name) for name in ("starts", "codes", "rest"))
    starts = starts.view("<u4")
    escapes = view[at : at + num_escapes]
    found = 0
    for start in range(0, count, _STEP):
        part = into[start : start + _STEP]
        unpacked = _unpack(codes[start // 8 * width :], width, part.size)
        exponents = unpacked[: part.size]
        places = np.flatnonzero(exponents == _LIMITS[width][0])
        bounds = np.searchsorted(places, np.arange(0, part.size, XS_BLOCK)) + found
        block = start // XS_BLOCK
        is_wrong = found + places.size > num_escapes or unpacked[part.size :].any()
        if is_wrong or (bounds != starts[block:][: bounds.size]).any():
            raise PageCorrupt("a plane of codec xs has other codes than its blocks say")
        exponents += np.uint8(base)
        exponents[places] = escapes[found : found + places.size]
        found += places.size
        _join(exponents, rest[start : start + part.size], part)
    if found != num_escapes:
        raise PageCorrupt(f"a plane of codec xs has {found} escapes, not {num_escapes}")


def choose_window(counts: np.ndarray, count: int) -> tuple[int, int, int]:
    """Choose the window of exponents that makes a plane smallest.

    counts:  [256], how often each exponent is there; ``count`` of them in all.
    Returns: the window's lowest exponent, the lowest of those that do equally well; the width of a
             code, 3 when both do; and how many exponents lie outside.
    """
    sums = np.empty(_EXPONENTS + 1, np.intp)
    sums[0] = 0
    counts.cumsum(out=sums[1:])
    best: tuple[int, int, int, int] | None = None
    for width in WIDTHS:
        front = _front(count, width).nbytes
        if best is not None and best[0] <= front:
            break  # wider codes alone take more
        span = (1 << width) - 1
        inside = sums[span:] - sums[:-span]
        base = int(inside.argmax())
        num_escapes = count - int(inside[base])
        nbytes = front + _aligned(num_escapes)
        if best is None or nbytes < best[0]:
            best = (nbytes, base, width, num_escapes)
    assert best is not None
    return best[1:]


@lru_cache(maxsize=256)
def _front(count: int, width: int) -> PlaneLayout:
    """Return the layout of a plane up to its escapes, which are behind everything else."""
    return xs_layout(count, width=width, num_escapes=0)


def _section(view: Bytes, layout: PlaneLayout, name: str) -> Bytes:
    section = layout[name]
    return view[section.offset : section.offset + section.nbytes]


def _aligned(nbytes: int) -> int:
    return num_groups(nbytes, ALIGN_BYTES) * ALIGN_BYTES


def _split(words: Words, exponents: Bytes, rest: Bytes) -> None:
    """Take numbers apart: 8 bits of exponent; sign and 7 bits of mantissa."""
    exponents[:] = words >> 7  # narrowed, which drops the sign
    rest[:] = words >> 8
    np.bitwise_and(rest, 0x80, out=rest)
    low = words.astype(np.uint8)
    np.bitwise_and(low, 0x7F, out=low)
    np.bitwise_or(rest, low, out=rest)


def _join(exponents: Bytes, rest: Bytes, words: Words) -> None:
    """Put numbers together."""
    words[:] = exponents
    np.left_shift(words, 7, out=words)
    spread = rest.astype(np.uint16)
    np.multiply(spread, 0x0101, out=spread)
    np.bitwise_and(spread, 0x807F, out=spread)
    np.bitwise_or(words, spread, out=words)


def _histogram(words: Words) -> np.ndarray:
    """Count each of the 256 exponents."""
    counts = np.zeros(_EXPONENTS, np.intp)
    for start in range(0, words.size, _COUNTED):
        part = (words[start : start + _COUNTED] >> 7).astype(np.uint8)
        if part.size < _COUNTED:
            counts += np.bincount(part, minlength=_EXPONENTS)
        else:
            # Two at a time: half as many steps, which is what it takes time for.
            pairs = np.bincount(part.view(np.uint16), minlength=_EXPONENTS**2)
            table = pairs.reshape(_EXPONENTS, _EXPONENTS)
            counts += table.sum(axis=0) + table.sum(axis=1)
    return counts


def _pack(codes: Bytes, width: int, into: Bytes) -> None:
    """Pack codes, a byte each, into ``width`` bits each; what fills no group is filled with zero."""
    if codes.size % 32:
        padded = np.zeros(num_groups(codes.size, 32) * 32, np.uint8)
        padded[: codes.size] = codes
        codes = padded
    wide = codes.view("<u8")
    if width == 4:
        wide = (wide | wide >> 4) & 0x00FF00FF00FF00FF
        wide = (wide | wide >> 8) & 0x0000FFFF0000FFFF
        into[:] = (wide | wide >> 16).astype("<u4").view(np.uint8)[: into.size]
        return
    wide = (wide | wide >> 5) & 0x003F003F003F003F
    wide = (wide | wide >> 10) & 0x00000FFF00000FFF
    # 8 codes are 24 bits now; four such groups become three words.
    first, second, third, fourth = ((wide | wide >> 20) & 0xFFFFFF).reshape(-1, 4).T
    packed = np.empty((first.size, 3), "<u4")
    packed[:, 0] = first | second << 24
    packed[:, 1] = second >> 8 | third << 16
    packed[:, 2] = third >> 16 | fourth << 8
    into[:] = packed.reshape(-1).view(np.uint8)[: into.size]


def _unpack(stored: Bytes, width: int, count: int) -> Bytes:
    """Return ``count`` codes, a byte each, and what is there behind the last one."""
    groups = num_groups(count, 32)
    whole = stored[: groups * 4 * width]
    if whole.size < groups * 4 * width:
        padded = np.zeros(groups * 4 * width, np.uint8)
        padded[: whole.size] = whole
        whole = padded
    words = whole.view("<u4")
    if width == 4:
        wide = words.astype("<u8")
        wide = (wide | wide << 16) & 0x0000FFFF0000FFFF
        wide = (wide | wide << 8) & 0x00FF00FF00FF00FF
        wide = (wide | wide << 4) & 0x0F0F0F0F0F0F0F0F
        codes: Bytes = wide.view(np.uint8)
        return codes
    first, second, third = words.reshape(-1, 3).T
    wide = np.empty((groups, 4), "<u8")
    wide[:, 0] = first & 0xFFFFFF
    wide[:, 1] = first >> 24 | (second & 0xFFFF) << 8
    wide[:, 2] = second >> 16 | (third & 0xFF) << 16
    wide[:, 3] = third >> 8
    wide = (wide | wide << 20) & 0x00000FFF00000FFF
    wide = (wide | wide << 10) & 0x003F003F003F003F
    wide = (wide | wide << 5) & 0x0707070707070707
    codes = wide.reshape(-1).view(np.uint8)
    return codes
