"""The randomized Hadamard rotation in kernels: exactly as the reference, or on the tensor cores.

``butterfly`` and ``tree_sum`` add in the order that kernels/hadamard.py lays down, for equality bit
by bit. Moved between threads in each stage, the numbers of a tile go through shared memory dozens
of times, so on a GPU a row is multiplied by the matrix of +-1 instead. Such a matrix is exact in
16 bits, pages of 16 bits are too, and sums are made in float32: results differ from the
butterfly's in the last bits of float32 only. Float32 is cut into three parts of 8 bits each.

Where a row is one block the signs are part of the matrix, [S H] and its transpose [H S]; else they
are multiplied first or last. Blocks of 256 are two products of 128 and one stage of the butterfly:
the whole matrix would take 128 KiB of shared memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What is a tensor, a constant or a tuple in a kernel, only Triton knows.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from functools import lru_cache
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from respkv.kernels.hadamard import butterfly as butterfly_of_columns
from respkv.kernels.hadamard import signs
from respkv.kernels.layout import HADAMARD_MAX, hadamard_dim, rotated_dim
from respkv.kernels.rounding_triton import to_element

PRODUCT_MAX: Final = 128
STAGES_MAX = tl.constexpr(HADAMARD_MAX.bit_length() - 1)


def product_dim(dim: int) -> int:
    """Return the width of the matrix that rows of D are multiplied by."""
    return min(hadamard_dim(dim), PRODUCT_MAX)


@lru_cache(maxsize=64)
def rotation_of(
    dim: int, dtype: torch.dtype, device: torch.device, *, back: bool
) -> tuple[Tensor, Tensor]:
    """Return what rows of D are rotated with, or rotated back.

    Returns: the matrix [product_dim(dim)] * 2 of ``dtype``, that rows are multiplied by on their
             right, signs included if a row is one block; and the signs, [rotated_dim(dim)] float32.
    """
    width, size = rotated_dim(dim), product_dim(dim)
    matrix = butterfly_of_columns(torch.eye(size), size)
    if width == size:
        matrix = matrix * signs(width)[None if back else slice(None), slice(None) if back else None]
    return matrix.to(device, dtype), signs(width).to(device)


@triton.jit
def butterfly(rows, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply blocks of rows [R, W] by the matrix: stages of distances from FIRST to BLOCK / 2."""
    for stage in tl.static_range(STAGES_MAX):
        if (FIRST << stage) < BLOCK:
            rows = butterfly_stage(rows, FIRST << stage)
    return rows


@triton.jit
def butterfly_stage(rows, DISTANCE: tl.constexpr):
    """Replace numbers so far from each other in rows [R, W] by their sum and difference."""
    ROWS: tl.constexpr = rows.shape[0]
    WIDTH: tl.constexpr = rows.shape[1]
    pairs = tl.reshape(rows, (ROWS, WIDTH // (2 * DISTANCE), 2, DISTANCE))
    left, right = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    both = tl.permute(tl.join(left + right, left - right), (0, 1, 3, 2))
    return tl.reshape(both, (ROWS, WIDTH))


@triton.jit
def tree_sum(terms):
    """Sum [R, N] over N, a power of two: neighbours, then neighbours of those sums, and so on."""
    ROWS: tl.constexpr = terms.shape[0]
    for _ in tl.static_range(STAGES_MAX):
        if terms.shape[1] > 1:
            left, right = tl.split(tl.reshape(terms, (ROWS, terms.shape[1] // 2, 2)))
            terms = left + right
    return tl.reshape(terms, (ROWS,))


@triton.jit
def product(
    rows, matrix,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Multiply blocks of rows [R, W] by the matrix, on the tensor cores.

    rows:    as precise as ``matrix``; or float32, with SPLIT, which then is cut into three parts.
    Returns: [R, W] float32, not scaled.
    """
    ROWS: tl.constexpr = rows.shape[0]
    WIDTH: tl.constexpr = rows.shape[1]
    SIZE: tl.constexpr = matrix.shape[0]
    left = tl.reshape(rows, (ROWS * WIDTH // SIZE, SIZE))
    if SPLIT:
        high = left.to(matrix.dtype)
        rest = left - high.to(tl.float32)
        middle = rest.to(matrix.dtype)
        low = (rest - middle.to(tl.float32)).to(matrix.dtype)
        made = multiply(low, matrix, None, UPCAST)
        made = multiply(middle, matrix, made, UPCAST)
        made = multiply(high, matrix, made, UPCAST)
    else:
        made = multiply(left, matrix, None, UPCAST)
    return butterfly(tl.reshape(made, (ROWS, WIDTH)), SIZE, BLOCK)


@triton.jit
def multiply(left, right, onto, UPCAST: tl.constexpr):
    """Return left @ right + onto in float32; the interpreter gets bfloat16 products wrong."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, onto, input_precision="ieee")


@triton.jit
def rotated(
    numbers, matrix, signs,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return rows times signs times the matrix, not scaled: [R, PADDED] float32."""
    SPLIT: tl.constexpr = numbers.dtype == tl.float32
    if matrix.shape[0] != WIDTH:
        signed = numbers.to(tl.float32) * signs[None, :]
        numbers = to_element(signed, numbers.dtype, INTERPRETED)
    return product(numbers, matrix, BLOCK, SPLIT, INTERPRETED)


@triton.jit
def rotated_mean(
    mean, matrix, signs,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the mean, [PADDED] float32 that fp16 holds, rotated as rows are.

    Two parts of the matrix's type hold it exactly: two rows of a product, of which 16 are the least.
    """
    part = tl.arange(0, 16)[:, None]
    high = to_element(mean, matrix.dtype, INTERPRETED)
    low = mean - high.to(tl.float32)
    parts = tl.where(part == 0, high.to(tl.float32)[None, :], 0.0)
    parts = tl.where(part == 1, low[None, :], parts)
    parts = to_element(parts, matrix.dtype, INTERPRETED)
    return tl.sum(rotated(parts, matrix, signs, WIDTH, BLOCK, INTERPRETED), 0)


@triton.jit
def rotated_back(
    codes, matrix, signs,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return (codes less their middle) times the matrix times signs, not scaled: exact.

    2^22 and what is added to it is a multiple of 1/2 in float32, whose bits can be added up: that is
    cheaper than a conversion.
    """
    above = (codes * 2 + 0x4A800000).to(tl.float32, bitcast=True)
    numbers = above - (4194304 + (LEVELS - 1) / 2)
    rows = product(to_element(numbers, tl.bfloat16, INTERPRETED), matrix, BLOCK, False, INTERPRETED)
    return rows if matrix.shape[0] == WIDTH else rows * signs[None, :]
