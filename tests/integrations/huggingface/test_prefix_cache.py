"""A cache for those who call the model themselves."""

import copy
from typing import Any

import pytest
import torch

from respkv.client import Client
from respkv.integrations.huggingface import PromptPages, RespKVCache
from respkv.integrations.huggingface.prefix_cache import as_rows
from tests.integrations.huggingface.models import length_model, prompt, shared_model, tiny_model

TEXT = prompt(50)


def generate(model: Any, tokens: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([tokens])
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    found: list[int] = made[0].tolist()
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_generate_with_it_gives_the_same_tokens(family: str, engine: Client) -> None:
    model = shared_model(family)
    with PromptPages(engine, model=model, page_tokens=16) as pages:
        expected = generate(model, TEXT)
        for loaded in (0, 49):
            with RespKVCache(pages, TEXT) as cache:
                assert cache.loaded_tokens == loaded
                assert generate(model, TEXT, past_key_values=cache) == expected
            assert pages.flush(60)
        # The whole conversation, once it is known.
        longer = prompt(9, seed=1, like=expected)
        cache = RespKVCache(pages, expected[:-1])
        generate(model, expected[:-1], past_key_values=cache, max_new_tokens=1)
        assert cache.save()
        assert pages.flush(60)
        cache = RespKVCache(pages, longer)
        assert cache.loaded_tokens == len(expected) - 1
        assert generate(model, longer, past_key_values=cache) == generate(model, longer)
        del cache
        assert pages.flush(60)
        assert pages.match(longer).tokens == len(longer)  # stored when it was dropped
        assert pages.stats().errors == 0


def test_the_model_may_be_called_step_by_step(engine: Client) -> None:
    model: Any = shared_model("qwen2")
    with PromptPages(engine, model=model, page_tokens=16) as pages:
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([TEXT])).logits[0]
            for start in (0, 49):
                with RespKVCache(pages, TEXT, room=1) as cache:
                    assert cache.get_seq_length() == start
                    rest = torch.tensor([TEXT[start:]])
                    found = model(input_ids=rest, past_key_values=cache).logits[0]
                    torch.testing.assert_close(found, whole[start:])
                assert pages.flush(60)
            limited = RespKVCache(pages, TEXT, limit=20, store=False)
            assert (limited.loaded_tokens, limited.get_seq_length()) == (20, 20)


def test_what_is_stored_is_not_what_was_written_over_it(engine: Client) -> None:
    model: Any = shared_model("llama")
    other = prompt(20, seed=3)
    with PromptPages(engine, model=model, page_tokens=16, namespace="over") as pages:
        cache = RespKVCache(pages, TEXT)
        with torch.no_grad():
            model(input_ids=torch.tensor([TEXT]), past_key_values=cache)
            assert cache.save()
            cache.crop(-20)
            model(input_ids=torch.tensor([other]), past_key_values=cache)
        assert pages.flush(60)
        again = RespKVCache(pages, TEXT)
        assert again.loaded_tokens == 49
        assert generate(model, TEXT, past_key_values=again) == generate(model, TEXT)


def test_assisted_decoding_without_the_adapter_is_right_if_not_fast(engine: Client) -> None:
    model = shared_model("llama")
    with PromptPages(engine, model=model, page_tokens=16, namespace="assisted") as pages:
        expected = generate(model, TEXT)
        with RespKVCache(pages, TEXT) as cache:
            generate(model, TEXT, past_key_values=cache)
        assert pages.flush(60)
        cache = RespKVCache(pages, TEXT)
        assert cache.loaded_tokens == 49
        found = generate(model, TEXT, past_key_values=cache, prompt_lookup_num_tokens=3)
        assert found == expected
        assert cache.loaded_tokens == 0


def test_logits_are_not_stored_behind_a_token_that_was_not_computed(engine: Client) -> None:
    model: Any = shared_model("llama")
    with PromptPages(engine, model=model, page_tokens=16, namespace="behind") as pages:
        cache = RespKVCache(pages, TEXT)
        logits = model(input_ids=torch.tensor([TEXT]), past_key_values=cache).logits[0, -1]
        assert cache.save([*TEXT, 9], logits=logits)
        assert pages.flush(60)
        match = pages.match([*TEXT, 9])
        assert (match.tokens, pages.match(TEXT).has_logits) == (50, False)


def test_texts_with_other_keys_do_not_mix(engine: Client) -> None:
    model: Any = length_model()
    with PromptPages(engine, model=model, page_tokens=16) as pages:
        long = prompt(70)
        with RespKVCache(pages, long[:50]) as cache:
            model(input_ids=torch.tensor([long[:50]]), past_key_values=cache)
        assert pages.flush(60)
        assert RespKVCache(pages, long[:60], store=False).loaded_tokens == 50
        with RespKVCache(pages, long) as cache:
            assert cache.loaded_tokens == 0
            model(input_ids=torch.tensor([long]), past_key_values=cache)
            assert not cache.save()
        assert pages.flush(60)
        assert pages.match(long).tokens == 50


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_copy_goes_its_own_way(family: str, engine: Client) -> None:
    model: Any = shared_model(family)
    with PromptPages(engine, model=model, page_tokens=16, namespace=f"copy-{family}") as pages:
        with RespKVCache(pages, TEXT) as cache:
            model(input_ids=torch.tensor([TEXT]), past_key_values=cache)
        assert pages.flush(60)
        cache = RespKVCache(pages, TEXT)
        twins = [copy.deepcopy(cache), copy.deepcopy(cache)]
        for number in range(2):
            longer = prompt(9, seed=number, like=TEXT)
            assert generate(model, longer, past_key_values=twins[number]) == generate(model, longer)
        assert (cache.get_seq_length(), twins[0].get_seq_length()) == (49, 64)
        assert generate(model, TEXT, past_key_values=cache) == generate(model, TEXT)
        stores = pages.stats().stores
        del twins
        assert pages.flush(60)
        assert pages.stats().stores == stores, "copies store when they are told to"


def test_layers_are_gone_through_as_those_of_a_dynamic_cache(engine: Client) -> None:
    model: Any = shared_model("gemma3")
    plain = model(input_ids=torch.tensor([TEXT]), use_cache=True).past_key_values
    with PromptPages(engine, model=model, page_tokens=16, namespace="layers") as pages:
        cache = RespKVCache(pages, TEXT, store=False)
        model(input_ids=torch.tensor([TEXT]), past_key_values=cache)
        for ours, theirs in zip(cache, plain, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other)


def test_what_the_weights_do_not_say_is_not_stored(engine: Client) -> None:
    model: Any = tiny_model("gpt2", seed=7, resid_pdrop=0.5)
    ids = torch.tensor([TEXT])
    with PromptPages(engine, model=model, page_tokens=16) as pages:
        model.train()
        with RespKVCache(pages, TEXT) as cache:
            model(input_ids=ids, past_key_values=cache)
        model.eval()
        with RespKVCache(pages, TEXT) as cache, torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, past_key_values=cache)
        bare = PromptPages(engine, geometry=pages.geometry, namespace="unsaid")
        for where, given in ((bare, model), (pages, None)):
            cache = RespKVCache(where, TEXT, model=given)
            model(input_ids=ids, past_key_values=cache)
            with torch.no_grad():
                model.transformer.wte.weight.mul_(1.5)
            assert not cache.save()
            assert where.flush(60)
            assert where.match(TEXT).tokens == 0
        bare.close()


def test_a_cache_needs_a_prompt_and_a_model(engine: Client) -> None:
    model = shared_model("llama")
    with PromptPages(engine, model=model, page_tokens=16) as pages:
        with pytest.raises(ValueError, match="at least 1 token"):
            RespKVCache(pages, [])
        shape = pages.geometry
    with PromptPages(engine, geometry=shape, namespace="bare") as pages:
        with pytest.raises(TypeError, match="made without a model"):
            RespKVCache(pages, TEXT)
        assert RespKVCache(pages, TEXT, model=tiny_model("llama")).loaded_tokens == 0


def test_padding_has_to_stand_in_front() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 3]])
    rows = as_rows(ids, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    assert rows is not None
    assert [(row.padding, row.num_tokens) for row in rows] == [(2, 2), (0, 4)]
    assert as_rows(ids, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])) is None
    assert as_rows(ids, torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]])) is None
    assert as_rows(ids, torch.zeros_like(ids)) is None
    for wrong in (torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]]), torch.full((2, 4), 0.5)):
        assert as_rows(ids, wrong) is None
    assert as_rows(ids, torch.ones(2, 4)) is not None
