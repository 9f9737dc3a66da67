"""Long loads into blocks, beside what others do with these blocks and with the model."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from respkv.batching.model_loop import ModelLoop
from respkv.batching.request import GenerationRequest
from respkv.batching.runner import Admission, Loading
from respkv.batching.sequence import Chunk, Sequence
from respkv.client import Client
from respkv.integrations.huggingface.paged_runner import PagedRunner
from respkv.integrations.huggingface.prompt_pages import PromptPages
from tests.integrations.huggingface.models import prompt, shared_model, tiny_model

NEW = 8
DOCUMENT = prompt(200, seed=7)


def greedy(tokens: list[int]) -> list[int]:
    model: Any = shared_model("llama")
    ids = torch.tensor([tokens])
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
    )
    new: list[int] = answer[0, len(tokens) :].tolist()
    return new


def new_runner(pages: PromptPages) -> PagedRunner:
    """A runner that loads whatever there is, and all of it aside."""
    model = tiny_model("llama")
    return PagedRunner(model, pages, num_blocks=100, never_slower=False, aside_bytes=0)


@pytest.fixture
def pages(engine: Client) -> Iterator[PromptPages]:
    """The pages of the document."""
    engine.command("FLUSHALL")
    with PromptPages(engine, model=shared_model("llama"), page_tokens=16) as running:
        with ModelLoop(new_runner(running)) as loop:
            loop.submit(GenerationRequest(DOCUMENT, 1)).result(60)
        running.flush()
        yield running


def loaded(runner: PagedRunner, sequence: Sequence) -> Admission:
    """Wait for a sequence, and for no other."""
    while not (come := runner.arrived(wait=True)):
        pass
    [(found, admission)] = come
    assert found is sequence
    return admission


def test_others_may_take_a_block_while_something_is_loaded_behind_its_tokens(
    pages: PromptPages,
) -> None:
    runner = new_runner(pages)
    short, long = (Sequence(GenerationRequest(each, NEW)) for each in (DOCUMENT[:35], DOCUMENT))
    try:
        assert runner.begin(short) is Loading.LOADING
        begun = loaded(runner, short).computed
        assert runner.grow(short, 35)
        with torch.inference_mode():
            runner.step([Chunk(short, begun, 35, is_last=True)])
        runner.end(short, is_good=True)  # its last block is not full
        have = runner.cache.match(DOCUMENT, (None, None))
        assert have % 16
        assert runner.begin(long) is Loading.LOADING
        other = Sequence(GenerationRequest([*DOCUMENT[:have], 5, 6], NEW))
        admission = runner.begin(other)
        assert isinstance(admission, Admission)
        assert admission.computed == have
        admission = loaded(runner, long)
        assert admission.computed == 200
        assert admission.logits is not None
        assert int(admission.logits.argmax()) == greedy(DOCUMENT)[0]
        runner.cache.blocks.check()
        for each in (other, long):
            runner.end(each, is_good=True)
    finally:
        runner.close()


def test_one_that_is_loaded_alone_holds_nobody_up(pages: PromptPages) -> None:
    gate = threading.Event()

    class Gated(PromptPages):
        def load(self, *args: Any, **options: Any) -> int:
            assert gate.wait(60)
            return super().load(*args, **options)

    with Gated(pages.client, model=shared_model("llama"), page_tokens=16) as gated:
        with ModelLoop(new_runner(gated)) as loop:
            loading = loop.submit(GenerationRequest(DOCUMENT, NEW))
            unwanted = loop.submit(GenerationRequest([*DOCUMENT, 7], NEW))
            short = prompt(9, seed=1)
            assert list(loop.submit(GenerationRequest(short, NEW)).result(30).tokens) == greedy(
                short
            )
            unwanted.cancel()
            assert unwanted.result(30).finish_reason == "cancelled"
            gate.set()
            answer = loading.result(30)
            assert list(answer.tokens) == greedy(DOCUMENT)
            assert answer.timings.prefix_tokens_saved == 200
