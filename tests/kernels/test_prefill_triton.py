"""Prefill after a prefix by the Triton kernel against attention in float64, and what it compiles to."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.kernels import prefill_triton
from respkv.kernels.attention import paged_prefill_reference
from respkv.kernels.paged_kv import CODE_DTYPES, PLAIN, PagedKV, Scoring
from respkv.kernels.prefill_triton import PrefillTile
from tests.kernels.batches import Batch, error_max, error_of, make_batch
from tests.kernels.compiled import ARCHES, Compiled, compile_for

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of a program
# Small ones, so that few tokens make several tiles and several programs.
SMALL = PrefillTile(rows=16, tokens=16, warps=4, stages=3)


def check(
    batch: Batch, *, scoring: Scoring = PLAIN, tile: PrefillTile | None = SMALL
) -> torch.Tensor:
    """Compute new tokens by the kernel, unrounded; return them. All that it writes is NaN before."""
    query, lengths = batch.query, batch.cu_seqlens.diff()
    expected = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    paged_prefill_reference(
        query,
        batch.key,
        batch.value,
        batch.pages,
        batch.cu_seqlens,
        out=expected,
        scoring=scoring,
        precision=torch.float64,
    )
    out = torch.full(query.shape, math.nan, device=query.device)
    prefill(batch, scoring, tile, out, new_max=int(lengths.max()))
    assert error_of(out, expected) <= error_max(query)
    return out


def prefill(
    batch: Batch, scoring: Scoring, tile: PrefillTile | None, out: torch.Tensor, *, new_max: int
) -> None:
    prefill_triton.prefill(
        batch.query,
        batch.key,
        batch.value,
        batch.pages,
        batch.cu_seqlens,
        new_max=new_max,
        scoring=scoring,
        out=out,
        tile=tile,
    )


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [*((dtype, 80) for dtype in DTYPES), (torch.bfloat16, 256), (torch.int8, 256)],
    ids=str,
)
def test_every_type_of_page_at_odd_lengths(
    dtype: torch.dtype, dim: int, device: torch.device
) -> None:
    batch = make_batch([33, 1], new=[5, 18], dtype=dtype, dim=dim, heads=1, device=device)
    check(batch, tile=None)


@pytest.mark.parametrize(
    ("page", "layout"), [(16, "nhd"), (16, "hnd"), (32, "interleaved"), (64, "nhd"), (256, "hnd")]
)
def test_every_size_and_layout_of_pages(page: int, layout: str, device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.int8):
        check(make_batch([70], new=[7], dtype=dtype, page=page, layout=layout, device=device))


@pytest.mark.parametrize("group", [1, 3, 7, 16, 20])
def test_every_size_of_group(group: int, device: torch.device) -> None:
    batch = make_batch([20], new=[9], dtype=torch.bfloat16, group=group, device=device)
    check(batch, tile=PrefillTile(32, 16, 4, 3))


@pytest.mark.parametrize("contexts", [[0], [0, 40, 0], [16]], ids=str)
def test_prefixes_and_new_tokens_may_be_missing(contexts: list[int], device: torch.device) -> None:
    for dtype in (torch.float32, torch.float8_e4m3fn):
        new = [4 * (i != 1) for i in range(len(contexts))]
        check(make_batch(contexts, new=new, dtype=dtype, heads=1, device=device))


@pytest.mark.parametrize("window", [1, 13, 40, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_window_hides_older_tokens_whose_blocks_may_be_gone(
    window: int, dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch([70, 3], new=[21, 2], dtype=dtype, heads=1, device=device)
    tables = batch.pages.block_tables.clone()
    tables[0, : max(0, 70 + 1 - window) // 16] = 1 << 28
    batch = replace(batch, pages=replace(batch.pages, block_tables=tables))
    check(batch, scoring=Scoring(window=window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_soft_cap_bends_scores(dtype: torch.dtype, device: torch.device) -> None:
    batch = make_batch([30], new=[6], dtype=dtype, heads=1, device=device)
    check(batch, scoring=Scoring(soft_cap=2.0, sm_scale=0.5, window=20))


def test_scores_far_from_zero_neither_overflow_nor_vanish(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.int8):
        batch = make_batch([30], new=[6], dtype=dtype, heads=1, spread=3.0, device=device)
        check(batch, scoring=Scoring(sm_scale=40.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_the_output_is_rounded_half_to_even_to_its_type(
    dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch([17], new=[6], dtype=dtype, heads=1, device=device)
    exact = check(batch)
    out = torch.full_like(batch.query, math.nan)
    # More room than there are tokens: programs that have none write nothing.
    prefill(batch, PLAIN, SMALL, out, new_max=14)
    assert torch.equal(out, exact.to(out.dtype))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject, device: torch.device) -> None:
    draw = data.draw
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=2)
    )
    batch = make_batch(
        [context for context, _ in lengths],
        new=[1 + new for _, new in lengths],
        dtype=draw(st.sampled_from(DTYPES)),
        dim=8 * draw(st.integers(2, 20)),
        heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 9)),
        page=draw(st.sampled_from([1, 8, 16, 48, 128])),
        layout=draw(st.sampled_from(["nhd", "hnd", "interleaved"])),
        device=device,
        seed=draw(st.integers(0, 99)),
    )
    check(batch, scoring=Scoring(window=draw(st.none() | st.integers(1, 80))))


def compiled(
    dtype: torch.dtype, arch: int, *, dim: int = 128, new: int = 1024, scoring: Scoring = PLAIN
) -> Compiled:
    """Compile for 32 query heads, 8 kv heads and a prefix of such numbers."""
    has_codes = dtype in CODE_DTYPES
    named = {torch.bfloat16: "*bf16:16", torch.float32: "*fp32:16"}
    own = torch.bfloat16 if has_codes else dtype
    with torch.device("meta"):
        query, key = torch.empty(9, 32, dim, dtype=own), torch.empty(9, 8, dim, dtype=own)
        keys = torch.empty(9, 16, 8, dim, dtype=torch.uint8 if has_codes else dtype)
        scales = torch.empty(9, 16, 8) if has_codes else None
        tables = torch.empty(32, 256, dtype=torch.int32)
    tile = prefill_triton.prefill_tile(
        dim, query.element_size(), new * 4, 4, has_codes=has_codes, capability=arch
    )
    pages = PagedKV(keys, keys, tables, tables[:, 0], scales, scales)
    constants = prefill_triton.prefill_constants(
        query, key, key, pages, scoring=scoring, out=query, tile=tile
    )
    constants |= {"KIND": 0, "HAS_E4M3": False, "INTERPRETED": False}
    signature = dict.fromkeys(("query", "key", "value", "out"), named[own])
    signature |= dict.fromkeys(("keys", "values"), "*u8:16" if has_codes else named[own])
    signature |= dict.fromkeys(("block_tables", "context_lens", "cu_seqlens"), "*i32:16")
    signature |= {"score_factor": "fp32", "window": "i32", "cap": "fp32"}
    if has_codes:
        signature |= dict.fromkeys(("key_scales", "value_scales"), "*fp32:16")
        constants |= {"KIND": 1 if dtype == torch.int8 else 2, "HAS_E4M3": arch >= 90}
    else:
        constants |= dict.fromkeys(("key_scales", "value_scales"))
    made = compile_for(
        prefill_triton.prefill_kernel,
        signature,
        constants,
        arch,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    assert made.registers * 32 * tile.warps <= 65536
    return made


CASES: list[tuple[torch.dtype, int, dict[str, Any]]] = [
    *((torch.bfloat16, arch, {}) for arch in ARCHES),
    (torch.bfloat16, 90, {"dim": 256, "scoring": Scoring(window=1024, soft_cap=30.0)}),
    (torch.int8, 90, {}),
    (torch.float32, 90, {"new": 4}),
]
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@pytest.mark.parametrize(("dtype", "arch", "more"), CASES, ids=str)
def test_it_compiles_to_tensor_core_instructions_without_spills(
    dtype: torch.dtype, arch: int, more: dict[str, Any]
) -> None:
    made = compiled(dtype, arch, **more)
    assert made.spill_bytes == 0
    assert made.shared_bytes <= SHARED_BYTES[arch]
    assert "cp.async.cg.shared.global" in made.ptx
    assert made.load_bits <= {32, 128}
    assert max(made.store_bits) == 128
    assert ("mma.sync" if dtype == torch.float32 else PRODUCTS[arch]) in made.ptx
