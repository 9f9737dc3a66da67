"""``rh4``, ``rh3``, ``rh2`` and ``rhz*`` on a GPU: kernels/rotated.py, fused with a paged cache.

A program rotates tiles of rows of one plane. The rows of a tile of keys are tokens of one head, so
that the mean over the group's tokens, which must be known before any of them is encoded, is the
program's own affair: it reads the group twice, the second time out of a cache. The mean is not
taken off the numbers but, rotated, off the rotated numbers. So the tensor cores get the numbers as
they are, exact in 16 bits. Values are rows in any order.

The matrix is 32 KiB at D = 128 and comes out of a cache for each program, which is why a program has
several tiles (ITEMS) where there is work enough.

EXACT is the order of additions of the reference, for equality bit by bit: the interpreter's, and at
hand on a GPU to check it. Otherwise numbers that lie on the border of two codes may get either.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What is a tensor, a constant or a tuple in a kernel, only Triton knows.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from respkv.kernels.hadamard_triton import butterfly, rotated, rotated_back, rotated_mean, tree_sum
from respkv.kernels.layout import GROUP_TOKENS_MEAN
from respkv.kernels.packing_triton import load_codes, store_codes
from respkv.kernels.paged_triton import place_of_program, plane_base, token_starts
from respkv.kernels.quantizer_triton import quantize_exactly, quantize_fast
from respkv.kernels.rounding_triton import is_finite, to_element

KEY = tl.constexpr(0)
GROUP = tl.constexpr(GROUP_TOKENS_MEAN)
ROW_MAX_MIN_BITS = tl.constexpr(0x39000000)  # the float32 bits of 2^-13, rotated.ROW_MAX_MIN
FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def encode_kernel(
    table, like, slots, out, fits, matrix_ptr, signs_ptr,
    out_page, out_layer, fits_page, fits_layer,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr, STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr,
    ALIGNED: tl.constexpr, TOKENS: tl.constexpr, SIDE: tl.constexpr, GAINS: tl.constexpr,
    CODES: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, STEP_INVERSE: tl.constexpr,
    LEVELS: tl.constexpr, ROUNDING: tl.constexpr, UNBIASED: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, PRODUCT: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, ITEMS: tl.constexpr, PARTS: tl.constexpr,
    EXACT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Encode ITEMS groups of keys, of one head each, or TILES tiles of values.

    GAINS, CODES: where these sections are in a plane; means are at 0. LEVELS: how many codes.
    """
    page, layer, part = place_of_program(LAYERS, PARTS)
    base = plane_base(table, like, layer, SIDE, ALIGNED)
    plane = tl.multiple_of(out + page * out_page + layer * out_layer, 16)
    column = tl.arange(0, PADDED)
    signs = tl.load(signs_ptr + column, mask=column < WIDTH, other=0.0)
    matrix = None
    if not EXACT:
        matrix = load_square(matrix_ptr, PRODUCT)
    mean = tl.zeros([PADDED], tl.float32)
    bad = tl.zeros([ROWS], tl.int1)
    for item in range(ITEMS):
        unit = part * ITEMS + item
        if SIDE == KEY:
            sums = sum_of_group(
                base, slots, unit, page * TOKENS, HEADS, DIM, BLOCK_TOKENS, STRIDE_BLOCK,
                STRIDE_TOKEN, STRIDE_HEAD, TOKENS, PADDED, ROWS, TILES, EXACT,
            )  # fmt: skip
            left = TOKENS - unit // HEADS * GROUP
            count = tl.full([PADDED], 1.0, tl.float32) * tl.minimum(left, GROUP)
            stored = tl.math.div_rn(sums + 0.0, count).to(tl.float16)
            inside = column < tl.where(left > 0, DIM, 0)
            tl.store(
                plane.to(tl.pointer_type(tl.float16)) + unit * DIM + column, stored, mask=inside
            )
            mean = tl.where(inside, stored.to(tl.float32), 0.0)
            bad = bad | (tl.max((~is_finite(mean)).to(tl.int32), 0) > 0)
            if not EXACT:
                mean = rotated_mean(mean, matrix, signs, WIDTH, BLOCK, INTERPRETED)
        for tile in range(TILES):
            token, head, mask = rows_of(unit, tile, HEADS, TOKENS, SIDE, ROWS, TILES)
            numbers = load_numbers(
                base, slots, page * TOKENS + token, head, mask, DIM, BLOCK_TOKENS, STRIDE_BLOCK,
                STRIDE_TOKEN, STRIDE_HEAD, PADDED,
            )  # fmt: skip
            if EXACT:
                rows = (numbers.to(tl.float32) - mean[None, :]) * signs[None, :]
                rows = butterfly(rows, 1, BLOCK) * SCALE
                codes, gain, norm = quantize_exactly(
                    rows, STEP, STEP_INVERSE, LEVELS, ROUNDING, UNBIASED, WIDTH
                )
            else:
                rows = rotated(numbers, matrix, signs, WIDTH, BLOCK, INTERPRETED) - mean[None, :]
                codes, gain, norm = quantize_fast(
                    rows, STEP, STEP_INVERSE, SCALE, LEVELS, ROUNDING, UNBIASED, WIDTH
                )
            row = token * HEADS + head
            tl.store((plane + GAINS).to(tl.pointer_type(tl.float16)) + row, gain, mask=mask)
            store_codes(plane + CODES, row, mask, codes, BITS, WIDTH, ROWS, PADDED)
            size = tl.max(size_bits(numbers, INTERPRETED), 1)
            is_good = is_finite(gain.to(tl.float32)) & is_finite(norm)
            is_good = is_good & ((size == 0) | (size >= ROW_MAX_MIN_BITS))
            bad = bad | (mask & ~is_good)
    if tl.max(bad.to(tl.int32), 0) > 0:
        tl.store(fits + page * fits_page + layer * fits_layer, 0)


@triton.jit
def decode_kernel(
    table, like, slots, encoded, matrix_ptr, signs_ptr, encoded_page, encoded_layer,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr, STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr,
    ALIGNED: tl.constexpr, TOKENS: tl.constexpr, SIDE: tl.constexpr, GAINS: tl.constexpr,
    CODES: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, LEVELS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PRODUCT: tl.constexpr,
    SCALE: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, ITEMS: tl.constexpr,
    PARTS: tl.constexpr, EXACT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Decode what ``encode_kernel`` encodes, in the same shares."""
    page, layer, part = place_of_program(LAYERS, PARTS)
    base = plane_base(table, like, layer, SIDE, ALIGNED)
    plane = tl.multiple_of(encoded + page * encoded_page + layer * encoded_layer, 16)
    column = tl.arange(0, PADDED)
    signs = tl.load(signs_ptr + column, mask=column < WIDTH, other=0.0)
    matrix = None
    if not EXACT:
        matrix = load_square(matrix_ptr, PRODUCT)
    for item in range(ITEMS):
        unit = part * ITEMS + item
        if SIDE == KEY:
            inside = column < tl.where(unit // HEADS * GROUP < TOKENS, DIM, 0)
            means = plane.to(tl.pointer_type(tl.float16)) + unit * DIM
            mean = tl.load(means + column, mask=inside, other=0.0).to(tl.float32)
        for tile in range(TILES):
            token, head, mask = rows_of(unit, tile, HEADS, TOKENS, SIDE, ROWS, TILES)
            row = token * HEADS + head
            gains = (plane + GAINS).to(tl.pointer_type(tl.float16))
            gain = tl.load(gains + row, mask=mask, other=0.0).to(tl.float32)
            codes = load_codes(plane + CODES, row, mask, BITS, WIDTH, ROWS, PADDED)
            if EXACT:
                rows = (codes.to(tl.float32) - (LEVELS - 1) / 2) * STEP * gain[:, None]
                rows = butterfly(rows, 1, BLOCK) * SCALE * signs[None, :]
            else:
                rows = rotated_back(codes, matrix, signs, LEVELS, WIDTH, BLOCK, INTERPRETED)
                rows = rows * (gain * (STEP * SCALE))[:, None]
            if SIDE == KEY:
                rows += mean[None, :]
            if like.dtype.element_ty == tl.float16:
                rows = tl.minimum(tl.maximum(rows, -FP16_MAX), FP16_MAX)
            start, is_there = token_starts(
                slots, page * TOKENS + token, mask, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN
            )
            target = base + (start + head * STRIDE_HEAD)[:, None] + column[None, :]
            made = to_element(rows, like.dtype.element_ty, INTERPRETED)
            tl.store(target, made, mask=is_there[:, None] & (column < DIM)[None, :])


@triton.jit
def load_square(start, SIZE: tl.constexpr):
    """Load a matrix, [SIZE, SIZE]."""
    number = tl.arange(0, SIZE)
    return tl.load(start + number[:, None] * SIZE + number[None, :])


@triton.jit
def rows_of(
    unit, tile,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Return token (int64), head and existence of the rows of a tile, [ROWS] each."""
    if SIDE == KEY:
        within = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        token = unit // HEADS * GROUP + within
        return token, tl.zeros_like(token) + unit % HEADS, (within < GROUP) & (token < TOKENS)
    else:
        row = (unit.to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        return row // HEADS, row % HEADS, row < TOKENS * HEADS


@triton.jit
def load_numbers(
    base, slots, token, head, mask,
    DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Load rows [R, PADDED] of the cache; zeros where there is nothing."""
    start, is_there = token_starts(slots, token, mask, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN)
    column = tl.arange(0, PADDED)
    source = base + (start + head * STRIDE_HEAD)[:, None] + column[None, :]
    return tl.load(source, mask=is_there[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def size_bits(numbers, INTERPRETED: tl.constexpr):
    """Return the bits of |numbers| as float32: as integers they are in the same order.

    The interpreter takes subnormal bfloat16 for zeros when it converts them.
    """
    if INTERPRETED and numbers.dtype == tl.bfloat16:
        wide = numbers.to(tl.uint16, bitcast=True).to(tl.int32) << 16
    else:
        wide = numbers.to(tl.float32).to(tl.int32, bitcast=True)
    return wide & 0x7FFFFFFF


@triton.jit
def sum_of_group(
    base, slots, unit, first,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr, TOKENS: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return the sum over a group's tokens, [PADDED] float32. first: the page's first token."""
    if EXACT:
        token, head, mask = rows_of(unit, 0, HEADS, TOKENS, KEY, GROUP, 1)
        numbers = load_numbers(
            base, slots, first + token, head, mask, DIM, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN,
            STRIDE_HEAD, PADDED,
        )  # fmt: skip
        return tree_sum(tl.trans(numbers.to(tl.float32)))
    else:
        sums = tl.zeros([ROWS, PADDED], tl.float32)
        for tile in range(TILES):
            token, head, mask = rows_of(unit, tile, HEADS, TOKENS, KEY, ROWS, TILES)
            numbers = load_numbers(
                base, slots, first + token, head, mask, DIM, BLOCK_TOKENS, STRIDE_BLOCK,
                STRIDE_TOKEN, STRIDE_HEAD, PADDED,
            )  # fmt: skip
            sums += numbers.to(tl.float32)
        return tl.sum(sums, 0)
