"""The references of paged attention against torch's own attention, and what the functions refuse."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from respkv.kernels.attention import paged_decode, paged_prefill
from respkv.kernels.paged_kv import PagedKV, Scoring
from respkv.kernels.splits import SPLITS_MAX, num_splits
from tests.kernels.batches import Batch, error_of, make_batch

CPU = torch.device("cpu")


def gathered(plane: torch.Tensor, pages: PagedKV, sequence: int) -> torch.Tensor:
    """Return [H, tokens, D] of a sequence, a token at a time."""
    page = plane.shape[1]
    table = pages.block_tables[sequence].tolist()
    tokens = range(int(pages.context_lens[sequence]))
    rows = [plane[table[token // page], token % page] for token in tokens]
    return torch.stack(rows).transpose(0, 1)


def prefill_of(batch: Batch, scoring: Scoring) -> torch.Tensor:
    new_max = int(batch.cu_seqlens.diff().max())
    return paged_prefill(
        batch.query,
        batch.key,
        batch.value,
        batch.pages,
        batch.cu_seqlens,
        new_max=new_max,
        scoring=scoring,
    )


@pytest.mark.parametrize("window", [None, 1, 10, 99])
def test_decode_is_attention_to_the_tokens_in_pages(window: int | None) -> None:
    batch = make_batch([5, 40], dim=24, group=3, device=CPU)
    out = paged_decode(batch.query, batch.pages, scoring=Scoring(window=window, sm_scale=0.3))
    for sequence in range(2):
        key, value = (
            gathered(plane, batch.pages, sequence)[:, -(window or 99) :]
            for plane in (batch.pages.keys, batch.pages.values)
        )
        row = batch.query[sequence, :, None]
        expected = scaled_dot_product_attention(row, key, value, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out[sequence], expected[:, 0])


@pytest.mark.parametrize("window", [None, 1, 10, 99])
def test_prefill_is_attention_to_the_prefix_and_to_new_tokens_so_far(window: int | None) -> None:
    batch = make_batch([20, 7], new=[3, 12], dim=24, group=3, device=CPU)
    out = prefill_of(batch, Scoring(window=window))
    for sequence, context in enumerate((20, 7)):
        own = slice(*batch.cu_seqlens[sequence : sequence + 2].tolist())
        key, value = (
            torch.cat([gathered(plane, batch.pages, sequence), new[own].transpose(0, 1)], 1)
            for plane, new in (
                (batch.pages.keys, batch.key),
                (batch.pages.values, batch.value),
            )
        )
        age = torch.arange(context, key.shape[1])[:, None] - torch.arange(key.shape[1])
        row = batch.query[own].transpose(0, 1)
        visible = (age >= 0) & (age < (window or 99))
        expected = scaled_dot_product_attention(row, key, value, visible, enable_gqa=True)
        torch.testing.assert_close(out[own].transpose(0, 1), expected)


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(window=6, soft_cap=1.5)], ids=str)
def test_a_prefix_in_pages_gives_what_computing_it_anew_gives(scoring: Scoring) -> None:
    whole = make_batch([0], new=[21], device=CPU)
    expected = prefill_of(whole, scoring)
    pages = replace(
        whole.pages,
        keys=whole.key[:16].clone()[None],
        values=whole.value[:16].clone()[None],
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        context_lens=torch.tensor([16], dtype=torch.int32),
    )
    rest = Batch(
        whole.query[16:],
        whole.key[16:],
        whole.value[16:],
        torch.tensor([0, 5], dtype=torch.int32),
        pages,
    )
    torch.testing.assert_close(prefill_of(rest, scoring), expected[16:])


def test_decode_is_the_last_row_of_a_prefill() -> None:
    whole = make_batch([0], new=[16], device=CPU)
    scoring = Scoring(window=9, soft_cap=3.0)
    pages = replace(
        whole.pages,
        keys=whole.key[None],
        values=whole.value[None],
        context_lens=torch.tensor([16], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
    )
    out = paged_decode(whole.query[-1:], pages, scoring=scoring)
    torch.testing.assert_close(out, prefill_of(whole, scoring)[-1:])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 1.5e-2), (torch.float8_e4m3fn, 5e-2)])
def test_codes_are_their_numbers_up_to_quantization(dtype: torch.dtype, bound: float) -> None:
    exact = make_batch([60, 3], device=CPU)
    coded = make_batch([60, 3], dtype=dtype, device=CPU)
    expected = paged_decode(exact.query, exact.pages)
    assert 0 < error_of(paged_decode(coded.query, coded.pages), expected.double()) < bound


def test_no_tokens_are_zeros_and_what_is_not_read_may_be_anything() -> None:
    batch = make_batch([0, 1], device=CPU)
    out = paged_decode(batch.query, batch.pages)
    assert not out[0].any()
    torch.testing.assert_close(
        out[1, :4], gathered(batch.pages.values, batch.pages, 1)[0].expand(4, -1)
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"keys": torch.zeros(3, 16, 2, 32)}, "keys must be"),
        ({"values": torch.zeros(3, 16, 1, 64)}, "do not match"),
        ({"keys": torch.zeros(3, 16, 3, 64), "values": torch.zeros(3, 16, 3, 64)}, "share"),
        ({"keys": torch.zeros(3, 16, 2, 64).bfloat16()}, "do not match"),
        ({"key_scales": torch.zeros(3, 16, 2)}, "do not fit queries"),
        ({"context_lens": torch.zeros(2)}, "context_lens must be"),
        ({"block_tables": torch.zeros(3, 2, dtype=torch.int32)}, "block_tables must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_what_does_not_fit_is_refused(change: dict[str, torch.Tensor], problem: str) -> None:
    batch = make_batch([5, 40], device=CPU)
    with pytest.raises(ValueError, match=problem):
        paged_decode(batch.query, replace(batch.pages, **change))


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ({"window": 0}, "window 0 must be 1 or more, or None"),
        ({"window": -4}, "window -4 must be 1 or more, or None"),
        ({"soft_cap": 0.0}, r"soft_cap 0\.0 must be above 0, or None"),
        ({"soft_cap": float("nan")}, "soft_cap nan must be above 0, or None"),
    ],
)
def test_a_window_or_a_cap_that_hides_everything_is_refused(
    scoring: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Scoring(**scoring)


def test_codes_without_scales_or_of_an_odd_width_are_refused() -> None:
    coded = make_batch([5], dtype=torch.int8, device=CPU)
    with pytest.raises(ValueError, match="scales of codes"):
        paged_decode(coded.query, replace(coded.pages, value_scales=None))
    odd = make_batch([5], dtype=torch.int8, dim=33, device=CPU)
    with pytest.raises(ValueError, match="even"):
        paged_decode(odd.query, odd.pages)


def test_an_output_or_new_tokens_that_do_not_fit_are_refused() -> None:
    batch = make_batch([5], new=[3], device=CPU)
    with pytest.raises(ValueError, match="does not fit"):
        paged_decode(batch.query[:1], batch.pages, out=torch.zeros(1, 8, 64).bfloat16())
    with pytest.raises(ValueError, match="does not fit"):
        prefill_of(replace(batch, key=batch.key[:, :1]), Scoring())


@pytest.mark.parametrize(
    ("programs", "context", "splits"),
    [
        (256, 4096, 1),  # 32 sequences of 8 heads fill 264 places
        (8, 262144, 29),
        (32, 32768, 8),
        (320, 4096, 3),  # 2 waves, the second of 56, become 4 of which the last is 168
        (1, 1 << 20, 218),
        (8, 255, 1),
        (8, 1024, 4),
        (10000, 4096, 1),
        (0, 0, 1),
    ],
)
def test_splits_fill_the_gpu_and_no_more(programs: int, context: int, splits: int) -> None:
    assert num_splits(programs=programs, context_max=context, sm_count=132) == splits
    assert splits <= SPLITS_MAX
