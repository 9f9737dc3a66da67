"""Tokens are drawn as ``generate`` draws them, each request by its own random numbers."""

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from respkv.batching.request import GREEDY, Sampling
from respkv.batching.sampling import choose, new_generator

CPU = torch.device("cpu")


def random_logits(rows: int, *, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, 80, generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_likeliest() -> None:
    logits = random_logits(5)
    assert choose(logits, [(GREEDY, None)] * 5) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 500])
@pytest.mark.parametrize("top_p", [None, 0.1, 0.8, 1.0])
def test_a_draw_equals_that_of_transformers(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    sampling = Sampling(temperature, top_k, top_p, seed=11)
    generator = new_generator(sampling, CPU)
    reference = torch.Generator().manual_seed(11)
    ids = torch.LongTensor([[0]])
    for seed in range(5):
        logits = random_logits(1, seed=seed)
        scores = TemperatureLogitsWarper(temperature)(ids, logits)
        if top_k is not None:
            scores = TopKLogitsWarper(top_k)(ids, scores)
        if top_p is not None:
            scores = TopPLogitsWarper(top_p)(ids, scores)
        want = int(torch.multinomial(scores.softmax(-1), 1, generator=reference))
        assert choose(logits, [(sampling, generator)]) == [want]


def test_what_is_drawn_does_not_depend_on_the_rest_of_the_batch() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    alone, together = new_generator(sampling, CPU), new_generator(sampling, CPU)
    other = Sampling(temperature=2.0, seed=4)
    noise = new_generator(other, CPU)
    for seed in range(5):
        logits = random_logits(3, seed=seed)
        (want,) = choose(logits[1:2], [(sampling, alone)])
        wishes = [(other, noise), (sampling, together), (GREEDY, None)]
        assert choose(logits, wishes)[1] == want


def test_without_a_seed_draws_differ() -> None:
    logits = torch.zeros(1, 1 << 20)
    wish = Sampling(temperature=1.0)
    drawn = {choose(logits, [(wish, new_generator(wish, CPU))])[0] for _ in range(4)}
    assert len(drawn) > 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_p=0.5, seed=1)])
def test_a_row_that_is_no_numbers_gets_no_token(bad: float, sampling: Sampling) -> None:
    logits = random_logits(3)
    logits[1, 40] = bad
    wishes = [(sampling, new_generator(sampling, CPU)) for _ in range(3)]
    tokens = choose(logits, wishes)
    assert [token is None for token in tokens] == [False, True, False]


def test_tokens_that_were_ruled_out_are_no_reason_to_fail() -> None:
    logits = torch.full((1, 10), float("-inf"))
    logits[0, 4] = 1.0
    wish = Sampling(temperature=1.0, top_k=3, top_p=0.9, seed=0)
    assert choose(logits, [(wish, new_generator(wish, CPU))]) == [4]


@pytest.mark.parametrize("temperature", [5e-324, 1e-6, 1e-5, 1e308])
@pytest.mark.parametrize("top_p", [None, 5e-324, 1e-9, 1 - 1e-16])
def test_extreme_wishes_still_get_a_token(temperature: float, top_p: float | None) -> None:
    wish = Sampling(temperature, top_p=top_p, seed=0)
    logits = random_logits(1)
    logits[0, 5] = float("-inf")
    logits[0, 6] = 1e30
    (token,) = choose(logits, [(wish, new_generator(wish, CPU))])
    assert token == 6 or (temperature > 1 and top_p != 5e-324 and token is not None)
