"""What the attention kernels share: finding tokens in pages, scores and the online softmax.

Scores are kept in base 2: log2(e) is part of the factor that they are multiplied with anyway.
The interpreter multiplies matrices of bfloat16 wrongly, so operands are float32 there.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def block_of(table, start, token, is_read, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Return the block of each token of a tile that starts at ``start``, a multiple of TILE.

    One look-up serves a tile in which no page ends.
    """
    if PAGE % TILE == 0:
        return tl.load(table + start // PAGE).to(tl.int64)
    else:
        return tl.load(table + token // PAGE, mask=is_read, other=0).to(tl.int64)


@triton.jit
def place(block, slot, kv_head, STRIDES: tl.constexpr):
    """Return where each token of a tile is, of strides for block, token and head."""
    return block * STRIDES[0] + slot * STRIDES[1] + kv_head * STRIDES[2]


@triton.jit
def as_operand(tile, INTERPRETED: tl.constexpr):
    """Return a tile as the matrix product takes it."""
    return tile.to(tl.float32) if INTERPRETED else tile


@triton.jit
def capped(scores, cap):
    """Return cap * tanh(score / cap) of scores in base 2; cap is in natural units."""
    decay = tl.exp2(tl.abs(scores) * (-2.0 / cap))
    size = cap * LOG2E * (1.0 - decay) / (1.0 + decay)
    return tl.where(scores < 0, -size, size)


@triton.jit
def weigh(scores, peak):
    """Return weights of scores, the new peak of each row, and what older weights shrink by.

    scores: [M, N] in base 2, -inf where a query does not see a key.
    peak:   [M], the highest score so far, -inf before the first.
    """
    higher = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen nothing yet has weights of 0, not of exp2(-inf + inf).
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return tl.exp2(scores - base[:, None]), higher, tl.exp2(peak - base)


@triton.jit
def multiply_add(acc, weight, tile, INTERPRETED: tl.constexpr):
    """Return acc + weight @ tile, the weights in the type of the tile."""
    left = weight if INTERPRETED else weight.to(tile.dtype)
    return tl.dot(left, tile, acc, input_precision="tf32x3")
