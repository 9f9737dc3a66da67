"""Calls that would get, or leave, keys and values of something else go to the model as they are."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from respkv.client import Client
from respkv.integrations.huggingface import CacheConfig, KVCacheAdapter
from respkv.integrations.huggingface.settings import Settings
from tests.integrations.huggingface.generation import QUIET, assert_equal
from tests.integrations.huggingface.models import length_model, prompt, shared_model, tiny_model

IDS = torch.tensor([prompt(50)])


def why_not(model: Any, **arguments: Any) -> str:
    return Settings(model, None, arguments).why_not(IDS)


def test_what_changes_prompts_or_precision_is_not_served() -> None:
    model: Any = tiny_model("llama")
    assert why_not(model) == ""
    assert "token_healing" in why_not(model, token_healing=True)
    assert "attentions" in why_not(model, output_attentions=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in why_not(model)
    model.train()
    assert "training mode" in why_not(model)


def test_an_argument_counts_over_the_configs_even_if_it_is_none() -> None:
    model: Any = tiny_model("llama")
    model.generation_config.eos_token_id = [3, 4]
    given = GenerationConfig(eos_token_id=5, num_beams=2)  # type: ignore[no-untyped-call]
    assert Settings(model, None, {}).end_tokens == [3, 4]
    assert Settings(model, given, {}).end_tokens == [5]
    assert Settings(model, given, {"eos_token_id": torch.tensor([6, 7])}).end_tokens == [6, 7]
    assert Settings(model, given, {"eos_token_id": None}).end_tokens == []
    assert Settings(model, given, {}).is_beam_search
    assert Settings(model, given, {"num_return_sequences": 3}).repeats == 3
    assert Settings(model, None, {"pad_token_id": None}).mask(torch.tensor([[0, 0, 5]])).all()
    assert Settings(model, None, {}).mask(torch.tensor([[0, 0, 5]])).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"cache_implementation": "dynamic"}, ""),
        ({"cache_implementation": "hybrid"}, ""),
        ({"cache_implementation": "offloaded"}, "'offloaded'"),
        ({"use_cache": None}, "use_cache is None"),
        ({"use_mtp": True}, "hidden states"),
        ({"speculation_type": "dflash"}, "hidden states"),
        ({"past_key_values": object()}, "a cache of its own"),
        ({"attention_mask": torch.ones(1, 60)}, "attention_mask is [1, 60], and the prompts are"),
        ({"attention_mask": torch.ones(1, 50)}, ""),
        ({"foo": None}, ""),
        ({"foo": 1, "bar": 2}, "bar, foo: what tokens mean"),
    ],
)
def test_each_argument_has_its_reason(arguments: dict[str, Any], reason: str) -> None:
    found = why_not(shared_model("llama"), **arguments)
    assert reason in found
    assert bool(found) == bool(reason)


def test_only_a_batch_of_tokens_is_served() -> None:
    wrong: list[Any] = [None, [[3, 4]], IDS[0], IDS[:, :0], IDS.float()]
    for ids in wrong:
        found = Settings(shared_model("llama"), None, {}).why_not(ids)
        assert found == "the input is no batch of tokens"


def test_whoever_drafts_tokens_wants_more_than_logits() -> None:
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        assert not Settings(shared_model("llama"), None, {name: 1}).may_skip_forward
    assert Settings(shared_model("llama"), None, {}).may_skip_forward


def test_tokens_to_come_are_counted() -> None:
    settings = Settings(shared_model("llama"), None, {"max_new_tokens": 9000})
    assert (settings.new_tokens(50, 64), settings.room(50, 64)) == (9000, 4096)
    settings = Settings(shared_model("llama"), None, {"max_length": 60})
    assert (settings.new_tokens(50, 64), settings.new_tokens(70, 64)) == (10, 1)


def test_what_training_computes_is_nobodys(engine: Client) -> None:
    model: Any = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    with KVCacheAdapter(model, CacheConfig(cache=engine, **QUIET)) as adapter:
        model.train()
        adapter.generate(IDS, max_new_tokens=2)
        assert adapter.flush(60)
        model.eval()
        assert_equal(adapter, IDS)
        assert adapter.last.stored_tokens == 0


def test_other_weights_get_nothing_of_the_old_ones(engine: Client) -> None:
    model: Any = tiny_model("llama", seed=3)
    with KVCacheAdapter(model, CacheConfig(cache=engine, **QUIET)) as adapter:
        assert_equal(adapter, IDS)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.3)
        assert_equal(adapter, IDS)
        assert "weights have changed" in adapter.last.reason


def test_a_long_text_gets_no_keys_of_a_short_one(engine: Client) -> None:
    with KVCacheAdapter(length_model(), CacheConfig(cache=engine, **QUIET)) as adapter:
        short = prompt(50, seed=8)
        assert_equal(adapter, torch.tensor([short]))
        assert_equal(adapter, torch.tensor([short]))
        assert adapter.last.is_full_hit
        long = torch.tensor([prompt(40, seed=9, like=short)])
        for _ in range(2):
            assert_equal(adapter, long)
            assert "texts of 64 tokens and more" in adapter.last.reason
