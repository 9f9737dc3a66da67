"""Requests that can never be served are refused where they are made."""

from collections.abc import Callable
from typing import Any

import pytest

from respkv.batching.request import BadRequest, GenerationRequest, Sampling


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(temperature=-1), "temperature -1 must be 0 "),
        (lambda: Sampling(temperature=float("nan")), "temperature nan must"),
        (lambda: Sampling(temperature=float("inf")), "temperature inf must"),
        (lambda: Sampling(top_k=0), "top_k 0 must be 1 or more"),
        (lambda: Sampling(top_p=0.0), "top_p 0.0 must be above 0"),
        (lambda: Sampling(top_p=1.5), "top_p 1.5 must be"),
        (lambda: Sampling(seed=-1), "seed -1 must be from 0"),
        (lambda: GenerationRequest([]), "the prompt has no tokens"),
        (lambda: GenerationRequest([1], 0), "max_new_tokens 0 must be 1 or more"),
        (lambda: GenerationRequest([1], salt="x" * 1025), "salt has 0 to 1024 bytes, not 1025"),
        (lambda: GenerationRequest([1], tenant=b"x" * 1025), "tenant has 0 to 1024 bytes"),
        (lambda: GenerationRequest([1], session=""), "session has 1 to 256 bytes, not 0"),
        (lambda: GenerationRequest([1], session="é" * 129), "1 to 256 bytes, not 258"),
    ],
)
def test_a_value_out_of_range_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        make()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": "12"}, "tokens must be a sequence of integers, not '12'"),
        ({"tokens": None}, "tokens must be a sequence of integers, not None"),
        ({"tokens": iter([1])}, "tokens must be a sequence of integers, not <list_iterator"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens 2\.5 must be an integer"),
        ({"sampling": None}, "sampling must be a Sampling, not None"),
        ({"stop_tokens": 7}, "stop_tokens must be a set of integers, not 7"),
        ({"stop_tokens": {"</s>"}}, "a stop token '</s>' must be an integer"),
        ({"salt": "\ud800"}, "salt .* is no text that has an encoding"),
        ({"tenant": 5}, "tenant 5 must be text or bytes"),
        ({"session": ["a"]}, r"session \['a'\] must be text or bytes"),
    ],
)
def test_what_the_model_would_stumble_over_is_refused_before(
    wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        GenerationRequest(**{"tokens": [1], **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": 1.5}, r"seed 1\.5 must be an integer"),
        ({"top_k": 2.5}, r"top_k 2\.5 must be an integer"),
        ({"temperature": "1"}, "temperature '1' must be a number"),
        ({"temperature": None}, "temperature None must be 0"),
        ({"top_p": "all"}, "top_p 'all' must be a number"),
    ],
)
def test_a_wish_of_another_type_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("use_cache", "use_prefix_cache", "shares"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_nothing_is_shared_without_a_cache(
    use_cache: bool, use_prefix_cache: bool, shares: bool
) -> None:
    request = GenerationRequest([1], use_cache=use_cache, use_prefix_cache=use_prefix_cache)
    assert request.shares is shares
