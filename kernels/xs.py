"""``xs``: bfloat16 without loss; exponents as 3 or 4 bits, since few values of them are common.

Sign and mantissa are noise and stay as they are. Of the exponents a window of 7 (or 15) holds all
but a few: a code is the distance from the window's base, and all ones is an escape whose exponent
stands in a list of its own. ``starts`` says how many escapes come before each block, so that blocks
can be decoded in parallel. An entropy coder would come to 10.6 bits a number where this takes 11.2
to 11.6, but not at the speed of memory.

Base and width are those of the smallest result; the lowest base and width 3 among equals.

Source: SplitZip, 2026, arXiv:2605.01708, has a 4-bit code book of exponents; window and escape
list are our own.
"""

import struct
from typing import Final

import torch
from torch import Tensor

from respkv.errors import PageCorrupt
from respkv.kernels import bits
from respkv.kernels.layout import (
    XS_BLOCK,
    XS_INFO_BYTES,
    Codec,
    PlaneLayout,
    num_groups,
    plane_layout,
    xs_layout,
)

INFO: Final = struct.Struct("<BBxxI8x")
WIDTHS: Final = (3, 4)
assert INFO.size == XS_INFO_BYTES


def encode(plane: Tensor) -> Tensor | None:
    """Encode a plane.

    plane:   bfloat16, any shape and strides.
    Returns: [bytes] uint8, as ``xs_layout`` has it; None where that would not be smaller.
    """
    words = plane.contiguous().view(torch.int16).flatten()
    numbers = words.numel()
    if not numbers:
        return None
    exponents = (words >> 7).to(torch.uint8)  # the sign is cut off
    base, width, layout = _choose(torch.bincount(exponents, minlength=256))
    if layout.nbytes >= plane_layout(Codec.RAW, "key", 1, 1, numbers, 2).nbytes:
        return None
    escape = (1 << width) - 1
    codes = words.new_zeros(num_groups(numbers, XS_BLOCK) * XS_BLOCK, dtype=torch.uint8)
    # What is below the base wraps around and so is beyond the window as well.
    torch.sub(exponents, base, out=codes[:numbers]).clamp_(max=escape)
    escapes = exponents.masked_select(codes[:numbers] == escape)
    encoded = words.new_zeros(layout.nbytes, dtype=torch.uint8)
    info = INFO.pack(base, width, escapes.numel())
    encoded[:XS_INFO_BYTES] = torch.frombuffer(bytearray(info), dtype=torch.uint8)
    _section(encoded, layout, "starts").view(torch.int32).copy_(_starts(codes, escape))
    bits.pack(codes[: num_groups(numbers, 8) * 8], width, _section(encoded, layout, "codes"))
    _section(encoded, layout, "rest").copy_(((words >> 8) & 128) | (words & 127))
    _section(encoded, layout, "escapes").copy_(escapes)
    return encoded


def decode(encoded: Tensor, out: Tensor) -> None:
    """Decode a plane.

    encoded: [bytes] uint8, contiguous.
    out:     bfloat16, any shape and strides, written.
    Raises PageCorrupt when these are not the bytes of a plane of so many numbers.
    """
    numbers = out.numel()
    base, width, layout = _check_info(encoded, numbers)
    escape = (1 << width) - 1
    codes = encoded.new_zeros(num_groups(numbers, XS_BLOCK) * XS_BLOCK)
    inside = codes[: num_groups(numbers, 8) * 8]
    inside.copy_(bits.unpack(_section(encoded, layout, "codes"), width))
    if bool((codes[numbers:] != 0).any()):
        raise PageCorrupt("xs: codes after the last number")
    escapes = _section(encoded, layout, "escapes")
    starts = _section(encoded, layout, "starts").view(torch.int32)
    if not torch.equal(starts, _starts(codes, escape)):
        raise PageCorrupt("xs: escapes are not where their blocks say")
    is_escape = codes[:numbers] == escape
    if int(is_escape.sum()) != escapes.numel():
        raise PageCorrupt(f"xs: {escapes.numel()} escapes, and another number of codes for them")
    exponents = codes[:numbers].add_(base)
    exponents.masked_scatter_(is_escape, escapes)
    # As int8 the rest keeps its sign on the way to 16 bits.
    rest = _section(encoded, layout, "rest").view(torch.int8).to(torch.int16)
    words = (rest & -32641).bitwise_or_(exponents.to(torch.int16) << 7)
    out.copy_(words.view(torch.bfloat16).view(out.shape))


def _choose(histogram: Tensor) -> tuple[int, int, PlaneLayout]:
    # Returns base, width and layout of the smallest result.
    numbers = int(histogram.sum())
    below = torch.cat((histogram.new_zeros(1), histogram.cumsum(0)))
    chosen: tuple[int, int, PlaneLayout] | None = None
    for width in WIDTHS:
        window = (1 << width) - 1
        held = below[window:] - below[:-window]  # by base
        most = held.max()
        base = int((held == most).nonzero()[0])
        layout = xs_layout(numbers, width=width, num_escapes=numbers - int(most))
        if chosen is None or layout.nbytes < chosen[2].nbytes:
            chosen = base, width, layout
    assert chosen is not None
    return chosen


def _check_info(encoded: Tensor, numbers: int) -> tuple[int, int, PlaneLayout]:
    if encoded.numel() < XS_INFO_BYTES:
        raise PageCorrupt(f"xs: {encoded.numel()} bytes are no plane")
    info = bytes(encoded[:XS_INFO_BYTES].tolist())
    base, width, escapes = INFO.unpack(info)
    if info != INFO.pack(base, width, escapes) or width not in WIDTHS or escapes > numbers:
        raise PageCorrupt(f"xs: base {base}, width {width}, {escapes} escapes")
    layout = xs_layout(numbers, width=width, num_escapes=escapes)
    if base + (1 << width) > 257 or encoded.numel() != layout.nbytes:
        raise PageCorrupt(f"xs: {encoded.numel()} bytes, base {base}; not {layout.nbytes} bytes")
    return base, width, layout


def _starts(codes: Tensor, escape: int) -> Tensor:
    # How many escapes come before each block; codes are whole blocks.
    per_block = (codes == escape).view(-1, XS_BLOCK).sum(1)
    return (per_block.cumsum(0) - per_block).to(torch.int32)


def _section(encoded: Tensor, layout: PlaneLayout, name: str) -> Tensor:
    _, offset, nbytes = layout[name]
    return encoded[offset : offset + nbytes]
