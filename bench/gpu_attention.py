"""Attention over pages against torch's over KV that lies together, and against others' kernels.

A decode step reads all keys and values once, so its goal is a share of the device copy's bandwidth.
torch has no paged attention: its rows are without the gathering, which flatters it, and with it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from bench.gpu_cache import DTYPE
from bench.gpu_clock import Work
from bench.gpu_kernels import Bench
from bench.gpu_peers import peers, relative_error
from bench.gpu_table import Row, times_as_fast, times_as_long
from respkv.kernels.attention import (
    paged_decode,
    paged_decode_reference,
    paged_prefill,
    paged_prefill_reference,
)
from respkv.kernels.paged_kv import PagedKV
from respkv.kernels.splits import decode_workspace, num_splits
from tests.kernels import data

PAGES: Final = (16, 64)
CODES: Final = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST: Final = {"int8": 127.0, "fp8": 448.0}
DECODE_GOAL, SPLIT_GOAL, SMALL_PAGE_GOAL, CODES_GOAL = 0.80, 0.60, 0.90, 0.62
ERROR_MAX: Final = 2e-3
EXACT_SEQUENCES: Final = 2  # are compared with float64


def decode(bench: Bench) -> Iterator[Row]:
    """Measure the step that makes one token for each sequence of a batch."""
    sizes = bench.caches.sizes
    yield from _decode(bench, sizes.sequences, sizes.context, DECODE_GOAL, has_codes=True)
    yield from _decode(bench, sizes.long_sequences, sizes.long_context, SPLIT_GOAL, has_codes=False)


def _decode(
    bench: Bench, batch: int, context: int, goal: float, *, has_codes: bool
) -> Iterator[Row]:
    query = _query(bench, batch)
    copy = bench.copy()
    bf16: dict[int, Work] = {}
    rows: list[Callable[[], Row]] = []
    works = [copy]
    for page_tokens in PAGES:
        what = f"B={batch} x {context}, page {page_tokens}"
        pages = _pages(bench, batch, context, page_tokens)
        ours = bf16[page_tokens] = _ours(bench, f"decode bf16, {what}", query, pages)
        works.append(ours)
        note = _exactness(query, pages)
        rows.append(partial(bench.row, "decode", ours, copy, goal, note))
        found = [
            *_torch(query, pages, what),
            *peers(query, pages, paged_decode(query, pages), what),
        ]
        for other in found:
            if isinstance(other, str):
                rows.append(partial(Row, "decode", f"{ours.name}: {other}"))
            else:
                works.append(other)
                rows.append(partial(times_as_fast, "decode", ours, other))
        for name in CODES if has_codes else ():
            coded = _ours(bench, f"decode {name}, {what}", query, _coded(pages, name))
            works.append(coded)
            rows.append(partial(times_as_long, "decode", coded, ours, goal=CODES_GOAL))
    small, large = (bf16[tokens] for tokens in PAGES)
    rows.append(partial(times_as_fast, "decode", small, large, goal=SMALL_PAGE_GOAL))
    bench.measure(f"decode B={batch} x {context}", works)
    for row in rows:
        yield row()


def prefill(bench: Bench) -> Iterator[Row]:
    """Measure new tokens of prompts whose prefixes are in pages."""
    sizes, page_tokens = bench.caches.sizes, PAGES[0]
    batch, new, prefix = sizes.prompts, sizes.new_tokens, sizes.context
    pages = _pages(bench, batch, prefix, page_tokens)
    query = _query(bench, batch * new)
    key = data.keys(batch * new, sizes.heads, sizes.dim, 3).to(bench.device)
    value = data.values(batch * new, sizes.heads, sizes.dim, 4).to(bench.device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=bench.device) * new
    out = torch.empty_like(query)

    def run() -> None:
        paged_prefill(query, key, value, pages, starts, new_max=new, out=out)

    what = f"prefill {batch} x {new} after {prefix}, page {page_tokens}"
    exact = paged_prefill_reference(
        query, key, value, pages, starts, out=query.double(), precision=torch.float64
    )
    run()
    error = relative_error(out, exact)
    ours = Work(what, run)
    rows, keys, values = (
        torch.unflatten(each, 0, (batch, new)).transpose(1, 2) for each in (query, key, value)
    )
    mask = causal_lower_right(new, prefix + new)
    given: object = mask if bench.device.type == "cuda" else mask._materialize(bench.device)

    def gathered() -> tuple[Tensor, Tensor]:
        old_keys, old_values = _gathered(pages)
        return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)

    together = gathered()
    plain = Work("torch", lambda: _attend(rows, *together, given))
    whole = Work("torch with the gathering", lambda: _attend(rows, *gathered(), given))
    bench.measure(what, [ours, plain, whole])
    flops = 4 * batch * sizes.query_heads * sizes.dim * (new * prefix + new * (new + 1) // 2)
    note = f"{flops / ours.seconds / 1e12:.1f} TFLOP/s; {_error_note(error)}"
    yield times_as_fast("prefill", ours, plain, note=note)
    yield times_as_fast("prefill", ours, whole)


def _query(bench: Bench, tokens: int) -> Tensor:
    sizes = bench.caches.sizes
    return data.gaussian(tokens, sizes.query_heads, sizes.dim, 2).to(bench.device)


def _pages(bench: Bench, batch: int, context: int, page_tokens: int) -> PagedKV:
    sizes, device = bench.caches.sizes, bench.device
    blocks = batch * context // page_tokens
    shape = (blocks, page_tokens, sizes.heads, sizes.dim)
    generator = torch.Generator(device).manual_seed(5)
    keys, values = (torch.randn(shape, generator=generator, device=device).to(DTYPE) for _ in "kv")
    order = torch.randperm(blocks, generator=generator, device=device)
    table = order.view(batch, -1).to(torch.int32)
    return PagedKV(
        keys, values, table, torch.full((batch,), context, dtype=torch.int32, device=device)
    )


def _coded(pages: PagedKV, name: str) -> PagedKV:
    def code(numbers: Tensor) -> tuple[Tensor, Tensor]:
        scale = numbers.float().abs().amax(-1) / LARGEST[name]
        codes = numbers.float() / scale[..., None]
        return (codes.round() if name == "int8" else codes).to(CODES[name]), scale

    keys, key_scales = code(pages.keys)
    values, value_scales = code(pages.values)
    return PagedKV(keys, values, pages.block_tables, pages.context_lens, key_scales, value_scales)


def _ours(bench: Bench, name: str, query: Tensor, pages: PagedKV) -> Work:
    out = torch.empty_like(query)
    batch, query_heads, dim = query.shape
    workspace = None
    if bench.device.type == "cuda":  # as a worker has it: made once
        sm_count = torch.cuda.get_device_properties(bench.device).multi_processor_count
        splits = num_splits(
            programs=batch * pages.keys.shape[2],
            context_max=int(pages.context_lens.max()),
            sm_count=sm_count,
        )
        workspace = decode_workspace(batch, query_heads, dim, splits, bench.device)
    scales = 0 if pages.key_scales is None else 2 * pages.key_scales.nbytes
    nbytes = 2 * pages.keys.nbytes + scales + 2 * query.nbytes
    return Work(name, lambda: paged_decode(query, pages, out=out, workspace=workspace), nbytes)


def _torch(query: Tensor, pages: PagedKV, what: str) -> list[Work]:
    keys, values = _gathered(pages)
    rows = query[:, :, None]
    return [
        Work(f"torch, {what}", lambda: _attend(rows, keys, values, None)),
        Work(f"torch with the gathering, {what}", lambda: _attend(rows, *_gathered(pages), None)),
    ]


def _gathered(pages: PagedKV) -> tuple[Tensor, Tensor]:
    # [B, H, tokens, D]
    table = pages.block_tables.long()
    return (
        pages.keys[table].flatten(1, 2).transpose(1, 2),
        pages.values[table].flatten(1, 2).transpose(1, 2),
    )


def _attend(rows: Tensor, keys: Tensor, values: Tensor, mask: object) -> Tensor:
    attend: Callable[..., Tensor] = (
        F.scaled_dot_product_attention
    )  # a mask may be more than a tensor
    return attend(rows, keys, values, attn_mask=mask, enable_gqa=True)


def _exactness(query: Tensor, pages: PagedKV) -> str:
    some = slice(0, min(EXACT_SEQUENCES, query.shape[0]))
    few = PagedKV(pages.keys, pages.values, pages.block_tables[some], pages.context_lens[some])
    exact = paged_decode_reference(
        query[some], few, out=query[some].double(), precision=torch.float64
    )
    return _error_note(relative_error(paged_decode(query, pages)[some], exact))


def _error_note(error: float) -> str:
    return f"error {error:.1e}, {'met' if error <= ERROR_MAX else 'MISSED'} <= {ERROR_MAX:.0e}"
