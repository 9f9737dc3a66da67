"""Any model behind the model loop, with a cache of its own for each sequence."""

import pytest
import torch

from respkv.batching.model_loop import Limits, ModelLoop
from respkv.batching.request import BadRequest, GenerationRequest
from respkv.integrations.huggingface.dynamic_runner import DynamicRunner
from tests.integrations.huggingface.models import POSITIONS, prompt, shared_model


def greedy(family: str, tokens: list[int], count: int) -> list[int]:
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        while ids.shape[1] < len(tokens) + count:
            logits = shared_model(family)(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    new: list[int] = ids[0, len(tokens) :].tolist()
    return new


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_each_gets_its_own_tokens_in_little_memory(family: str) -> None:
    prompts = [prompt(count, seed=count) for count in (5, 40, 17, 33)]
    runner = DynamicRunner(shared_model(family), tokens_max=64, slots=100)
    with ModelLoop(runner, limits=Limits(step_tokens_max=32)) as loop:
        tickets = [
            loop.submit(GenerationRequest(each, 20, use_cache=index != 2))
            for index, each in enumerate(prompts)
        ]
        for each, ticket in zip(prompts, tickets, strict=True):
            assert list(ticket.result(60).tokens) == greedy(family, each, 20)
        assert loop.stats().preemptions > 0
        assert loop.clear() == 0


def test_a_sequence_may_be_as_long_as_the_model_and_its_memory_allow() -> None:
    runner = DynamicRunner(shared_model("llama"))
    assert runner.tokens_max == POSITIONS
    with ModelLoop(runner) as loop:
        with pytest.raises(BadRequest, match=f"more than the {POSITIONS} allowed"):
            loop.submit(GenerationRequest([5], POSITIONS))
    with pytest.raises(ValueError, match="10 slots are too few for a sequence of 64 tokens"):
        DynamicRunner(shared_model("llama"), tokens_max=64, slots=10)
