"""Paged decode by the Triton kernels against attention in float64, and what the compiler makes of it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.kernels import decode_triton, splits_triton
from respkv.kernels.attention import paged_decode, paged_decode_reference
from respkv.kernels.paged_kv import CODE_DTYPES, PLAIN, PagedKV, Scoring
from respkv.kernels.splits import decode_workspace
from tests.kernels.batches import Batch, error_max, error_of, make_batch
from tests.kernels.compiled import ARCHES, Compiled, compile_for

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of an SM


def check(batch: Batch, *, splits: int = 1, scoring: Scoring = PLAIN) -> torch.Tensor:
    """Decode by the kernels, unrounded; return it. All that they write is NaN before."""
    query = batch.query
    expected = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    paged_decode_reference(
        query, batch.pages, out=expected, scoring=scoring, precision=torch.float64
    )
    out = torch.full(query.shape, math.nan, device=query.device)
    decode(batch, splits, scoring, out)
    assert error_of(out, expected) <= error_max(query)
    return out


def decode(batch: Batch, splits: int, scoring: Scoring, out: torch.Tensor) -> None:
    rows, heads, dim = batch.query.shape
    workspace = decode_workspace(rows, heads, dim, splits, out.device)
    workspace.partial.fill_(math.nan)
    workspace.lse.fill_(math.nan)
    decode_triton.decode(batch.query, batch.pages, scoring=scoring, out=out, workspace=workspace)


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [*((dtype, 80) for dtype in DTYPES), (torch.bfloat16, 256), (torch.int8, 256)],
    ids=str,
)
def test_every_type_of_page_at_odd_lengths(
    dtype: torch.dtype, dim: int, device: torch.device
) -> None:
    check(make_batch([1, 33, 200], dtype=dtype, dim=dim, heads=1, device=device), splits=2)


@pytest.mark.parametrize(
    ("page", "layout"), [(16, "nhd"), (16, "hnd"), (32, "interleaved"), (64, "nhd"), (256, "hnd")]
)
def test_every_size_and_layout_of_pages(page: int, layout: str, device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.int8):
        check(make_batch([17, 130], dtype=dtype, page=page, layout=layout, device=device))


@pytest.mark.parametrize("group", [1, 3, 7, 16, 20])
def test_every_size_of_group(group: int, device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        check(make_batch([45], dtype=dtype, heads=2, group=group, device=device))


@pytest.mark.parametrize(("splits", "dim"), [(2, 128), (3, 80), (6, 72), (19, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_splits_merge_to_the_same_also_where_some_have_nothing(
    splits: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch([0, 300, 16], dtype=dtype, dim=dim, heads=1, group=1, device=device)
    out = check(batch, splits=splits)
    assert not out[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_of_no_tokens_has_zeros(dtype: torch.dtype, device: torch.device) -> None:
    assert not check(make_batch([0, 0], dtype=dtype, device=device)).any()


@pytest.mark.parametrize("window", [1, 20, 64, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_window_hides_older_tokens_whose_blocks_may_be_gone(
    window: int, dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch([3, 150, 0], dtype=dtype, heads=1, device=device)
    tables = batch.pages.block_tables.clone()
    for table, context in zip(tables, batch.pages.context_lens.tolist(), strict=True):
        gone = max(0, context - window) // 16
        for plane in (batch.pages.key_scales, batch.pages.value_scales):
            if plane is not None:
                plane[table[:gone].long()] = math.nan
        table[:gone] = 1 << 28
    batch = replace(batch, pages=replace(batch.pages, block_tables=tables))
    check(batch, splits=3, scoring=Scoring(window=window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_soft_cap_bends_scores(dtype: torch.dtype, device: torch.device) -> None:
    batch = make_batch([70], dtype=dtype, device=device)
    check(batch, splits=2, scoring=Scoring(soft_cap=2.0, sm_scale=0.5, window=40))


def test_scores_far_from_zero_neither_overflow_nor_vanish(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.int8):
        batch = make_batch([50], dtype=dtype, device=device)
        check(batch, scoring=Scoring(sm_scale=40.0), splits=2)
        check(batch, scoring=Scoring(sm_scale=-40.0))


@pytest.mark.parametrize("dtype", CODE_DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_codes_serve_values_and_queries_of_any_size(
    dtype: torch.dtype, size: float, device: torch.device
) -> None:
    batch = make_batch([90], dtype=dtype, spread=4.0, device=device)
    check(replace(batch, query=batch.query * size), scoring=Scoring(sm_scale=0.1 / size))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_the_output_is_rounded_half_to_even_to_its_type(
    splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch([70], dtype=dtype, device=device)
    exact = check(batch, splits=splits)
    out = torch.full_like(batch.query, math.nan)
    decode(batch, splits, PLAIN, out)
    assert torch.equal(out, exact.to(out.dtype))


def test_views_of_larger_tensors_will_do(device: torch.device) -> None:
    batch = make_batch([40, 9], dtype=torch.bfloat16, device=device)
    fused = torch.full((2, 3, *batch.query.shape[1:]), math.nan).to(batch.query)
    fused[:, 1] = batch.query
    check(replace(batch, query=fused[:, 1]))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject, device: torch.device) -> None:
    draw = data.draw
    batch = make_batch(
        draw(st.lists(st.integers(0, 130), min_size=1, max_size=2)),
        dtype=draw(st.sampled_from(DTYPES)),
        dim=8 * draw(st.integers(2, 20)),
        heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 9)),
        page=draw(st.sampled_from([1, 8, 16, 48, 128])),
        layout=draw(st.sampled_from(["nhd", "hnd", "interleaved"])),
        spread=1.0,
        device=device,
        seed=draw(st.integers(0, 99)),
    )
    window = draw(st.none() | st.integers(1, 200))
    check(batch, splits=draw(st.integers(1, 4)), scoring=Scoring(window=window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_captured_graph_serves_other_lengths(dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: graphs are CUDA's")
    batch = make_batch([300, 900], dtype=dtype, device=device)
    out = torch.empty_like(batch.query)
    rows, heads, dim = batch.query.shape
    workspace = decode_workspace(rows, heads, dim, 4, device)

    def step() -> None:
        paged_decode(batch.query, batch.pages, out=out, workspace=workspace)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    batch.pages.context_lens.copy_(torch.tensor([17, 0]))
    graph.replay()
    expected = torch.empty(batch.query.shape, dtype=torch.float64, device=device)
    paged_decode_reference(batch.query, batch.pages, out=expected, precision=torch.float64)
    assert error_of(out, expected) <= 1e-2


def compiled(
    dtype: torch.dtype,
    arch: int,
    *,
    dim: int = 128,
    page: int = 16,
    splits: int = 1,
    scoring: Scoring = PLAIN,
) -> Compiled:
    """Compile for 32 query heads, 8 kv heads and pages of such numbers."""
    has_codes = dtype in CODE_DTYPES
    named = {torch.bfloat16: "*bf16:16", torch.float16: "*fp16:16", torch.float32: "*fp32:16"}
    own = torch.bfloat16 if has_codes else dtype
    with torch.device("meta"):
        query = torch.empty(32, 32, dim, dtype=own)
        keys = torch.empty(9, page, 8, dim, dtype=dtype)
        scales = torch.empty(9, page, 8) if has_codes else None
        tables = torch.empty(32, 256, dtype=torch.int32)
    tile = decode_triton.decode_tile(dim, keys.element_size())
    stored = keys.view(torch.uint16) if has_codes else keys
    pages = PagedKV(stored, stored, tables, tables[:, 0], scales, scales)
    constants = decode_triton.decode_constants(
        query, pages, scoring=scoring, out=query, splits=splits, tile=tile
    )
    signature = dict.fromkeys(("query", "out"), named[own])
    signature |= dict.fromkeys(("keys", "values"), "*u16:16" if has_codes else named[own])
    signature |= dict.fromkeys(("partial", "lse"), "*fp32:16")
    signature |= dict.fromkeys(("block_tables", "context_lens"), "*i32:16")
    signature |= {"score_factor": "fp32", "window": "i32", "cap": "fp32"}
    kernel: Any = decode_triton.decode_kernel
    constants["INTERPRETED"] = False
    if has_codes:
        kernel = decode_triton.decode_codes_kernel
        signature |= dict.fromkeys(("key_scales", "value_scales"), "*fp32:16")
        constants |= {"KIND": 1 if dtype == torch.int8 else 2, "HAS_E4M3": arch >= 90}
    return compile_for(
        kernel,
        signature,
        constants,
        arch,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


CASES = [
    *((dtype, arch, {}) for dtype in (torch.bfloat16, torch.float8_e4m3fn) for arch in ARCHES),
    (torch.int8, 90, {"dim": 256}),
    (torch.bfloat16, 90, {"dim": 80, "page": 64}),
    (torch.bfloat16, 90, {"splits": 8, "scoring": Scoring(window=1024, soft_cap=30.0)}),
]


@pytest.mark.parametrize(("dtype", "arch", "more"), CASES, ids=str)
def test_two_programs_fit_an_sm_and_pages_are_read_16_bytes_at_a_time(
    dtype: torch.dtype, arch: int, more: dict[str, Any]
) -> None:
    made = compiled(dtype, arch, **more)
    assert made.spill_bytes == 0
    assert 2 * 128 * made.registers <= 65536
    assert 2 * made.shared_bytes <= SHARED_BYTES[arch]
    # K and V go to shared memory by themselves; nothing but lengths, a block table's entries and
    # scales is read in less.
    assert "cp.async.cg.shared.global" in made.ptx
    assert made.load_bits <= {32, 128}
    assert "mma.sync" in made.ptx


def test_float32_multiplies_in_tensor_cores_without_spills() -> None:
    made = compiled(torch.float32, 90, dim=256)
    assert made.spill_bytes == 0
    assert "mma.sync" in made.ptx


@pytest.mark.parametrize("arch", ARCHES)
def test_the_merge_compiles_without_spills(arch: int) -> None:
    constants = decode_triton.merge_constants(torch.empty(32, 32, 128, device="meta"), 37)
    signature = {"partial": "*fp32:16", "lse": "*fp32:16", "out": "*bf16:16"}
    constants["INTERPRETED"] = False
    made = compile_for(splits_triton.merge_kernel, signature, constants, arch, num_warps=4)
    assert made.spill_bytes == 0
    assert 128 in made.load_bits
