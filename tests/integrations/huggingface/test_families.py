"""Tokens are those of the uncached model, for each family and each way of generating."""

from collections.abc import Iterator

import pytest
import torch

from respkv.integrations.huggingface import CacheConfig, KVCacheAdapter
from tests.integrations.huggingface.generation import (
    QUIET,
    assert_equal,
    batch_of,
    both_ways,
    counted,
)
from tests.integrations.huggingface.models import (
    FAMILIES,
    OTHERS,
    prompt,
    shared_model,
    tiny_model,
)
from tests.server_process import ServerProcess

CONTEXT = prompt(60)


@pytest.fixture(scope="module")
def socket_server() -> Iterator[ServerProcess]:
    """A server without shared memory, so that layers come over a socket."""
    running = ServerProcess(maxmemory="32mb")
    yield running
    running.stop()


@pytest.fixture(params=FAMILIES)
def adapter(
    request: pytest.FixtureRequest, server: ServerProcess, socket_server: ServerProcess
) -> Iterator[KVCacheAdapter]:
    torch.set_num_threads(1)
    # Every other family over a socket: both ways of loading meet windows and single heads.
    is_shared = list(FAMILIES).index(request.param) % 2 == 0
    url = (server if is_shared else socket_server).url
    with KVCacheAdapter(shared_model(request.param), CacheConfig(cache=url, **QUIET)) as made:
        made.pages.clear()
        yield made


def test_prefixes_of_prompts_are_reused_to_the_token(adapter: KVCacheAdapter) -> None:
    assert_equal(adapter, torch.tensor([CONTEXT]))
    assert adapter.last.reused_tokens == 0
    assert_equal(adapter, torch.tensor([prompt(9, seed=1, like=CONTEXT)]))
    assert adapter.last.reused_tokens == 60
    assert_equal(adapter, torch.tensor([prompt(20, seed=2, like=CONTEXT[:37])]))
    assert adapter.last.reused_tokens == 37
    assert_equal(adapter, torch.tensor([CONTEXT[:50]]))
    assert adapter.last.reused_tokens == 49  # one is left, to make logits of


def test_the_same_prompt_again_begins_without_a_forward_pass(adapter: KVCacheAdapter) -> None:
    ids = torch.tensor([prompt(53, seed=3)])
    assert_equal(adapter, ids)
    with counted(adapter.model) as widths:
        adapter.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
        assert widths == []
    assert_equal(adapter, ids)
    assert adapter.last.is_full_hit
    assert_equal(adapter, ids, do_sample=True, top_k=20, num_return_sequences=2)
    assert adapter.last.is_full_hit


def test_batches_with_different_prefixes_are_reused_row_by_row(adapter: KVCacheAdapter) -> None:
    assert_equal(adapter, torch.tensor([CONTEXT]))
    batch = batch_of(CONTEXT, CONTEXT[:18], prompt(45, seed=4), prompt(7, seed=5, like=CONTEXT))
    assert_equal(adapter, *batch)
    assert adapter.last.reused_tokens >= 60 + 17 + 60 - 3 * 16
    assert_equal(adapter, *batch)
    assert adapter.last.is_full_hit
    assert_equal(adapter, *batch, num_beams=2)


def test_a_conversation_goes_on_from_what_was_generated(adapter: KVCacheAdapter) -> None:
    text, stored = prompt(30, seed=6), 0
    for turn in range(3):
        plain, cached = both_ways(adapter, torch.tensor([text]))
        assert cached.tolist() == plain.tolist()
        assert adapter.last.reused_tokens == stored
        stored = len(cached[0]) - 1  # the last token that was generated was not fed to the model
        text = prompt(5, seed=turn, like=cached[0].tolist())


def test_beams_and_assisted_decoding_start_from_the_cache(adapter: KVCacheAdapter) -> None:
    ids = torch.tensor([prompt(40, seed=8)])
    assert_equal(adapter, ids, num_beams=3, num_return_sequences=2)
    assert_equal(adapter, ids, num_beams=3)
    assert adapter.last.is_full_hit
    assert_equal(adapter, ids, prompt_lookup_num_tokens=3)
    assert adapter.last.reused_tokens == 39
    assert_equal(adapter, ids, prefill_chunk_size=8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_another_model_may_assist(family: str, server: ServerProcess) -> None:
    config = CacheConfig(cache=server.url, **QUIET)
    ids = torch.tensor([prompt(43, seed=9)])
    with KVCacheAdapter(shared_model(family), config) as adapter:
        for expected in (0, 42):
            assert_equal(adapter, ids, assistant_model=tiny_model(family, seed=1))
            assert adapter.last.reused_tokens == expected
        adapter.pages.clear()


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_give_equal_tokens_too(family: str, server: ServerProcess) -> None:
    config = CacheConfig(cache=server.url, **QUIET)
    with KVCacheAdapter(shared_model(family), config) as adapter:
        adapter.pages.clear()
        assert_equal(adapter, torch.tensor([CONTEXT]))
        assert_equal(adapter, torch.tensor([prompt(9, seed=1, like=CONTEXT)]))
        assert adapter.last.reused_tokens == 60
        batch = batch_of(CONTEXT, CONTEXT[:18], prompt(45, seed=4), prompt(7, seed=5, like=CONTEXT))
        assert_equal(adapter, *batch)
        assert_equal(adapter, *batch, num_beams=2)
        counts_padding = family == "roformer"  # its positions are columns, padding among them
        assert adapter.last.is_full_hit != counts_padding
        assert ("behind padding" in adapter.last.reason) == counts_padding
        assert_equal(adapter, torch.tensor([CONTEXT, prompt(60, seed=6)]))
        assert adapter.last.reused_tokens >= 59
