"""Split-KV: which tokens of a sequence a program reads, what it leaves, and how that is merged."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from respkv.kernels.rounding_triton import to_element
from respkv.kernels.softmax_triton import weigh


@triton.jit
def share(
    context, window, split, SPLITS: tl.constexpr, TILE: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """Return the first token that a split reads, a multiple of TILE, and where it ends."""
    oldest = 0
    if HAS_WINDOW:
        oldest = tl.maximum(context - window, 0) // TILE * TILE
    tokens = tl.cdiv(tl.cdiv(context - oldest, TILE), SPLITS) * TILE
    first = oldest + split * tokens
    return first, tl.minimum(first + tokens, context)


@triton.jit
def leave(
    acc, count, peak, sequence, kv_head, split, is_used, out, partial, lse,
    OUT_STRIDES: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a program's result: the output, or what it contributes to it, if anything.

    acc [ROWS, WIDTH], count and peak [ROWS]; with two PARTS, row r + ROWS / 2 has the rest of row r.
    """
    if PARTS == 2:
        acc = tl.sum(tl.reshape(acc, [2, ROWS // 2, WIDTH]), 0)
        peak = tl.max(tl.reshape(peak, [2, ROWS // 2]), 0)
        count = tl.max(tl.reshape(count, [2, ROWS // 2]), 0)
    count = tl.where(count == 0.0, 1.0, count)  # nothing seen: zeros, and an lse of -inf
    acc /= count[:, None]
    row, column = tl.arange(0, ROWS // PARTS), tl.arange(0, WIDTH)
    is_number = (row < GROUP)[:, None] & (column < DIM)[None, :]
    if SPLITS == 1:
        at = sequence * OUT_STRIDES[0] + (kv_head * GROUP + row[:, None]) * OUT_STRIDES[1]
        kept = to_element(acc, out.dtype.element_ty, INTERPRETED)
        tl.store(out + at + column[None, :], kept, mask=is_number)
    else:
        head = sequence * (GROUP * tl.num_programs(1)) + kv_head * GROUP + row
        at = head * SPLITS + split
        is_left = is_number & (row < tl.where(is_used, GROUP, 0))[:, None]
        tl.store(partial + at[:, None] * DIM + column[None, :], acc, mask=is_left)
        tl.store(lse + at, peak + tl.log2(count), mask=row < GROUP)


@triton.jit
def merge_kernel(
    partial, lse, out,
    OUT_STRIDES: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Merge what the splits of a sequence and query head have left. Grid [B, Q].

    A split whose lse is -inf has left nothing; its part of ``partial`` is not read.
    """
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH], tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    peak = tl.full([1], float("-inf"), tl.float32)
    for start in range(0, SPLITS, CHUNK):
        split = start + tl.arange(0, CHUNK)
        at = (sequence * HEADS + head) * SPLITS + split
        scores = tl.load(lse + at, mask=split < SPLITS, other=float("-inf"))
        is_left = (scores > float("-inf"))[:, None] & (column < DIM)[None, :]
        parts = tl.load(partial + at[:, None] * DIM + column[None, :], mask=is_left, other=0.0)
        weight, peak, shrink = weigh(scores[None, :], peak)
        weight = tl.reshape(weight, [CHUNK])
        total = total * shrink + weight
        acc = acc * shrink + tl.sum(weight[:, None] * parts, 0)
    count = tl.sum(total, 0)
    acc /= tl.where(count == 0.0, 1.0, count)
    at = sequence * OUT_STRIDES[0] + head * OUT_STRIDES[1] + column
    tl.store(out + at, to_element(acc, out.dtype.element_ty, INTERPRETED), mask=column < DIM)
