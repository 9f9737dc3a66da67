"""Paged decode attention on a GPU: one new token per sequence against its pages.

The problem is reading KV at the memory's speed. One program reads a share of the keys and values of
one sequence and kv head, once, for all query heads of the group, which are the rows of its matrix
products, padded to 16. Tiles have a size of their own: where they span pages, every token looks up
its block; where pages are whole tiles, one look-up serves a tile.

Batches of few sequences would leave most of the GPU idle, so a sequence is split among
``num_splits`` programs, each leaving a normalized output and the log-sum-exp of its scores, and a
second kernel merges these. The grid depends on nothing on the device: lengths are read by the
kernel, a program without tokens ends early, and a captured graph serves any lengths.

Weights of bfloat16 cost as much precision as the output's own rounding does. The 16 rows have room
for more than the usual group, so where V is bfloat16 every query is there twice: the second half of
the rows multiplies V by what the first half's weights lost when they were rounded.

Strides are constants of the compiled kernel: they are a model's and a cache's, they do not change
from step to step, and the compiler sees from them how wide it may load.

Source: Dao et al., Flash-Decoding, 2023 (splits and their merge); Kwon et al., PagedAttention, SOSP
2023, arXiv:2309.06180 (block tables).
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
from respkv.kernels.codes_triton import code_constants, from_word, split_rows, split_scale
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
from respkv.kernels.splits import DecodeWorkspace
from respkv.kernels.splits_triton import leave, merge_kernel, share

ROWS_MIN: Final = 16  # what the tensor cores take at once
WIDTH_MIN: Final = 32  # two halves of the 16 channels that they take at once
DOUBLED_GROUP_MAX: Final = 16  # beyond it there is no room for every query twice
MERGED_AT_ONCE: Final = 16


class DecodeTile(NamedTuple):
    """How many tokens a program reads at once, and with what."""

    tokens: int
    warps: int
    stages: int


def decode_tile(head_dim: int, element_bytes: int) -> DecodeTile:
    """Return the tile for pages of such numbers or codes.

    32 KiB of K and V of 16 bits. Triton divides the stages among the look-up of the block and what
    it finds: 5 make two tiles in shared memory, 7 make three, which codes of half the size need.
    Two programs fit an SM from A100 on and keep some 64 KiB on their way, twice what an SM's share
    of the memory's bandwidth times its latency asks for.
    """
    tokens = 8192 // max(WIDTH_MIN, triton.next_power_of_2(head_dim))
    if element_bytes == 4:  # each product is three, of operands that take twice the registers
        return DecodeTile(max(16, min(64, tokens // 2)), warps=8 if tokens < 64 else 4, stages=5)
    return DecodeTile(max(16, min(128, tokens)), warps=4, stages=7 if element_bytes == 1 else 5)


def decode(
    query: Tensor,
    pages: PagedKV,
    *,
    scoring: Scoring,
    out: Tensor,
    workspace: DecodeWorkspace,
    tile: DecodeTile | None = None,
) -> None:
    """Launch the kernels; see ``attention.paged_decode``, which has checked the arguments."""
    batch, query_heads, dim = query.shape
    splits = workspace.num_splits
    tile = tile or decode_tile(dim, pages.keys.element_size())
    kernel: Any = decode_kernel
    scales: list[Tensor] = []
    codes: dict[str, Any] = {}
    if pages.key_scales is not None and pages.value_scales is not None:
        kernel, scales = decode_codes_kernel, [pages.key_scales, pages.value_scales]
        codes = code_constants(pages.keys.dtype, query.device)
        pages = replace(
            pages, keys=pages.keys.view(torch.uint16), values=pages.values.view(torch.uint16)
        )
    launch.run(
        kernel,
        (batch, pages.keys.shape[2], splits),
        query.device,
        *(query, pages.keys, pages.values, *scales, pages.block_tables, pages.context_lens),
        *(out, workspace.partial, workspace.lse),
        *(scoring.scale(dim) * LOG2E.value, scoring.window or 0, scoring.soft_cap or 1.0),
        **decode_constants(query, pages, scoring=scoring, out=out, splits=splits, tile=tile),
        **codes,
        num_warps=tile.warps,
        num_stages=tile.stages,
        fuse=True,
    )
    if splits > 1:
        launch.run(
            merge_kernel,
            (batch, query_heads),
            query.device,
            *(workspace.partial, workspace.lse, out),
            **merge_constants(out, splits),
            num_warps=4,
            fuse=True,
        )


def decode_constants(
    query: Tensor,
    pages: PagedKV,
    *,
    scoring: Scoring,
    out: Tensor,
    splits: int,
    tile: DecodeTile,
) -> dict[str, Any]:
    """Return the constants of a kernel; pages of codes are given as words, uint16."""
    dim, group = query.shape[2], query.shape[1] // pages.keys.shape[2]
    constants = {
        "Q_STRIDES": query.stride(),
        "K_STRIDES": pages.keys.stride(),
        "V_STRIDES": pages.values.stride(),
        "OUT_STRIDES": out.stride(),
        "TABLE_STRIDE": pages.block_tables.stride(0),
        "SPLITS": splits,
        "GROUP": group,
        "DIM": dim,
        "PAGE": pages.keys.shape[1],
        "ROWS": max(ROWS_MIN, triton.next_power_of_2(group)),
        "TILE": tile.tokens,
        "WIDTH": max(WIDTH_MIN, triton.next_power_of_2(dim)),
        "HAS_WINDOW": scoring.window is not None,
        "HAS_CAP": scoring.soft_cap is not None,
        "INTERPRETED": launch.INTERPRETED,
    }
    if pages.key_scales is not None and pages.value_scales is not None:
        return constants | {
            "KS_STRIDES": pages.key_scales.stride(),
            "VS_STRIDES": pages.value_scales.stride(),
        }
    parts = 2 if pages.keys.dtype == torch.bfloat16 and group <= DOUBLED_GROUP_MAX else 1
    rows = max(ROWS_MIN, parts * triton.next_power_of_2(group))
    return constants | {"PARTS": parts, "ROWS": rows}


def merge_constants(out: Tensor, splits: int) -> dict[str, Any]:
    """Return the constants of the kernel that merges."""
    return {
        "OUT_STRIDES": out.stride(),
        "SPLITS": splits,
        "HEADS": out.shape[1],
        "DIM": out.shape[2],
        "WIDTH": max(WIDTH_MIN, triton.next_power_of_2(out.shape[2])),
        "CHUNK": MERGED_AT_ONCE,
        "INTERPRETED": launch.INTERPRETED,
    }


@triton.jit
def in_parts(weight, ROWS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return what bfloat16 keeps of weights in the first half of the rows, else what it drops."""
    kept = to_element(weight, tl.bfloat16, INTERPRETED).to(tl.float32)
    is_first = tl.arange(0, ROWS) < ROWS // 2
    return tl.where(is_first[:, None], kept, weight - kept)


@triton.jit
def read_query(
    query, sequence, first_head, row, STRIDES: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the queries of a group as rows, zeros in the rows and columns that it has not."""
    column = tl.arange(0, WIDTH)
    at = sequence * STRIDES[0] + (first_head + row[:, None]) * STRIDES[1] + column[None, :]
    is_number = (row < GROUP)[:, None] & (column < DIM)[None, :]
    return tl.load(query + at, mask=is_number, other=0.0)


@triton.jit
def decode_kernel(
    query, keys, values, block_tables, context_lens, out, partial, lse, score_factor, window, cap,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
    OUT_STRIDES: tl.constexpr, TABLE_STRIDE: tl.constexpr, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend with the query heads of one kv head to a share of the pages of a sequence.

    Grid [B, H, SPLITS]. query, out [B, Q, D]; partial [B, Q, SPLITS, D], lse [B, Q, SPLITS] float32,
    used when SPLITS > 1. score_factor has log2(e) in it; window counts keys, the newest included.
    """
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_lens + sequence)
    first, last = share(context, window, split, SPLITS, TILE, HAS_WINDOW)
    row, column = tl.arange(0, ROWS) % (ROWS // PARTS), tl.arange(0, WIDTH)
    rows = read_query(query, sequence, kv_head * GROUP, row, Q_STRIDES, GROUP, DIM, WIDTH)
    rows = as_operand(rows, INTERPRETED)
    table = block_tables + sequence * TABLE_STRIDE
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS, TILE], tl.float32)  # its columns are summed once, after the loop
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for start in range(first, last, TILE):
        token = start + tl.arange(0, TILE)
        is_read = token < last
        if HAS_WINDOW:  # what is older may be in blocks that are another's by now
            is_read &= token >= context - window
        block, slot = block_of(table, start, token, is_read, PAGE, TILE), token % PAGE
        wanted = is_read[:, None] & (column < DIM)[None, :]
        at = place(block, slot, kv_head, K_STRIDES)[:, None] + column[None, :]
        key = as_operand(tl.load(keys + at, mask=wanted, other=0.0), INTERPRETED)
        scores = tl.dot(rows, tl.trans(key), input_precision="tf32x3") * score_factor
        if HAS_CAP:
            scores = capped(scores, cap)
        weight, peak, shrink = weigh(tl.where(is_read[None, :], scores, float("-inf")), peak)
        total = total * shrink[:, None] + weight
        if PARTS == 2:
            weight = in_parts(weight, ROWS, INTERPRETED)
        at = place(block, slot, kv_head, V_STRIDES)[:, None] + column[None, :]
        value = as_operand(tl.load(values + at, mask=wanted, other=0.0), INTERPRETED)
        acc = multiply_add(acc * shrink[:, None], weight, value, INTERPRETED)
    leave(
        acc, tl.sum(total, 1), peak, sequence, kv_head, split, first < last, out, partial, lse,
        OUT_STRIDES, SPLITS, GROUP, DIM, ROWS, PARTS, WIDTH, INTERPRETED,
    )  # fmt: skip


@triton.jit
def decode_codes_kernel(
    query, keys, values, key_scales, value_scales, block_tables, context_lens, out, partial, lse,
    score_factor, window, cap,
    Q_STRIDES: tl.constexpr, K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr,
    KS_STRIDES: tl.constexpr, VS_STRIDES: tl.constexpr, OUT_STRIDES: tl.constexpr,
    TABLE_STRIDE: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, HAS_E4M3: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Do what ``decode_kernel`` does on keys and values of words of two codes; see codes_triton.

    K_STRIDES and V_STRIDES count words. key_scales, value_scales: [num_blocks, T, H] float32.
    """
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_lens + sequence)
    first, last = share(context, window, split, SPLITS, TILE, HAS_WINDOW)
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH // 2)
    rows = read_query(query, sequence, kv_head * GROUP, row, Q_STRIDES, GROUP, DIM, WIDTH)
    rows, power = split_rows(rows, INTERPRETED)
    low_rows, high_rows = tl.split(tl.reshape(rows, [ROWS, WIDTH // 2, 2]))
    factors = power * score_factor
    table = block_tables + sequence * TABLE_STRIDE
    low_acc = tl.zeros([ROWS, WIDTH // 2], tl.float32)
    high_acc = tl.zeros([ROWS, WIDTH // 2], tl.float32)
    total = tl.zeros([ROWS, TILE], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for start in range(first, last, TILE):
        token = start + tl.arange(0, TILE)
        is_read = token < last
        if HAS_WINDOW:
            is_read &= token >= context - window
        block, slot = block_of(table, start, token, is_read, PAGE, TILE), token % PAGE
        wanted = is_read[:, None] & (column < DIM // 2)[None, :]
        at = place(block, slot, kv_head, K_STRIDES)[:, None] + column[None, :]
        low, high = from_word(tl.load(keys + at, mask=wanted, other=0), KIND, HAS_E4M3)
        scores = tl.dot(low_rows, tl.trans(as_operand(low, INTERPRETED)))
        scores = tl.dot(high_rows, tl.trans(as_operand(high, INTERPRETED)), scores)
        at = place(block, slot, kv_head, KS_STRIDES)
        key_scale = tl.load(key_scales + at, mask=is_read, other=1.0)
        scores *= factors[:, None] * key_scale[None, :]
        if HAS_CAP:
            scores = capped(scores, cap)
        at = place(block, slot, kv_head, VS_STRIDES)
        value_scale = tl.load(value_scales + at, mask=is_read, other=1.0)
        shift, mantissa, unshift = split_scale(value_scale)
        scores = tl.where(is_read[None, :], scores + shift[None, :], float("-inf"))
        weight, peak, shrink = weigh(scores, peak)
        total = total * shrink[:, None] + weight * unshift[None, :]
        weight *= mantissa[None, :]
        at = place(block, slot, kv_head, V_STRIDES)[:, None] + column[None, :]
        low, high = from_word(tl.load(values + at, mask=wanted, other=0), KIND, HAS_E4M3)
        low, high = as_operand(low, INTERPRETED), as_operand(high, INTERPRETED)
        low_acc = multiply_add(low_acc * shrink[:, None], weight, low, INTERPRETED)
        high_acc = multiply_add(high_acc * shrink[:, None], weight, high, INTERPRETED)
    leave(
        tl.interleave(low_acc, high_acc), tl.sum(total, 1), peak, sequence, kv_head, split,
        first < last, out, partial, lse,
        OUT_STRIDES, SPLITS, GROUP, DIM, ROWS, 1, WIDTH, INTERPRETED,
    )  # fmt: skip
