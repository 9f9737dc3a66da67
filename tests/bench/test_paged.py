"""The benchmark of the paged cache, tiny: both caches make the same tokens, and every row is measured."""

from collections.abc import Iterator

import pytest
import torch

from bench.paged import QUICK, attention, decodes, with_dynamic_cache, with_paged_cache


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_both_caches_make_the_same_tokens_and_are_counted() -> None:
    peer, ours = with_dynamic_cache(QUICK), with_paged_cache(QUICK)
    assert peer.tokens == ours.tokens
    token = 2 * QUICK.layers * QUICK.heads * QUICK.dim * 4
    assert peer.counted == 2 * (40 + 3 + 3 - 1) * token
    # Two blocks of what both share, the third one three times, as 8 tokens of the prefix are in it.
    assert ours.counted == 5 * 16 * token
    assert peer.resident >= 0
    assert ours.resident >= 0


def test_rates_and_attention_are_measured() -> None:
    said: list[str] = []
    rows = [*decodes(QUICK, said.append), *attention(QUICK, said.append)]
    assert [row.row for row in rows] == [3, 4]
    assert all(row.ratio > 0 for row in rows)
    assert said[0] == "row 3: 2 decode of 20 tokens each, round 1 of 1"
