"""The adapter does what generate does, where the cache helps and where it cannot."""

import copy
import logging
import os
import threading
from typing import Any

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from respkv.client import Client
from respkv.client.connection import Connection
from respkv.client.requests import Request
from respkv.integrations.huggingface import CacheConfig, KVCacheAdapter, UnsupportedModel
from tests.integrations.huggingface.generation import (
    QUIET,
    assert_equal,
    batch_of,
    both_ways,
    counted,
)
from tests.integrations.huggingface.models import EOS, PAD, prompt, shared_model, tiny_model
from tests.server_process import ServerProcess

IDS = torch.tensor([prompt(50)])


def adapter_of(engine: Client, family: str = "llama", **options: Any) -> KVCacheAdapter:
    config = CacheConfig(cache=engine, **{**QUIET, **options})
    return KVCacheAdapter(shared_model(family), config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_cache": False}, "use_cache is False"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"position_ids": torch.arange(50)[None]}, "position_ids: what tokens mean"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache is False"),  # type: ignore[no-untyped-call]
    ],
)
def test_what_the_cache_cannot_serve_goes_to_the_model(
    options: dict[str, Any], reason: str, engine: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with adapter_of(engine) as adapter, caplog.at_level(logging.INFO):
        assert_equal(adapter, IDS, **options)
        assert_equal(adapter, IDS, **options)
        assert reason in adapter.last.reason
        assert caplog.text.count("generating without the cache") == 1
        assert (adapter.stats().uncached, adapter.stats().calls) == (2, 2)
        assert adapter.pages.stats().matches == 0


def test_padding_behind_a_prompt_goes_to_the_model(
    engine: Client, caplog: pytest.LogCaptureFixture
) -> None:
    mask = torch.ones_like(IDS)
    mask[0, 20:] = 0
    with adapter_of(engine) as adapter:
        assert_equal(adapter, IDS, mask)
        assert "padding stands elsewhere" in adapter.last.reason


def test_without_a_mask_padding_is_found_as_generate_finds_it(engine: Client) -> None:
    ids, mask = batch_of(prompt(30), prompt(44, seed=1))
    with adapter_of(engine) as adapter:
        model: Any = adapter.model
        plain = model.generate(ids, max_new_tokens=5, do_sample=False)
        for _ in range(2):
            assert adapter.generate(ids, max_new_tokens=5, do_sample=False).equal(plain)
            assert adapter.flush(60)
        assert adapter.last.is_full_hit
        assert_equal(adapter, ids, mask)


def test_a_mask_of_another_shape_is_not_guessed_at(engine: Client) -> None:
    wide = torch.ones(1, 60, dtype=torch.long)
    with adapter_of(engine) as adapter:
        assert_equal(adapter, IDS, wide)
        assert "attention_mask is [1, 60]" in adapter.last.reason
        model: Any = adapter.model
        for wrong in (torch.ones(50), torch.ones(2, 50)):
            for generate in (model.generate, adapter.generate):
                with pytest.raises((IndexError, RuntimeError)):
                    generate(IDS, attention_mask=wrong, max_new_tokens=2)
        doubled = 2 * torch.ones_like(IDS)  # each token counts for two positions
        assert_equal(adapter, IDS, doubled)
        assert_equal(adapter, IDS)


def test_arguments_mean_what_they_mean_to_the_model(engine: Client) -> None:
    ids, _ = batch_of(prompt(30, seed=31), prompt(44, seed=32))
    config = GenerationConfig(max_new_tokens=5, do_sample=False)  # type: ignore[no-untyped-call]
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(list(range(2, 99, 2)))])
    named = GenerationConfig(cache_implementation="dynamic", max_new_tokens=5)  # type: ignore[no-untyped-call]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((ids, config, processors), {}),
        ((ids, config), {"pad_token_id": None}),  # padding is text then
        ((ids, named), {}),
        ((ids,), {"cache_implementation": "hybrid", "max_new_tokens": 5}),
        ((ids,), {"eos_token_id": torch.tensor([5, 6, 7]), "max_new_tokens": 5}),
    ]
    with adapter_of(engine) as adapter:
        model: Any = adapter.model
        for given, named_ones in calls:
            plain = model.generate(*given, **named_ones)
            for _ in range(2):
                assert adapter.generate(*given, **named_ones).tolist() == plain.tolist()
                assert adapter.last.reason == ""
                assert adapter.flush(60)
            assert adapter.last.is_full_hit
        too_many: Any = range(12)
        with pytest.raises(TypeError, match="11 arguments without names at most"):
            adapter.generate(*too_many)


def test_what_comes_behind_the_end_of_a_text_is_not_stored(engine: Client) -> None:
    ids, mask = batch_of(prompt(30, seed=2), prompt(41, seed=3))
    with adapter_of(engine, "qwen2") as adapter:
        model: Any = adapter.model
        free = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
        end = int(free[0, 41 + 2])  # the first text ends here, the other goes on
        options = {"eos_token_id": end, "pad_token_id": PAD, "max_new_tokens": 9}
        plain, cached = both_ways(adapter, ids, mask, **options)
        assert cached.tolist() == plain.tolist()
        text = cached[0, 11:].tolist()
        length = text.index(end, 30) + 1
        assert length < len(text)
        assert adapter.pages.match(text).tokens == length


def test_streamers_processors_and_criteria_work_on(engine: Client) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, tokens: Any) -> None:
            self.tokens += tokens.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            scores[:, ::2] = -torch.inf
            return scores

    with adapter_of(engine) as adapter:
        for _ in range(2):
            streamer = Streamer()
            options: dict[str, Any] = {
                "logits_processor": [Forbid()],
                "stopping_criteria": StoppingCriteriaList([EosTokenCriteria(EOS)]),
                "repetition_penalty": 1.3,
                "pad_token_id": PAD,
            }
            plain, cached = both_ways(adapter, IDS, **options)
            assert cached.tolist() == plain.tolist()
            assert all(token % 2 for token in cached[0, 50:].tolist())
            adapter.generate(IDS, streamer=streamer, max_new_tokens=3, do_sample=False)
            assert streamer.tokens[:50] == IDS[0].tolist()
            assert len(streamer.tokens) == 54


def test_scores_and_caches_are_returned_and_can_be_gone_on_with(engine: Client) -> None:
    options: dict[str, Any] = {
        "return_dict_in_generate": True,
        "output_logits": True,
        "do_sample": False,
    }
    with adapter_of(engine) as adapter:
        model: Any = adapter.model
        plain = model.generate(IDS, max_new_tokens=8, **options)
        for _ in range(2):
            for first in (1, 3):  # with one token, nothing is loaded before it is needed
                half = adapter.generate(IDS, max_new_tokens=first, **options)
                for ours, theirs in zip(half.logits, plain.logits, strict=False):
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
                rest = model.generate(
                    half.sequences,
                    past_key_values=half.past_key_values,
                    max_new_tokens=8 - first,
                    **options,
                )
                assert rest.sequences.equal(plain.sequences)
            assert adapter.flush(60)
        assert adapter.last.is_full_hit


def test_a_cache_that_is_returned_can_be_copied(engine: Client) -> None:
    with adapter_of(engine, salt="copied") as adapter:
        model: Any = adapter.model
        for _ in range(2):
            half = adapter.generate(
                IDS, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
            )
            for seed in range(2):
                longer = torch.tensor([prompt(9, seed=seed, like=half.sequences[0].tolist())])
                twin = copy.deepcopy(half.past_key_values)
                plain = model.generate(longer, max_new_tokens=4, do_sample=False)
                rest = model.generate(
                    longer, past_key_values=twin, max_new_tokens=4, do_sample=False
                )
                assert rest.equal(plain)
            assert adapter.flush(60)


def test_images_of_an_earlier_prompt_move_nothing(engine: Client) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    shape: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
        },
    }
    vision = {"embed_dim": 32, "depth": 1, "num_heads": 4, "hidden_size": 32}
    config = Qwen2VLConfig(text_config=shape, vision_config=vision, image_token_id=100)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = Qwen2VLForConditionalGeneration(config)
    model.eval()
    with KVCacheAdapter(model, CacheConfig(cache=engine, **QUIET)) as adapter:
        for ids in (IDS, IDS, torch.tensor([prompt(9, seed=1, like=IDS[0].tolist())])):
            plain = model.generate(ids, max_new_tokens=4, do_sample=False)
            # As if an image had been in the last prompt, and as if there had been two of them.
            model.model.rope_deltas = torch.tensor([[-20], [-30]])
            assert adapter.generate(ids, max_new_tokens=4, do_sample=False).equal(plain)
            assert adapter.flush(60)
        assert adapter.last.reused_tokens == 50


def test_hidden_states_are_those_of_all_tokens(engine: Client) -> None:
    options: dict[str, Any] = {
        "return_dict_in_generate": True,
        "output_hidden_states": True,
        "max_new_tokens": 2,
        "do_sample": False,
    }
    with adapter_of(engine) as adapter:
        assert_equal(adapter, IDS)
        output = adapter.generate(IDS, **options)
        assert "hidden states" in adapter.last.reason
        assert output.hidden_states[0][0].shape == (1, 50, 32)


def test_what_is_configured_is_done(engine: Client) -> None:
    ids = torch.tensor([prompt(50, seed=21)])
    with adapter_of(engine, store=False) as adapter:
        assert_equal(adapter, ids)
        assert_equal(adapter, ids)
        assert adapter.last.stored_tokens == 0
    with adapter_of(engine, store_generated=False, use_logits=False) as adapter:
        _, text = both_ways(adapter, ids)
        assert adapter.pages.match(text[0]).tokens == 50
        assert not adapter.pages.match(ids[0]).has_logits
        assert_equal(adapter, ids)
        assert (adapter.last.reused_tokens, adapter.last.is_full_hit) == (49, False)
    with adapter_of(engine, min_tokens=51) as adapter:
        assert_equal(adapter, ids)
        assert (adapter.last.stored_tokens, adapter.last.reused_tokens) == (50, 0)
    with adapter_of(engine, salt="other", tenant="t", lora="l", lora_path="p") as adapter:
        adapter.generate(ids, session="talk", max_new_tokens=2)
        assert adapter.last.stored_tokens == 0
    with pytest.raises(ValueError, match="min_tokens must be at least 1, not 0"):
        CacheConfig(min_tokens=0)
    with adapter_of(engine, match_timeout_s=7.5) as adapter:
        assert adapter.pages.match_timeout_s == 7.5
    for seconds in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="match_timeout_s must be more than 0"):
            CacheConfig(match_timeout_s=seconds)


def test_a_full_hit_asks_once_for_its_first_token_and_twice_more_for_the_second(
    engine: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([prompt(50, seed=31)])
    with adapter_of(engine) as adapter:
        assert_equal(adapter, ids)
    asked, exchange = list[bytes](), Connection.exchange

    def noted(self: Connection, request: Request, deadline: float) -> Any:
        asked.append(bytes(request.chunks[0]).split(b"\r\n")[2])
        return exchange(self, request, deadline)

    with adapter_of(engine, store=False) as adapter:
        adapter.generate(ids, max_new_tokens=2, do_sample=False)  # declares, finds the memory
        monkeypatch.setattr(Connection, "exchange", noted)
        adapter.generate(ids, max_new_tokens=1, do_sample=False)
        assert adapter.last.is_full_hit
        assert asked == [b"KV.SEQ.MATCH"]
        adapter.generate(ids, max_new_tokens=2, do_sample=False)
        assert adapter.last.is_full_hit
        assert asked[1:] == [b"KV.SEQ.MATCH", b"KV.LEASE", b"KV.RELEASE"]


def test_where_computing_is_quicker_nothing_is_loaded(engine: Client) -> None:
    with adapter_of(engine, never_slower=True) as adapter:
        assert_equal(adapter, IDS)
        for _ in range(40):
            adapter.rates.computed(50, 1e-9)
        assert_equal(adapter, IDS)
        assert (adapter.last.stored_tokens, adapter.last.reused_tokens) == (50, 0)


def test_models_that_keep_something_else_are_refused(engine: Client) -> None:
    from transformers import AutoModel, MambaConfig, MambaForCausalLM, T5Config

    sizes: dict[str, Any] = {"vocab_size": 50, "num_layers": 1, "d_model": 8, "d_kv": 4, "d_ff": 8}
    encoder: Any = AutoModel.from_config(T5Config(num_heads=2, **sizes))  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedModel, match="has an encoder"):
        KVCacheAdapter(encoder, CacheConfig(cache=engine))
    config = MambaConfig(vocab_size=50, hidden_size=8, state_size=4, num_hidden_layers=1)
    with pytest.raises(UnsupportedModel, match="Mamba"):
        KVCacheAdapter(MambaForCausalLM(config), CacheConfig(cache=engine))
    with pytest.raises(TypeError, match="model is a Linear"):
        KVCacheAdapter(torch.nn.Linear(1, 1), CacheConfig(cache=engine))  # type: ignore[arg-type]


def test_the_model_itself_is_left_as_it_is(engine: Client) -> None:
    model: Any = tiny_model("llama")
    before = dict(vars(model))
    with KVCacheAdapter(model, CacheConfig(cache=engine, **QUIET)) as adapter:
        assert_equal(adapter, IDS)
        assert vars(model) == before
        with counted(model) as widths:
            model.generate(IDS, max_new_tokens=2, do_sample=False)
        assert widths == [50, 1]
        assert type(model).__name__ == "LlamaForCausalLM"


def test_threads_share_an_adapter(engine: Client) -> None:
    texts = [torch.tensor([prompt(30 + number, seed=number)]) for number in range(4)]
    wrong: list[int] = []
    with adapter_of(engine) as adapter:
        model: Any = adapter.model
        expected = [model.generate(ids, max_new_tokens=4, do_sample=False) for ids in texts]

        def work(number: int) -> None:
            for _ in range(3):
                ids = texts[number]
                found = adapter.generate(ids, max_new_tokens=4, do_sample=False)
                if not found.equal(expected[number]):
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert adapter.stats().calls == 12


def test_a_forked_child_uses_the_adapter_and_leaves_its_parents_stores_alone(
    server: ServerProcess,
) -> None:
    ids, other = torch.tensor([prompt(40, seed=41)]), torch.tensor([prompt(40, seed=42)])
    config = CacheConfig(cache=server.url, namespace="forked", **QUIET)
    is_held, go_on = threading.Event(), threading.Event()

    def gather(first: int, stop: int) -> Any:
        is_held.set()
        go_on.wait(120)
        kv = adapter.model_kv
        return [(torch.zeros(stop - first, kv.heads, kv.dim),) * 2] * len(kv.layers)

    with KVCacheAdapter(shared_model("llama"), config) as adapter:
        assert_equal(adapter, ids)
        assert adapter.pages.store(prompt(40, seed=43), gather)
        assert is_held.wait(60)  # the thread of the stores is in the middle of one
        child = os.fork()
        if child == 0:
            found = []
            for each in (ids, other, other):
                adapter.generate(each, max_new_tokens=2, do_sample=False)
                found.append(adapter.flush(60) and adapter.last.is_full_hit)
            os._exit(found != [True, False, True])
        assert os.waitpid(child, 0)[1] == 0
        go_on.set()
        assert adapter.flush(60)
        assert adapter.pages.match(prompt(40, seed=43)).tokens == 40
        assert adapter.pages.match(other[0]).tokens == 40
        assert_equal(adapter, other)
        assert adapter.pages.stats().errors == 0
