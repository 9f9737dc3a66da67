"""The uniform quantizer of rotated rows, and their gains: as the reference, or in fewer steps."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What is a tensor, a constant or a tuple in a kernel, only Triton knows.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from respkv.kernels.hadamard_triton import tree_sum
from respkv.kernels.rounding_triton import reciprocal, round_even

# Added to a float32 that is not large, it leaves the integer nearest in the lowest bits.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def quantize_exactly(
    rows,
    STEP: tl.constexpr, STEP_INVERSE: tl.constexpr, LEVELS: tl.constexpr, ROUNDING: tl.constexpr,
    UNBIASED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return codes [R, W] int32, gains [R] fp16 and norms [R]; the arithmetic of the reference."""
    width = tl.full([rows.shape[0]], WIDTH, tl.float32)
    norm = tl.math.sqrt_rn(tl.math.div_rn(tree_sum(rows * rows), width))
    is_zero = norm == 0
    unit = rows * tl.where(is_zero, 0.0, reciprocal(tl.where(is_zero, 1.0, norm)))[:, None]
    steps = unit * STEP_INVERSE
    codes = (round_even(steps) if ROUNDING else tl.floor(steps)) + LEVELS // 2
    codes = tl.minimum(tl.maximum(codes, 0.0), LEVELS - 1.0)
    is_there = (tl.arange(0, rows.shape[1]) < WIDTH)[None, :]
    found = tl.where(is_there, (codes - (LEVELS - 1) / 2) * STEP, 0.0)
    top = tree_sum(unit * found)
    bottom = tree_sum(found * found)
    if UNBIASED:
        bottom = top
        top = tree_sum(unit * unit)
    gain = tl.where(is_zero, 0.0, tl.math.div_rn(norm * top, bottom))
    return codes.to(tl.int32), gain.to(tl.float16), norm


@triton.jit
def quantize_fast(
    rows,
    STEP: tl.constexpr, STEP_INVERSE: tl.constexpr, SCALE: tl.constexpr, LEVELS: tl.constexpr,
    ROUNDING: tl.constexpr, UNBIASED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return what ``quantize_exactly`` does, but for ties, of rows that are not scaled.

    Half a step lower, rounding down is rounding to the nearest, which an addition does: it leaves
    the code in the lowest bits.
    """
    LOW: tl.constexpr = LEVELS // 2
    norm = tl.sqrt(tl.sum(rows * rows, 1) / WIDTH)
    is_zero = norm == 0
    factor = tl.where(is_zero, 0.0, STEP_INVERSE / tl.where(is_zero, 1.0, norm))
    steps = rows * factor[:, None]
    if not ROUNDING:
        steps = steps - 0.5
    steps = tl.minimum(tl.maximum(steps, -1.0 * LOW), LEVELS - 1.0 - LOW)
    shifted = steps + (ROUNDER + LOW)
    codes = shifted.to(tl.int32, bitcast=True) & (15 if LEVELS > 8 else LEVELS - 1)
    found = shifted - (ROUNDER + LOW)
    if not ROUNDING:
        found = found + 0.5
    if rows.shape[1] != WIDTH:
        found = tl.where((tl.arange(0, rows.shape[1]) < WIDTH)[None, :], found, 0.0)
    top = tl.sum(rows * found, 1)
    bottom = tl.sum(found * found, 1)
    if UNBIASED:
        bottom = top
        top = tl.sum(rows * rows, 1)
    gain = tl.where(is_zero, 0.0, top * (SCALE / STEP) / bottom)
    return codes, gain.to(tl.float16), norm
