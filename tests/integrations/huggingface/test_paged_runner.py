"""Batches over paged blocks and respkv: tokens equal those of plain ``generate``, whatever is shared."""

import subprocess
import sys
from collections.abc import Iterator
from functools import cache as remembered
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from respkv.batching.model_loop import Limits, ModelLoop
from respkv.batching.request import Generation, GenerationFailed, GenerationRequest, Sampling
from respkv.batching.runner import Admission
from respkv.batching.sequence import Sequence
from respkv.client import Client
from respkv.integrations.huggingface.model_kv import UnsupportedModel
from respkv.integrations.huggingface.paged_runner import PagedRunner
from respkv.integrations.huggingface.prompt_pages import PromptPages
from tests.conftest import StartServer
from tests.integrations.huggingface.models import FAMILIES, prompt, tiny_model

NEW = 8
# Longer than the window of sliding layers, shorter than a block, and sharing what they begin with.
PROMPTS = [prompt(50, seed=1), prompt(5, seed=2), prompt(33, seed=3), prompt(64, seed=4)]
PROMPTS += [prompt(7, seed=5, like=PROMPTS[0]), prompt(20, seed=6, like=PROMPTS[3][:40])]
DOCUMENT = prompt(200, seed=7)
POISON = 1  # in no prompt, and in no answer


@remembered
def model_of(family: str) -> PreTrainedModel:
    """The models of this module: their attention is replaced while a runner has them."""
    return tiny_model(family)


def runner_of(
    model: PreTrainedModel, pages: PromptPages | None, num_blocks: int = 500, **sizes: int
) -> PagedRunner:
    """A runner that loads whatever there is: computing such a model may well be quicker."""
    return PagedRunner(model, pages, num_blocks=num_blocks, never_slower=False, **sizes)


@remembered
def plain_model_of(family: str) -> PreTrainedModel:
    """Another one, with attention of its own."""
    return tiny_model(family)


@remembered
def greedy(family: str, tokens: tuple[int, ...], count: int = NEW) -> list[int]:
    """Return what plain ``generate`` says, without any of this."""
    return generated(plain_model_of(family), list(tokens), max_new_tokens=count, do_sample=False)


def generated(model: Any, tokens: list[int], **wishes: Any) -> list[int]:
    ids = torch.tensor([tokens])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), **wishes)
    new: list[int] = answer[0, len(tokens) :].tolist()
    return new


@pytest.fixture
def pages(engine: Client) -> Iterator[PromptPages]:
    """An empty namespace for the llama."""
    engine.command("FLUSHALL")
    with PromptPages(engine, model=model_of("llama"), page_tokens=16) as running:
        yield running


def ask(loop: ModelLoop, *prompts: list[int], count: int = NEW, **wishes: bool) -> list[Generation]:
    tickets = [loop.submit(GenerationRequest(each, count, **wishes)) for each in prompts]  # type: ignore[arg-type]
    return [each.result(60) for each in tickets]


def check(got: list[Generation], *prompts: list[int], family: str = "llama") -> None:
    for each, tokens in zip(got, prompts, strict=True):
        assert list(each.tokens) == greedy(family, tuple(tokens), len(each.tokens)), len(tokens)
        assert each.finish_reason == "length"


def saved(got: list[Generation]) -> list[int]:
    return [each.timings.prefix_tokens_saved for each in got]


def computed(loop: ModelLoop) -> int:
    return loop.stats().prompt_tokens_computed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_generate_one_by_one(family: str, engine: Client) -> None:
    engine.command("FLUSHALL")
    model = model_of(family)
    with PromptPages(engine, model=model, page_tokens=16) as pages:
        for restart in range(2):
            with ModelLoop(runner_of(model, pages), limits=Limits(step_tokens_max=48)) as loop:
                got = ask(loop, *PROMPTS)
                plain = ask(loop, PROMPTS[0], use_cache=False)
                again = ask(loop, *PROMPTS)
            check(got + plain + again, *PROMPTS, PROMPTS[0], *PROMPTS, family=family)
            assert saved(again) == [len(each) for each in PROMPTS]
            if restart:
                assert saved(got) == saved(again)


def test_the_same_prompt_again_has_its_first_token_without_a_forward_pass(
    pages: PromptPages,
) -> None:
    model, calls = model_of("llama"), []
    counting = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with ModelLoop(runner_of(model, pages)) as loop:
        ask(loop, DOCUMENT)
        calls.clear()
        check(ask(loop, DOCUMENT, count=1), DOCUMENT)
    assert calls == []
    runner = runner_of(model, pages)  # as another process would
    calls.clear()
    with ModelLoop(runner) as loop:
        got = ask(loop, DOCUMENT, count=1)
        check(got, DOCUMENT)
        assert (saved(got), got[0].timings.local_tokens) == ([200], 0)
    assert calls == []
    counting.remove()


@pytest.mark.parametrize("with_pages", [False, True])
def test_in_little_memory_some_have_to_leave_and_still_get_their_tokens(
    pages: PromptPages, with_pages: bool
) -> None:
    runner = runner_of(model_of("llama"), pages if with_pages else None, num_blocks=14)
    with ModelLoop(runner, limits=Limits(step_tokens_max=40)) as loop:
        for _ in range(2):
            check(ask(loop, *PROMPTS, count=40), *PROMPTS)
        assert loop.stats().preemptions > 0
        loop.clear()
        assert runner.cache.num_free_blocks == 14
        runner.cache.blocks.check()


def test_eviction_everywhere_changes_no_token(pages: PromptPages, engine: Client) -> None:
    with ModelLoop(runner_of(model_of("llama"), pages, num_blocks=20)) as loop:
        for _ in range(3):
            check(ask(loop, *PROMPTS), *PROMPTS)
            pages.flush()
            scanned: Any = engine.command("SCAN", 0, "COUNT", 10_000)
            for key in scanned[1][::2]:
                engine.delete(key)
            loop.clear()


def test_prompts_that_begin_alike_are_computed_once(pages: PromptPages) -> None:
    questions = [prompt(5, seed=seed, like=DOCUMENT) for seed in range(6)]
    with ModelLoop(runner_of(model_of("llama"), pages), limits=Limits(step_tokens_max=32)) as loop:
        check(ask(loop, *questions), *questions)
        assert computed(loop) <= 205 + 5 * (5 + 16)
        assert loop.stats().local_tokens_saved >= 5 * 192


def test_one_that_waits_for_another_goes_on_when_that_is_cancelled(pages: PromptPages) -> None:
    limits = Limits(sequences_max=4, step_tokens_max=4)
    with ModelLoop(runner_of(model_of("llama"), pages), limits=limits) as loop:
        first, second = (loop.submit(GenerationRequest(DOCUMENT, NEW)) for _ in range(2))
        first.cancel()
        check([second.result(60)], DOCUMENT)


def test_long_loads_are_done_beside_the_steps_of_others(pages: PromptPages) -> None:
    runner = runner_of(model_of("llama"), pages, num_blocks=60, aside_bytes=0)
    with ModelLoop(runner) as loop:
        ask(loop, *PROMPTS)
        for _ in range(3):
            loop.clear()
            decoding = loop.submit(GenerationRequest(DOCUMENT, 100))
            next(decoding)
            tickets = [loop.submit(GenerationRequest(each, NEW)) for each in PROMPTS * 2]
            for each in tickets[::3]:
                each.cancel()
            kept = [each for index, each in enumerate(tickets) if index % 3]
            got = [each.result(60) for each in kept]
            check(got, *(each for index, each in enumerate(PROMPTS * 2) if index % 3))
            assert min(saved(got)) > 0
            check([decoding.result(60)], DOCUMENT)
        stats = loop.stats()
        assert stats.load_errors == 0
        loop.clear()
        assert runner.cache.num_free_blocks == 60
        runner.cache.blocks.check()


def test_a_program_that_ends_without_closing_the_loop_ends_well() -> None:
    program = """
from tests.integrations.huggingface.models import prompt, tiny_model
from respkv.batching.model_loop import ModelLoop
from respkv.batching.request import GenerationRequest
from respkv.integrations.huggingface.paged_runner import PagedRunner
import atexit
loop = ModelLoop(PagedRunner(tiny_model("llama"), num_blocks=200))
tickets = [loop.submit(GenerationRequest(prompt(40, seed=n), 1000)) for n in range(4)]
atexit.register(lambda: print(next(tickets[0]).index))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize("local", [False, True])
def test_prompts_of_other_tenants_share_nothing(pages: PromptPages, local: bool) -> None:
    model = model_of("llama")
    runner = runner_of(model, None if local else pages)
    chains = [{}, {"salt": "a"}, {"salt": "b"}, {"tenant": "a"}, {"salt": b"a", "tenant": "a"}]
    with ModelLoop(runner) as loop:
        for turn in range(2):
            for chain in chains:
                if not local:
                    loop.clear()
                got = loop.submit(GenerationRequest(DOCUMENT, NEW, **chain)).result(60)  # type: ignore[arg-type]
                check([got], DOCUMENT)
                assert got.timings.prefix_tokens_saved == turn * 200
                pages.flush()


def test_who_wants_no_prefix_cache_leaves_nothing_and_takes_nothing(pages: PromptPages) -> None:
    with ModelLoop(runner_of(model_of("llama"), pages)) as loop:
        for wishes in ({"use_prefix_cache": False}, {"use_cache": False}):
            assert saved(ask(loop, DOCUMENT, **wishes)) == [0]
        assert pages.stats().stores == pages.stats().matches == 0
        check(ask(loop, DOCUMENT), DOCUMENT)
        assert saved(ask(loop, DOCUMENT, use_prefix_cache=False)) == [0]
        stats = loop.stats()
    assert (stats.prefix_hits, stats.prefix_misses) == (0, 1)


def test_a_conversation_goes_on_from_its_last_token(pages: PromptPages) -> None:
    model, turns = model_of("llama"), DOCUMENT[:50]
    for _ in range(3):
        with ModelLoop(runner_of(model, pages)) as loop:
            got = ask(loop, turns)
        check(got, turns)
        # The last token has been chosen and never been computed.
        assert saved(got) in ([0], [len(turns) - 10 - 1])
        turns = [*turns, *got[0].tokens, *prompt(10, seed=len(turns))]


def test_sampled_tokens_equal_generate_with_the_same_seed(pages: PromptPages) -> None:
    model = model_of("llama")
    torch.manual_seed(5)
    wishes = {"temperature": 0.9, "top_k": 30, "top_p": 0.9}
    want = generated(model, DOCUMENT, max_new_tokens=NEW, do_sample=True, **wishes)
    wish = Sampling(0.9, 30, 0.9, seed=5)
    with ModelLoop(runner_of(model, pages)) as loop:
        for _ in range(2):
            ask(loop, *PROMPTS)
            got = loop.submit(GenerationRequest(DOCUMENT, NEW, wish)).result(60)
            assert list(got.tokens) == want


def test_a_server_that_goes_away_costs_no_request(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(maxmemory="16mb", unixsocket=str(tmp_path / "s"))
    with PromptPages(f"unix://{tmp_path / 's'}", model=model_of("llama"), page_tokens=16) as pages:
        with ModelLoop(runner_of(model_of("llama"), pages)) as loop:
            check(ask(loop, *PROMPTS), *PROMPTS)
            server.stop()
            loop.clear()
            check(ask(loop, *PROMPTS), *PROMPTS)


def test_what_cannot_be_told_as_numbers_is_kept_from_everyone(pages: PromptPages) -> None:
    model = tiny_model("llama", seed=1)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        weight[POISON] = float("nan")
    runner = runner_of(model, pages)
    with ModelLoop(runner) as loop:
        good = loop.submit(GenerationRequest(DOCUMENT, NEW))
        bad = loop.submit(GenerationRequest([*DOCUMENT[:40], POISON, *DOCUMENT[:40]], NEW))
        with pytest.raises(GenerationFailed, match="no numbers"):
            bad.result(60)
        assert good.result(60).finish_reason == "length"
        loop.clear()
        assert runner.cache.num_free_blocks == runner.cache.config.num_blocks
    assert pages.match([*DOCUMENT[:40], POISON, *DOCUMENT[:40]]).tokens == 40


def test_of_a_model_that_crashed_nothing_is_stored(pages: PromptPages) -> None:
    model = tiny_model("llama")
    loop = ModelLoop(runner_of(model, pages))
    ask(loop, PROMPTS[0])
    ticket = loop.submit(GenerationRequest(DOCUMENT, 1000))
    next(ticket)

    def break_down(*_: object) -> None:
        raise RuntimeError("out of order")

    model.register_forward_pre_hook(break_down)
    with pytest.raises(GenerationFailed, match="out of order"):
        ticket.result(60)
    loop.close()
    pages.flush()
    assert pages.match(PROMPTS[0]).tokens == len(PROMPTS[0])
    assert pages.match([*DOCUMENT, *greedy("llama", tuple(DOCUMENT))]).tokens <= len(DOCUMENT)


def test_the_model_is_as_it_was_when_the_loop_has_closed(pages: PromptPages) -> None:
    model = model_of("llama")
    before = model.config._attn_implementation
    loop = ModelLoop(runner_of(model, pages))
    ticket = loop.submit(GenerationRequest(DOCUMENT, 1000))
    next(ticket)
    loop.close()
    assert ticket.result(0).finish_reason == "cancelled"
    assert model.config._attn_implementation == before
    assert pages.match(DOCUMENT).tokens == len(DOCUMENT)


def test_logits_from_the_store_come_to_where_the_model_computes(pages: PromptPages) -> None:
    """A request has one generator, whose device has to be that of all logits it chooses by."""
    with ModelLoop(runner_of(model_of("llama"), pages)) as loop:
        ask(loop, PROMPTS[0])
    runner = runner_of(model_of("llama"), pages)
    try:
        elsewhere: Any = tiny_model("llama")  # stands for one on a GPU
        runner.model = elsewhere.to("meta")
        sequence = Sequence(GenerationRequest(PROMPTS[0], NEW))
        admission = runner.begin(sequence)
        assert isinstance(admission, Admission)
        assert admission.logits is not None
        assert admission.logits.device.type == "meta"
        runner.end(sequence, is_good=False)
    finally:
        runner.close()


def test_a_model_that_blocks_cannot_serve_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope)
    with pytest.raises(UnsupportedModel, match="rope of type dynamic"):
        PagedRunner(model)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode; model\.eval"):
        PagedRunner(tiny_model("llama").train())
