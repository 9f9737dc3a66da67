"""Kernels of rows with one scale each: f8, and values of i8."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from respkv.kernels.paged_triton import place_of_program, plane_base, token_starts
from respkv.kernels.rounding_triton import (
    code_of,
    from_e4m3,
    number_of,
    reciprocal,
    to_e4m3,
    to_element,
)


@triton.jit
def encode_rows_kernel(
    table, like, slots, out, out_page, out_layer, fits, fits_page, fits_layer,
    F8: tl.constexpr, CAST: tl.constexpr, SIDE: tl.constexpr, CODES: tl.constexpr,
    TOKENS: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, STRIDE_BLOCK: tl.constexpr, STRIDE_TOKEN: tl.constexpr,
    STRIDE_HEAD: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Encode ROWS rows (token and head) of a plane, each with a scale of its own.

    CAST: round to e4m3 by the GPU's instruction. CODES: where the codes begin in a plane's bytes.
    """
    page, layer, tile = place_of_program(LAYERS, (TOKENS * HEADS + ROWS - 1) // ROWS)
    base = plane_base(table, like, layer, SIDE, ALIGNED)
    row = tile * ROWS + tl.arange(0, ROWS)
    in_plane = row < TOKENS * HEADS
    start, is_there = token_starts(
        slots, page * TOKENS + row // HEADS, in_plane, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN
    )
    start += (row % HEADS) * STRIDE_HEAD
    d = tl.arange(0, WIDTH)
    in_row = (d < DIM)[None, :]
    x = tl.load(base + start[:, None] + d[None, :], mask=is_there[:, None] & in_row, other=0)
    x = x.to(tl.float32)

    # As integers, magnitudes have the same order, and NaN and infinity are the greatest.
    amax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    amax = amax_bits.to(tl.float32, bitcast=True)  # pyright: ignore[reportAttributeAccessIssue]
    plane = out + page * out_page + layer * out_layer
    if F8:
        s = amax * (1 / 448)
        good = (s >= 1.1754943508222875e-38) & (amax <= 1.7014118346046923e38)  # 2^-126, 2^127
        s = tl.where(amax == 0.0, 1.0, s)
        tl.store(plane.to(tl.pointer_type(tl.float32)) + row, s, mask=in_plane)
        y = x * reciprocal(s)[:, None]
        y = tl.minimum(tl.maximum(y, -448.0), 448.0)
        codes = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if CAST else to_e4m3(y)
    else:
        half = (amax * (1 / 127)).to(tl.float16)
        s = half.to(tl.float32)
        good = (s >= 3.814697265625e-06) & (s <= 65504.0)  # 2^-18
        s = tl.where(s == 0.0, 1.0, s)
        tl.store(plane.to(tl.pointer_type(tl.float16)) + row, s.to(tl.float16), mask=in_plane)
        y = x * reciprocal(s)[:, None]
        codes = code_of(tl.minimum(tl.maximum(y, -127.0), 127.0))
    number = row[:, None] * DIM + d[None, :]
    tl.store(plane + CODES + number, codes, mask=in_plane[:, None] & in_row)
    bad = tl.max((in_plane & (amax_bits != 0) & ~good).to(tl.int32), axis=0)
    tl.store(fits + page * fits_page + layer * fits_layer, 0, mask=bad != 0)


@triton.jit
def decode_rows_kernel(
    table, like, slots, encoded, encoded_page, encoded_layer,
    F8: tl.constexpr, INTERPRETED: tl.constexpr, SIDE: tl.constexpr, CODES: tl.constexpr,
    TOKENS: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, STRIDE_BLOCK: tl.constexpr, STRIDE_TOKEN: tl.constexpr,
    STRIDE_HEAD: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Decode what ``encode_rows_kernel`` wrote: code times scale."""
    page, layer, tile = place_of_program(LAYERS, (TOKENS * HEADS + ROWS - 1) // ROWS)
    base = plane_base(table, like, layer, SIDE, ALIGNED)
    row = tile * ROWS + tl.arange(0, ROWS)
    in_plane = row < TOKENS * HEADS
    start, is_there = token_starts(
        slots, page * TOKENS + row // HEADS, in_plane, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN
    )
    start += (row % HEADS) * STRIDE_HEAD
    d = tl.arange(0, WIDTH)
    in_row = (d < DIM)[None, :]

    plane = encoded + page * encoded_page + layer * encoded_layer
    number = row[:, None] * DIM + d[None, :]
    codes = tl.load(plane + CODES + number, mask=in_plane[:, None] & in_row, other=0)
    if F8:
        s = tl.load(plane.to(tl.pointer_type(tl.float32)) + row, mask=in_plane, other=0.0)
        q = from_e4m3(codes)
    else:
        s = tl.load(plane.to(tl.pointer_type(tl.float16)) + row, mask=in_plane, other=0.0)
        s = s.to(tl.float32)
        q = number_of(codes ^ 0x80) - 128.0
    x = to_element(q * s[:, None], like.dtype.element_ty, INTERPRETED)
    tl.store(base + start[:, None] + d[None, :], x, mask=is_there[:, None] & in_row)
