"""Requests that can never be served are refused where they are made."""

from collections.abc import Callable

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
    ],
)
def test_a_value_out_of_range_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        make()


@pytest.mark.parametrize(
    ("use_cache", "use_prefix_cache", "shares"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_nothing_is_shared_without_a_cache(
    use_cache: bool, use_prefix_cache: bool, shares: bool
) -> None:
    request = GenerationRequest([1], use_cache=use_cache, use_prefix_cache=use_prefix_cache)
    assert request.shares is shares
