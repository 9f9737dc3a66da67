"""Attention in memory: what the plain reference computes, whatever is grouped with what."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from respkv.kernels.attention import paged_decode_reference
from respkv.kernels.paged_kv import PLAIN, Scoring
from respkv.paged.host_attention import Span, attend, host_decode, plan
from tests.kernels.batches import Batch, error_of, make_batch

CPU = torch.device("cpu")
CONTEXTS = (1, 37, 64, 16, 5, 130, 2)
SCORINGS = [
    PLAIN,
    Scoring(window=20),
    Scoring(soft_cap=5.0),
    Scoring(sm_scale=0.2, window=7, soft_cap=3.0),
]


def exact(batch: Batch, scoring: Scoring) -> Tensor:
    out = torch.zeros_like(batch.query, dtype=torch.float64)
    paged_decode_reference(
        batch.query, batch.pages, out=out, scoring=scoring, precision=torch.float64
    )
    return out


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(("heads", "group"), [(2, 4), (3, 1), (1, 8)])
def test_decodes_are_those_of_the_reference(scoring: Scoring, heads: int, group: int) -> None:
    batch = make_batch(CONTEXTS, dim=16, heads=heads, group=group, device=CPU)
    ours = host_decode(batch.query, batch.pages, scoring=scoring)
    assert error_of(ours, exact(batch, scoring)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_small_types_are_computed_as_exactly_as_they_can_be_written(
    scoring: Scoring, dtype: torch.dtype
) -> None:
    batch = make_batch(CONTEXTS, dim=16, dtype=dtype, device=CPU)
    # What is added to the error by writing the result, and the weights before it.
    written = 2 * torch.finfo(dtype).eps
    assert (
        error_of(host_decode(batch.query, batch.pages, scoring=scoring), exact(batch, scoring))
        < written
    )


def test_a_sequence_of_no_tokens_gets_zeros() -> None:
    batch = make_batch((0, 3, 0), dim=16, device=CPU)
    ours = host_decode(batch.query, batch.pages)
    assert not ours[0].any()
    assert not ours[2].any()
    assert error_of(ours, exact(batch, PLAIN)) < 1e-5


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("gathered_bytes_max", [0, 1 << 14, 1 << 30])
def test_pieces_of_prompts_and_single_tokens_attend_as_each_would_alone(
    scoring: Scoring, gathered_bytes_max: int
) -> None:
    news, contexts = (1, 1, 1, 9, 14, 3), (1, 90, 33, 9, 60, 35)
    batch = make_batch(contexts, new=news, dim=16, device=CPU)
    spans = [
        Span(table, context, new)
        for table, context, new in zip(
            batch.pages.block_tables.tolist(), contexts, news, strict=True
        )
    ]
    # Sequences whose blocks lie side by side, in one run or three, as views of runs are other paths.
    spans[4] = Span(list(range(4)), 60, 14)
    spans[1] = Span([0, 1, 2, 5, 6, 4], 90, 1)
    spans[2] = Span([3, 4, 5], 33, 1)
    pages = replace(batch.pages, keys=batch.pages.keys.clone(), values=batch.pages.values.clone())
    for plane in (pages.keys, pages.values):
        plane[:7] = plane[:7].nan_to_num(0.5)
    groups = plan(
        spans,
        block_tokens=16,
        token_bytes=2 * 16 * 4,
        dtype=torch.float32,
        window=scoring.window,
        gathered_bytes_max=gathered_bytes_max,
        piece_bytes_min=1000,
    )
    assert sum(group.count for group in groups) == len(spans)
    if not gathered_bytes_max and scoring.window is None:
        assert [len(group.slots) for group in groups[1:3]] == [3, 1]
    out = torch.full_like(batch.query, float("nan"))
    attend(batch.query, pages.keys, pages.values, groups, scoring=scoring, out=out)
    row = 0
    for span in spans:
        for new in range(span.new):
            context = span.context - span.new + new + 1
            one = replace(
                pages,
                block_tables=torch.tensor([span.blocks], dtype=torch.int32),
                context_lens=torch.tensor([context], dtype=torch.int32),
            )
            alone = replace(batch, query=batch.query[row : row + 1], pages=one)
            assert error_of(out[row : row + 1], exact(alone, scoring)) < 1e-5
            row += 1


def test_short_sequences_are_one_product_and_long_ones_are_read_where_they_lie() -> None:
    spans = [Span([3, 9], 20, 1), Span([4], 5, 1), Span(list(range(20, 60)), 640, 1)]
    groups = plan(
        spans, block_tokens=16, token_bytes=256, dtype=torch.float32, gathered_bytes_max=1 << 14
    )
    assert [group.count for group in groups] == [2, 1]
    assert groups[1].slots == (slice(320, 960),)
    assert groups[1].mask is None


def test_what_does_not_fit_is_refused() -> None:
    batch = make_batch((3,), dim=16, device=CPU)
    with pytest.raises(ValueError, match="do not share heads"):
        host_decode(batch.query[:, :3], batch.pages)
    short = replace(batch.pages, context_lens=torch.full((1,), 4000, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"0 to the \d+ of the tables, not 4000"):
        host_decode(batch.query, short)
    below = replace(batch.pages, context_lens=torch.full((1,), -1, dtype=torch.int32))
    with pytest.raises(ValueError, match="not -1"):
        host_decode(batch.query, below)


@pytest.mark.parametrize("block", [-1, 1000])
def test_a_block_that_is_none_is_refused_where_it_would_be_read(block: int) -> None:
    batch = make_batch((70, 60), dim=16, page=16, device=CPU)
    tables = batch.pages.block_tables.clone()
    tables[1, 0] = block
    pages = replace(batch.pages, block_tables=tables)
    with pytest.raises(ValueError, match=f"block {block} is not one of"):
        host_decode(batch.query, pages)
    with pytest.raises(ValueError, match=f"block {block} is not one of"):
        host_decode(batch.query, pages, scoring=Scoring(window=45))
    narrow = Scoring(window=44)  # its first token is the first one of the second block
    got = host_decode(batch.query, pages, scoring=narrow)
    assert error_of(got, exact(batch, narrow)) < 1e-5


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_sequences_that_are_gathered_read_their_own_tokens(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    window = data.draw(st.none() | st.integers(1, 12))
    lengths = sorted(data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=5)), reverse=True)
    blocks = iter(data.draw(st.permutations(range(100))))
    spans = [Span([next(blocks) for _ in range(-(-n // size))], n, 1) for n in lengths]
    [group] = plan(spans, block_tokens=size, token_bytes=1, dtype=torch.float32, window=window)
    assert isinstance(group.slots, Tensor)
    for row, span in enumerate(spans):
        seen = range(max(0, span.context - (window or span.context)), span.context)
        own = [span.blocks[at // size] * size + at % size for at in seen]
        assert group.slots[row].tolist() == own + [own[0]] * (group.slots.shape[1] - len(own))
        if group.mask is not None:
            assert torch.isfinite(group.mask[row, 0, 0]).sum() == len(own)
        else:
            assert group.slots.shape[1] == len(own)
