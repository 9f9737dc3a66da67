"""Kernels of groups of tokens, a low end and a step for each channel: keys of i8 and i4."""

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
def encode_columns_kernel(
    table, like, slots, out, out_page, out_layer, fits, fits_page, fits_layer,
    BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr,
    CODES: tl.constexpr, SIDE: tl.constexpr, TOKENS: tl.constexpr, LAYERS: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Encode one group of tokens, at most ROWS, of WIDTH columns (head and channel).

    A head is SPAN columns: DIM, and one more where an odd one would share a byte with the next head.
    """
    COLUMN_TILES: tl.constexpr = (HEADS * SPAN + WIDTH - 1) // WIDTH
    TILES: tl.constexpr = (TOKENS + GROUP - 1) // GROUP * COLUMN_TILES
    LEVELS: tl.constexpr = 2**BITS - 1
    page, layer, tile = place_of_program(LAYERS, TILES)
    base = plane_base(table, like, layer, SIDE, ALIGNED)
    group = tile // COLUMN_TILES
    token = group * GROUP + tl.arange(0, ROWS)
    in_page = token < TOKENS
    start, is_there = token_starts(
        slots, page * TOKENS + token, in_page, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN
    )
    column = (tile % COLUMN_TILES) * WIDTH + tl.arange(0, WIDTH)
    head = column // SPAN
    d = column % SPAN
    in_row = (column < HEADS * SPAN) & (d < DIM)
    x = tl.load(
        base + start[:, None] + (head * STRIDE_HEAD + d)[None, :],
        mask=is_there[:, None] & in_row[None, :],
        other=0,
    ).to(tl.float32)

    key = ordered(x)
    if TOKENS % GROUP == 0:
        low, high = tl.min(key, axis=0), tl.max(key, axis=0)
    else:
        low = tl.min(tl.where(in_page[:, None], key, 0x7FFFFFFF), axis=0)
        high = tl.max(tl.where(in_page[:, None], key, -0x7FFFFFFF), axis=0)
    lows, steps, large, small = parameters(low, high, LEVELS)
    plane = out + page * out_page + layer * out_layer
    at = group * HEADS * DIM + head * DIM + d
    tl.store(plane.to(tl.pointer_type(tl.float16)) + at, lows, mask=in_row)
    tl.store((plane + STEPS).to(tl.pointer_type(tl.float16)) + at, steps, mask=in_row)

    inverse = reciprocal(steps.to(tl.float32))
    codes = quantize(x, lows.to(tl.float32)[None, :], inverse[None, :], LEVELS)
    if BITS == 8:
        number = token[:, None] * (HEADS * SPAN) + column[None, :]
        tl.store(plane + CODES + number, codes, mask=in_page[:, None] & in_row[None, :])
    else:
        packed = pack_pairs(codes, ROWS, WIDTH)
        byte = (tile % COLUMN_TILES) * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
        number = token[:, None] * (HEADS * SPAN // 2) + byte[None, :]
        in_tile = in_page[:, None] & (byte < HEADS * SPAN // 2)[None, :]
        tl.store(plane + CODES + number, packed, mask=in_tile)
    unfit = is_unfit(tl.max(large, axis=0), tl.min(small, axis=0))
    tl.store(fits + page * fits_page + layer * fits_layer, 0, mask=unfit)


@triton.jit
def decode_columns_kernel(
    table, like, slots, encoded, encoded_page, encoded_layer,
    INTERPRETED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    STEPS: tl.constexpr, CODES: tl.constexpr, SIDE: tl.constexpr, TOKENS: tl.constexpr,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr, STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Decode what ``encode_columns_kernel`` wrote: low end + code * step."""
    COLUMN_TILES: tl.constexpr = (HEADS * SPAN + WIDTH - 1) // WIDTH
    TILES: tl.constexpr = (TOKENS + GROUP - 1) // GROUP * COLUMN_TILES
    page, layer, tile = place_of_program(LAYERS, TILES)
    base = plane_base(table, like, layer, SIDE, ALIGNED)
    group = tile // COLUMN_TILES
    token = group * GROUP + tl.arange(0, ROWS)
    in_page = token < TOKENS
    start, is_there = token_starts(
        slots, page * TOKENS + token, in_page, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN
    )
    column = (tile % COLUMN_TILES) * WIDTH + tl.arange(0, WIDTH)
    head = column // SPAN
    d = column % SPAN
    in_row = (column < HEADS * SPAN) & (d < DIM)

    plane = encoded + page * encoded_page + layer * encoded_layer
    at = group * HEADS * DIM + head * DIM + d
    m = tl.load(plane.to(tl.pointer_type(tl.float16)) + at, mask=in_row, other=0.0)
    s = tl.load((plane + STEPS).to(tl.pointer_type(tl.float16)) + at, mask=in_row, other=0.0)
    if BITS == 8:
        number = token[:, None] * (HEADS * SPAN) + column[None, :]
        in_tile = in_page[:, None] & in_row[None, :]
        codes = tl.load(plane + CODES + number, mask=in_tile, other=0)
    else:
        byte = (tile % COLUMN_TILES) * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
        number = token[:, None] * (HEADS * SPAN // 2) + byte[None, :]
        in_tile = in_page[:, None] & (byte < HEADS * SPAN // 2)[None, :]
        packed = tl.load(plane + CODES + number, mask=in_tile, other=0)
        codes = unpack_pairs(packed, ROWS, WIDTH)
    x = number_of(codes) * s.to(tl.float32)[None, :] + m.to(tl.float32)[None, :]
    tl.store(
        base + start[:, None] + (head * STRIDE_HEAD + d)[None, :],
        to_element(x, like.dtype.element_ty, INTERPRETED),
        mask=is_there[:, None] & in_row[None, :],
    )
