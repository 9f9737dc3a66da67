"""Calls are added up."""

from respkv.integrations.huggingface.reuse import AdapterStats, Reuse


def test_calls_add_up() -> None:
    none = AdapterStats()
    assert none.token_hit_rate == 0.0
    missed = none.plus(Reuse(prompt_tokens=30))
    assert (missed.calls, missed.hits, missed.full_hits, missed.token_hit_rate) == (1, 0, 0, 0.0)
    hit = missed.plus(Reuse(60, 50, 45, load_s=0.25))
    assert (hit.calls, hit.hits, hit.full_hits, hit.token_hit_rate) == (2, 1, 0, 0.5)
    full = hit.plus(Reuse(10, 10, 10, is_full_hit=True, load_s=0.5))
    assert full == AdapterStats(3, 2, 1, 0, 100, 55, 0.75)
    assert none == AdapterStats()


def test_a_call_that_could_not_use_the_cache_is_in_no_rate() -> None:
    full = AdapterStats().plus(Reuse(10, 10, 10, is_full_hit=True))
    plain = full.plus(Reuse(reason="use_cache is False"))
    assert (plain.calls, plain.uncached, plain.hits) == (2, 1, 1)
    assert plain.token_hit_rate == 1.0
