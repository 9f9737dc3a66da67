"""Kernels of rows in pieces of 32 channels, a low end and a step for each: values of i4."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from respkv.kernels.interval_triton import (
    is_unfit,
    ordered,
    pack_pairs,
    parameters,
    quantize,
    unpack_pairs,
)
from respkv.kernels.paged_triton import place_of_program, plane_base, token_starts
from respkv.kernels.rounding_triton import number_of, reciprocal, to_element


@triton.jit
def encode_pieces_kernel(
    table, like, slots, out, out_page, out_layer, fits, fits_page, fits_layer,
    LEVELS: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, CODES: tl.constexpr,
    SIDE: tl.constexpr, TOKENS: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, STRIDE_BLOCK: tl.constexpr, STRIDE_TOKEN: tl.constexpr,
    STRIDE_HEAD: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Encode ROWS rows (token and head) in groups of GROUP channels, codes up to LEVELS."""
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

    key = ordered(x)
    lower, upper = key, key
    if DIM % GROUP:
        lower, upper = tl.where(in_row, key, 0x7FFFFFFF), tl.where(in_row, key, -0x7FFFFFFF)
    low = tl.min(tl.reshape(lower, (ROWS, WIDTH // GROUP, GROUP)), axis=2)
    high = tl.max(tl.reshape(upper, (ROWS, WIDTH // GROUP, GROUP)), axis=2)
    g = tl.arange(0, WIDTH // GROUP)
    in_groups = in_plane[:, None] & (g * GROUP < DIM)[None, :]
    if DIM % GROUP:
        low, high = tl.where(in_groups, low, 0), tl.where(in_groups, high, 0)
    lows, steps, large, small = parameters(low, high, LEVELS)
    plane = out + page * out_page + layer * out_layer
    at = row[:, None] * ((DIM + GROUP - 1) // GROUP) + g[None, :]
    tl.store(plane.to(tl.pointer_type(tl.float16)) + at, lows, mask=in_groups)
    tl.store((plane + STEPS).to(tl.pointer_type(tl.float16)) + at, steps, mask=in_groups)

    x = tl.reshape(x, (ROWS, WIDTH // GROUP, GROUP))
    inverse = reciprocal(steps.to(tl.float32))
    codes = quantize(x, lows.to(tl.float32)[:, :, None], inverse[:, :, None], LEVELS)
    codes = tl.reshape(codes, (ROWS, WIDTH))
    if DIM % 2:
        codes = tl.where(in_row, codes, 0)
    byte = tl.arange(0, WIDTH // 2)
    number = row[:, None] * ((DIM + 1) // 2) + byte[None, :]
    in_bytes = in_plane[:, None] & (byte < (DIM + 1) // 2)[None, :]
    tl.store(plane + CODES + number, pack_pairs(codes, ROWS, WIDTH), mask=in_bytes)
    unfit = is_unfit(tl.max(tl.max(large, axis=1), axis=0), tl.min(tl.min(small, axis=1), axis=0))
    tl.store(fits + page * fits_page + layer * fits_layer, 0, mask=unfit)


@triton.jit
def decode_pieces_kernel(
    table, like, slots, encoded, encoded_page, encoded_layer,
    INTERPRETED: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, CODES: tl.constexpr,
    SIDE: tl.constexpr, TOKENS: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Decode what ``encode_pieces_kernel`` wrote: low end + code * step."""
    page, layer, tile = place_of_program(LAYERS, (TOKENS * HEADS + ROWS - 1) // ROWS)
    base = plane_base(table, like, layer, SIDE, ALIGNED)
    row = tile * ROWS + tl.arange(0, ROWS)
    in_plane = row < TOKENS * HEADS
    start, is_there = token_starts(
        slots, page * TOKENS + row // HEADS, in_plane, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN
    )
    start += (row % HEADS) * STRIDE_HEAD

    plane = encoded + page * encoded_page + layer * encoded_layer
    g = tl.arange(0, WIDTH // GROUP)
    in_groups = in_plane[:, None] & (g * GROUP < DIM)[None, :]
    at = row[:, None] * ((DIM + GROUP - 1) // GROUP) + g[None, :]
    m = tl.load(plane.to(tl.pointer_type(tl.float16)) + at, mask=in_groups, other=0.0)
    s = tl.load((plane + STEPS).to(tl.pointer_type(tl.float16)) + at, mask=in_groups, other=0.0)
    byte = tl.arange(0, WIDTH // 2)
    number = row[:, None] * ((DIM + 1) // 2) + byte[None, :]
    in_bytes = in_plane[:, None] & (byte < (DIM + 1) // 2)[None, :]
    packed = tl.load(plane + CODES + number, mask=in_bytes, other=0)
    codes = tl.reshape(unpack_pairs(packed, ROWS, WIDTH), (ROWS, WIDTH // GROUP, GROUP))
    x = number_of(codes) * s.to(tl.float32)[:, :, None] + m.to(tl.float32)[:, :, None]
    x = to_element(tl.reshape(x, (ROWS, WIDTH)), like.dtype.element_ty, INTERPRETED)
    d = tl.arange(0, WIDTH)
    tl.store(base + start[:, None] + d[None, :], x, mask=is_there[:, None] & (d < DIM)[None, :])
