"""Prefill on a GPU of new tokens that attend to a prefix in pages and causally to one another.

The rows of a program's matrix products are some new tokens of one sequence times the query heads of
one kv head, so that a tile of keys and values, found through the block table, serves them all: with
8 heads in a group even 16 new tokens fill the 128 rows that the tensor cores want. The last tokens
have the most keys to see, so their programs come first and the short ones fill the gaps.

The prefix comes before the new tokens in one online softmax; neither is copied together before.

Source: Dao, FlashAttention-2, ICLR 2024, arXiv:2307.08691 (the tiled softmax and its order of work).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Constants are given to functions of Triton as they are.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from respkv.kernels import launch
from respkv.kernels.codes_triton import code_constants, from_byte, split_rows, split_scale
from respkv.kernels.paged_kv import PagedKV, Scoring
from respkv.kernels.rounding_triton import to_element
from respkv.kernels.softmax_triton import (
    LOG2E,
    as_operand,
    block_of,
    capped,
    multiply_add,
    place,
    weigh,
)

WIDTH_MIN: Final = 16  # what the tensor cores take at once
NUMBERS = tl.constexpr(0)
# New tokens need no look-up, which takes its share of the stages; see decode_triton.decode_tile.
NEW_STAGES = tl.constexpr(3)


class PrefillTile(NamedTuple):
    """Rows and keys that a program multiplies at once, and with what."""

    rows: int
    tokens: int
    warps: int
    stages: int


def prefill_tile(
    head_dim: int,
    element_bytes: int,
    rows: int,
    group: int,
    *,
    has_codes: bool,
    capability: int,
) -> PrefillTile:
    """Return the tile for queries of such numbers, ``rows`` of them in a sequence and kv head.

    group:      query heads of a kv head; they share a program.
    has_codes:  whether the prefix is in codes, which take registers on their way: half the keys.
    capability: of the GPU, 80 and so on. From 90 on operands of products come from shared memory;
                before, they take registers as well: half the keys.

    128 rows are two warp groups of a Hopper; with D = 128 and 64 keys an accumulator is 64 registers
    of a thread. Wider heads halve the keys. float32 multiplies thrice, through registers.
    """
    width = max(128, triton.next_power_of_2(head_dim))
    most = 128
    if element_bytes == 4:
        most = 32 if width == 128 else 16
    elif width == 256 and (has_codes or capability < 90):
        most = 64
    rows = max(16, min(most, triton.next_power_of_2(rows)), triton.next_power_of_2(group))
    if element_bytes == 4:
        return PrefillTile(rows, 16, warps=4 if width == 128 else 8, stages=3)
    tokens = 64 if width == 128 and capability >= 90 else 32
    if has_codes:
        tokens //= 2
    warps = 8 if rows * width >= 128 * 128 else 4
    return PrefillTile(rows, tokens, warps, stages=5 if capability >= 90 or width == 128 else 3)


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: PagedKV,
    cu_seqlens: Tensor,
    *,
    new_max: int,
    scoring: Scoring,
    out: Tensor,
    tile: PrefillTile | None = None,
) -> None:
    """Launch the kernel; see ``attention.paged_prefill``, which has checked the arguments."""
    kv_heads, dim = pages.keys.shape[2:]
    group = query.shape[1] // kv_heads
    if tile is None:
        capability = 10 * torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 90
        tile = prefill_tile(
            dim,
            query.element_size(),
            new_max * group,
            group,
            has_codes=pages.key_scales is not None,
            capability=capability,
        )
    codes: dict[str, Any] = {"KIND": NUMBERS.value, "HAS_E4M3": False}
    if pages.key_scales is not None:
        codes = code_constants(pages.keys.dtype, query.device)
        pages = replace(
            pages, keys=pages.keys.view(torch.uint8), values=pages.values.view(torch.uint8)
        )
    launch.run(
        prefill_kernel,
        (-(-new_max // (tile.rows // group)), kv_heads, pages.context_lens.shape[0]),
        query.device,
        *(query, key, value, pages.keys, pages.values, pages.key_scales, pages.value_scales),
        *(pages.block_tables, pages.context_lens, cu_seqlens, out),
        *(scoring.scale(dim) * LOG2E.value, scoring.window or 0, scoring.soft_cap or 1.0),
        **prefill_constants(query, key, value, pages, scoring=scoring, out=out, tile=tile),
        **codes,
        num_warps=tile.warps,
        num_stages=tile.stages,
        fuse=True,
    )


def prefill_constants(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: PagedKV,
    *,
    scoring: Scoring,
    out: Tensor,
    tile: PrefillTile,
) -> dict[str, Any]:
    """Return the constants of the kernel; pages of codes are given as uint8."""
    scales = (pages.key_scales, pages.value_scales)
    key_scale_strides, value_scale_strides = (
        (0, 0, 0) if each is None else each.stride() for each in scales
    )
    return {
        "Q_STRIDES": query.stride(),
        "NEW_K_STRIDES": key.stride(),
        "NEW_V_STRIDES": value.stride(),
        "K_STRIDES": pages.keys.stride(),
        "V_STRIDES": pages.values.stride(),
        "KS_STRIDES": key_scale_strides,
        "VS_STRIDES": value_scale_strides,
        "OUT_STRIDES": out.stride(),
        "TABLE_STRIDE": pages.block_tables.stride(0),
        "GROUP": query.shape[1] // pages.keys.shape[2],
        "DIM": query.shape[2],
        "PAGE": pages.keys.shape[1],
        "ROWS": tile.rows,
        "TILE": tile.tokens,
        "WIDTH": max(WIDTH_MIN, triton.next_power_of_2(query.shape[2])),
        "HAS_WINDOW": scoring.window is not None,
        "HAS_CAP": scoring.soft_cap is not None,
        "INTERPRETED": launch.INTERPRETED,
    }


@triton.jit
def attend(
    acc, count, peak, rows, factors, key, key_scale, value, value_scale, is_seen, cap,
    HAS_SCALES: tl.constexpr, HAS_CAP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys and values to the online softmax of rows; is_seen [M, N]."""
    scores = tl.dot(rows, tl.trans(key), input_precision="tf32x3")
    if HAS_SCALES:
        scores *= factors[:, None] * key_scale[None, :]
    else:
        scores *= factors
    if HAS_CAP:
        scores = capped(scores, cap)
    if HAS_SCALES:  # see codes_triton
        shift, mantissa, unshift = split_scale(value_scale)
        scores = tl.where(is_seen, scores + shift[None, :], float("-inf"))
        weight, peak, shrink = weigh(scores, peak)
        count = count * shrink + tl.sum(weight * unshift[None, :], 1)
        weight *= mantissa[None, :]
    else:
        weight, peak, shrink = weigh(tl.where(is_seen, scores, float("-inf")), peak)
        count = count * shrink + tl.sum(weight, 1)
    return multiply_add(acc * shrink[:, None], weight, value, INTERPRETED), count, peak


@triton.jit
def prefill_kernel(
    query, key, value, keys, values, key_scales, value_scales, block_tables, context_lens,
    cu_seqlens, out, score_factor, window, cap,
    Q_STRIDES: tl.constexpr, NEW_K_STRIDES: tl.constexpr, NEW_V_STRIDES: tl.constexpr,
    K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr, KS_STRIDES: tl.constexpr,
    VS_STRIDES: tl.constexpr, OUT_STRIDES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, HAS_E4M3: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend with some new tokens of a sequence and the query heads of one kv head.

    Grid [new_max / (ROWS / GROUP), H, B]. query, out [S, Q, D]; key, value [S, H, D];
    cu_seqlens [B + 1]; context_lens [B], of prefixes; score_factor has log2(e) in it.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    kv_head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    new = (tl.load(cu_seqlens + sequence + 1) - begin).to(tl.int32)
    if first >= new:
        return
    prefix = tl.load(context_lens + sequence)
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    own, head = first + row // GROUP, kv_head * GROUP + row % GROUP
    is_number = ((row < TOKENS * GROUP) & (own < new))[:, None] & (column < DIM)[None, :]
    query += ((begin + own) * Q_STRIDES[0] + head * Q_STRIDES[1])[:, None]
    rows = tl.load(query + column[None, :], mask=is_number, other=0.0)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    acc, count, peak = attend_prefix(
        acc, count, peak, rows, keys, values, key_scales, value_scales,
        block_tables + sequence * TABLE_STRIDE, prefix, prefix + own, prefix + first, kv_head,
        score_factor, window, cap,
        K_STRIDES, V_STRIDES, KS_STRIDES, VS_STRIDES, DIM, PAGE, TILE, WIDTH,
        KIND, HAS_E4M3, HAS_WINDOW, HAS_CAP, INTERPRETED,
    )  # fmt: skip

    rows = as_operand(rows, INTERPRETED)
    oldest = 0
    if HAS_WINDOW:
        oldest = tl.maximum(first + 1 - window, 0) // TILE * TILE
    key += begin * NEW_K_STRIDES[0] + kv_head * NEW_K_STRIDES[1]
    value += begin * NEW_V_STRIDES[0] + kv_head * NEW_V_STRIDES[1]
    last = tl.minimum(first + TOKENS, new)
    for start in tl.range(oldest, last, TILE, num_stages=NEW_STAGES):
        token = start + tl.arange(0, TILE)
        wanted = (token < last)[:, None] & (column < DIM)[None, :]
        is_seen = token[None, :] <= own[:, None]
        if HAS_WINDOW:
            is_seen &= token[None, :] > own[:, None] - window
        at = token.to(tl.int64)[:, None]
        tile = tl.load(key + at * NEW_K_STRIDES[0] + column[None, :], mask=wanted, other=0.0)
        other = tl.load(value + at * NEW_V_STRIDES[0] + column[None, :], mask=wanted, other=0.0)
        acc, count, peak = attend(
            acc, count, peak, rows, score_factor, as_operand(tile, INTERPRETED), None,
            as_operand(other, INTERPRETED), None, is_seen, cap, False, HAS_CAP, INTERPRETED,
        )  # fmt: skip
    # Rows of no token may have seen nothing.
    acc /= tl.where(count == 0.0, 1.0, count)[:, None]
    kept = to_element(acc, out.dtype.element_ty, INTERPRETED)
    out += ((begin + own) * OUT_STRIDES[0] + head * OUT_STRIDES[1])[:, None]
    tl.store(out + column[None, :], kept, mask=is_number)


@triton.jit
def attend_prefix(
    acc, count, peak, rows, keys, values, key_scales, value_scales, table, prefix, own, first,
    kv_head, score_factor, window, cap,
    K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr, KS_STRIDES: tl.constexpr,
    VS_STRIDES: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, KIND: tl.constexpr, HAS_E4M3: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend to a prefix in pages. own [ROWS]: positions of the rows, ``first`` the lowest."""
    column = tl.arange(0, WIDTH)
    factors = score_factor
    if KIND != NUMBERS:
        rows, power = split_rows(rows, INTERPRETED)
        factors = power * score_factor
    rows = as_operand(rows, INTERPRETED)
    oldest = 0
    if HAS_WINDOW:
        oldest = tl.maximum(first + 1 - window, 0)
    for start in range(oldest // TILE * TILE, prefix, TILE):
        token = start + tl.arange(0, TILE)
        is_read = (token < prefix) & (token >= oldest)
        block, slot = block_of(table, start, token, is_read, PAGE, TILE), token % PAGE
        wanted = is_read[:, None] & (column < DIM)[None, :]
        at = place(block, slot, kv_head, K_STRIDES)[:, None] + column[None, :]
        key = tl.load(keys + at, mask=wanted, other=0)
        at = place(block, slot, kv_head, V_STRIDES)[:, None] + column[None, :]
        value = tl.load(values + at, mask=wanted, other=0)
        key_scale, value_scale = None, None
        if KIND != NUMBERS:
            key, value = from_byte(key, KIND, HAS_E4M3), from_byte(value, KIND, HAS_E4M3)
            at = place(block, slot, kv_head, KS_STRIDES)
            key_scale = tl.load(key_scales + at, mask=is_read, other=1.0)
            at = place(block, slot, kv_head, VS_STRIDES)
            value_scale = tl.load(value_scales + at, mask=is_read, other=1.0)
        is_seen = is_read[None, :]
        if HAS_WINDOW:
            is_seen = is_seen & (token[None, :] > own[:, None] - window)
        acc, count, peak = attend(
            acc, count, peak, rows, factors, as_operand(key, INTERPRETED), key_scale,
            as_operand(value, INTERPRETED), value_scale, is_seen, cap,
            KIND != NUMBERS, HAS_CAP, INTERPRETED,
        )  # fmt: skip
    return acc, count, peak
