"""``xs`` in kernels: the window of a plane's exponents, and where the escapes of its blocks go.

A program counts the exponents of a plane, block by block, and then every choice and every ``starts``
follows from the counts. Reading the plane once more is what that costs; blocks that wait for their
predecessors would save no reading, since the window must be known before the first can begin.

Counting is the work. A number adds 1 to one of 16 fields of 4 bits in a word of 64, a thread sums
eight such words, and fields are made wider as sums grow. 16 fields are exponents from a little below
the window of a sample on; the first and the last field also hold all that is beyond. With that it is
nearly always certain which window is best, and 3 bits the better width. Where it is not, all 256 are
counted by ``tl.histogram``, which before Triton 3.8 takes ten times as long.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What is a tensor, a constant or a tuple in a kernel, only Triton knows.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from respkv.kernels.exponent_blocks_triton import (
    BLOCK,
    EIGHTS,
    INFO,
    load_words,
    padded,
    size_of,
)
from respkv.kernels.paged_triton import place_of_program, plane_base

COUNTED = tl.constexpr(4)  # blocks at a time: 64 numbers for each thread of 8 warps
LISTED = tl.constexpr(64)  # starts at a time
SAMPLE = tl.constexpr(1024)
BELOW = tl.constexpr(4)  # fields below the window of the sample
NIBBLES = tl.constexpr(0x0F0F0F0F0F0F0F0F)
HALVES = tl.constexpr(0x00FF00FF00FF00FF)


@triton.jit
def window_kernel(
    table, like, slots, out, sizes, counts, out_page, out_layer,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr, STRIDE_TOKEN: tl.constexpr, STRIDE_HEAD: tl.constexpr,
    ALIGNED: tl.constexpr, TOKENS: tl.constexpr, SIDE: tl.constexpr, NUMBERS: tl.constexpr,
    BLOCKS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Write ``info``, ``starts`` and the size of a plane's encoding; 0 where raw is as small.

    counts: [planes, BLOCKS, 256] int16, scratch. sizes: [planes] int32.
    """
    page, layer, _ = place_of_program(LAYERS, 1)
    plane = tl.program_id(0).to(tl.int64)
    base = plane_base(table, like, layer, SIDE, ALIGNED)
    target = (out + page * out_page + layer * out_layer).to(tl.pointer_type(tl.int32))
    mine = counts + plane * (BLOCKS * 256)
    SAMPLED: tl.constexpr = SAMPLE if FLAT or DIM <= SAMPLE else BLOCK
    some = load_words(
        base, slots, page, 0, None, HEADS, DIM, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN,
        STRIDE_HEAD, TOKENS, NUMBERS, FLAT, SAMPLED,
    )  # fmt: skip
    guess, _ = best_window(tl.histogram((some >> 7) & 255, 256), 7, NUMBERS)
    # So that all windows within are windows of exponents from 0 to 255.
    first = tl.minimum(tl.maximum(guess - BELOW, -1), 256 - 15)
    totals = tl.zeros([16], tl.int32)
    for block in range(0, BLOCKS, COUNTED):
        words = load_words(
            base, slots, page, block, None, HEADS, DIM, BLOCK_TOKENS, STRIDE_BLOCK, STRIDE_TOKEN,
            STRIDE_HEAD, TOKENS, NUMBERS, FLAT, COUNTED * BLOCK,
        )  # fmt: skip
        zero = tl.minimum(tl.maximum(-first, 0), 15)
        totals += keep(mine, fields_of(words, first), block, zero, NUMBERS, BLOCKS)
    lowest, escapes, is_certain = certain_window(totals, first, NUMBERS)
    size = size_of(3, escapes, NUMBERS, BLOCKS)
    if is_certain & (size <= size_of(4, 0, NUMBERS, BLOCKS)):
        finish(target, sizes + plane, mine, lowest - first, lowest, 3, escapes, NUMBERS, BLOCKS, 16)
    else:
        every = tl.zeros([256], tl.int32)
        for block in range(0, BLOCKS):
            one = load_words(
                base, slots, page, block, None, HEADS, DIM, BLOCK_TOKENS, STRIDE_BLOCK,
                STRIDE_TOKEN, STRIDE_HEAD, TOKENS, NUMBERS, FLAT, BLOCK,
            )  # fmt: skip
            found = tl.histogram((one >> 7) & 255, 256)[None, :]
            every += keep(mine, found, block, 0, NUMBERS, BLOCKS)
        lowest_3, escapes_3 = best_window(every, 7, NUMBERS)
        lowest_4, escapes_4 = best_window(every, 15, NUMBERS)
        size_3 = size_of(3, escapes_3, NUMBERS, BLOCKS)
        is_3 = size_3 <= size_of(4, escapes_4, NUMBERS, BLOCKS)
        chosen = tl.where(is_3, lowest_3, lowest_4)
        escapes = tl.where(is_3, escapes_3, escapes_4)
        width = tl.where(is_3, 3, 4)
        finish(target, sizes + plane, mine, chosen, chosen, width, escapes, NUMBERS, BLOCKS, 256)


@triton.jit
def fields_of(words, first):
    """Count the exponents of COUNTED blocks: [COUNTED, 16], field 0 for all up to ``first``."""
    place = tl.minimum(tl.maximum(((words >> 5) & 0x3FC) - first * 4, 0), 60)
    ones = tl.full(place.shape, 1, tl.int64) << place.to(tl.int64)
    eights = tl.sum(tl.reshape(ones, (COUNTED * EIGHTS, 8)), 1)
    # 16 such words are of one thread and its seven neighbours: sums of 128 at most.
    even = sum_of_neighbours(eights & NIBBLES)
    odd = sum_of_neighbours((eights >> 4) & NIBBLES)
    halves = (even & HALVES, odd & HALVES, (even >> 8) & HALVES, (odd >> 8) & HALVES)
    sums_0, sums_1, sums_2, sums_3 = tl.reduce(halves, 1, add_fours)  # at once: fewer barriers
    field = tl.arange(0, 16)[None, :]
    sums = tl.where(field % 2 == 0, sums_0[:, None], sums_1[:, None])
    others = tl.where(field % 2 == 0, sums_2[:, None], sums_3[:, None])
    sums = tl.where(field % 4 < 2, sums, others)
    return ((sums >> (field // 4 * 16).to(tl.int64)) & 0xFFFF).to(tl.int32)


@triton.jit
def add_fours(a, b, c, d, e, f, g, h):
    """Add four numbers to four."""
    return a + e, b + f, c + g, d + h


@triton.jit
def sum_of_neighbours(words):
    """Sum [COUNTED * EIGHTS] to [COUNTED, EIGHTS / 16]."""
    grouped = tl.reshape(words, (COUNTED, 2, EIGHTS // 16, 8))
    return tl.sum(tl.sum(grouped, 3), 1)


@triton.jit
def keep(mine, found, first, zero, NUMBERS: tl.constexpr, BLOCKS: tl.constexpr):
    """Store the counts of blocks from ``first`` on, and return their sums.

    found: [blocks, fields], in which numbers that are not there were counted in field ``zero``.
    """
    block = first + tl.arange(0, found.shape[0])
    field = tl.arange(0, found.shape[1])
    absent = BLOCK - numbers_of(block, NUMBERS)
    found -= tl.where(field == zero, 1, 0)[None, :] * absent[:, None]
    target = mine + block[:, None] * 256 + field[None, :]
    tl.store(target, found.to(tl.int16), mask=(block < BLOCKS)[:, None])
    return tl.sum(found, 0)


@triton.jit
def finish(
    target, size_at, mine, field, lowest, width, escapes,
    NUMBERS: tl.constexpr, BLOCKS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Write a plane's size, ``info`` and ``starts``. field: that of the window's first exponent."""
    size = size_of(width, escapes, NUMBERS, BLOCKS)
    is_smaller = size < 2 * NUMBERS
    tl.store(size_at, tl.where(is_smaller, size, 0))
    number = tl.arange(0, 4)
    info = tl.where(number == 0, lowest + width * 256, 0)
    info = tl.where(number == 1, escapes, info)
    tl.store(target + number, info, mask=number < tl.where(is_smaller, 4, 0))
    window = (1 << width) - 1
    end = tl.where(is_smaller, padded(BLOCKS, 4), 0)
    each = tl.arange(0, FIELDS)
    tl.debug_barrier()  # other threads wrote the counts
    before = 0
    for first in range(0, BLOCKS, LISTED):
        block = first + tl.arange(0, LISTED)
        source = mine + block[:, None] * 256 + each[None, :]
        found = tl.load(source, mask=(block < BLOCKS)[:, None], other=0).to(tl.int32)
        is_inside = (each >= field) & (each < field + window)
        inside = tl.sum(tl.where(is_inside[None, :], found, 0), 1)
        outside = numbers_of(block, NUMBERS) - inside
        start = before + tl.cumsum(outside, 0) - outside
        # The padding of this section is zeros.
        start = tl.where(block < BLOCKS, start, 0)
        tl.store(target + INFO // 4 + block, start, mask=block < end)
        before += tl.sum(outside, 0)


@triton.jit
def certain_window(totals, first, NUMBERS: tl.constexpr):
    """Return the best window of 7 within 16 fields, the lowest such, what is outside of it, and
    whether no window that is partly beyond these fields can be as good or, above them, better.
    """
    field = tl.arange(0, 16)
    below = tl.cumsum(totals, 0)
    last = tl.gather(below, tl.minimum(field + 6, 15), 0)
    held = tl.where((field >= 1) & (field <= 8), last - below + totals, -1)
    most = tl.max(held, 0)
    best = tl.min(tl.where(held == most, field, 16), 0)
    lower = tl.sum(tl.where(field <= 6, totals, 0), 0)
    higher = tl.sum(tl.where(field >= 9, totals, 0), 0)
    return first + best, NUMBERS - most, (lower < most) & (higher <= most)


@triton.jit
def best_window(totals, WINDOW: tl.constexpr, NUMBERS: tl.constexpr):
    """Return the lowest exponent of the best window, the lowest such, and how many are outside.

    totals: [256], how often each exponent is there.
    """
    exponent = tl.arange(0, 256)
    below = tl.cumsum(totals, 0)
    last = tl.gather(below, tl.minimum(exponent + (WINDOW - 1), 255), 0)
    held = last - below + totals
    held = tl.where(exponent <= 256 - WINDOW, held, -1)
    most = tl.max(held, 0)
    return tl.min(tl.where(held == most, exponent, 256), 0), NUMBERS - most


@triton.jit
def numbers_of(block, NUMBERS: tl.constexpr):
    """Return how many numbers blocks have."""
    return tl.minimum(tl.maximum(NUMBERS - block * BLOCK, 0), BLOCK)
