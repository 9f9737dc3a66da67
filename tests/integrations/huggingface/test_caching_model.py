"""A long prompt behind a loaded prefix is computed in pieces, and comes to the same."""

import itertools

import pytest
import torch

from respkv.client import Client
from respkv.integrations.huggingface import CacheConfig, KVCacheAdapter, caching_model
from tests.integrations.huggingface.generation import (
    NEW_TOKENS,
    QUIET,
    assert_equal,
    batch_of,
    both_ways,
    counted,
)
from tests.integrations.huggingface.models import FAMILIES, prompt, shared_model

LONG = prompt(90)
_numbers = itertools.count()


def alone(engine: Client) -> CacheConfig:
    """Return a config that finds nothing of other tests."""
    return CacheConfig(cache=engine, salt=f"pieces {next(_numbers)}", **QUIET)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching_model, "PIECE_TOKENS", 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_give_the_tokens_of_the_whole(family: str, engine: Client) -> None:
    model = shared_model(family)
    with KVCacheAdapter(model, alone(engine)) as adapter:
        assert_equal(adapter, torch.tensor([LONG[:40]]))
        with counted(model) as widths:
            plain, cached = both_ways(adapter, torch.tensor([LONG]))
        assert cached.tolist() == plain.tolist()
        assert adapter.last.reused_tokens == 40
        assert widths[:NEW_TOKENS] == [90, *[1] * (NEW_TOKENS - 1)]
        assert widths[NEW_TOKENS : NEW_TOKENS + 4] == [16, 16, 16, 2]


def test_a_padded_batch_is_cut_too(engine: Client) -> None:
    ids, mask = batch_of(LONG, LONG[:71])
    with KVCacheAdapter(shared_model("llama"), alone(engine)) as adapter:
        assert_equal(adapter, torch.tensor([LONG[:40]]))
        assert_equal(adapter, ids, mask)
        assert adapter.last.reused_tokens == 80


def test_without_a_prefix_a_prompt_is_computed_at_once(engine: Client) -> None:
    model = shared_model("llama")
    with KVCacheAdapter(model, alone(engine)) as adapter:
        with counted(model) as widths:
            adapter.generate(torch.tensor([LONG]), max_new_tokens=1, do_sample=False)
        assert widths == [90]


def test_who_wants_all_logits_gets_them_from_one_pass(engine: Client) -> None:
    """Prompt lookup looks at the logits of several tokens of a pass."""
    with KVCacheAdapter(shared_model("llama"), alone(engine)) as adapter:
        assert_equal(adapter, torch.tensor([LONG[:40]]))
        assert_equal(adapter, torch.tensor([LONG]), prompt_lookup_num_tokens=3)
