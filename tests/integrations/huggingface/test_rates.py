"""What is learned of computing and loading decides which of them is done."""

from respkv.integrations.huggingface.rates import Rates


def test_what_is_not_known_is_loaded() -> None:
    assert Rates().is_worth(10, 1000, 3600.0)
    assert Rates().compute_s(10) is None


def test_loading_is_chosen_where_it_is_quicker() -> None:
    rates = Rates()
    rates.computed(1, 0.010)
    rates.computed(100, 0.110)  # a millisecond a token, beside what every pass costs
    assert rates.compute_s(50) == 0.05
    assert rates.is_worth(50, 1000, 0.049)
    assert not rates.is_worth(50, 1000, 0.051)
    rates.loaded(1000, 99.0)  # the first one says nothing
    rates.loaded(1000, 0.060)
    assert not rates.is_worth(50, 1000, 0.001)
    assert rates.is_worth(70, 1000, 0.001)
    assert not rates.is_worth(40, 1, 0.001)  # no load was ever as quick as that


def test_a_cache_that_was_slow_once_is_tried_again() -> None:
    rates = Rates()
    rates.computed(100, 0.1)
    rates.loaded(1000, 1.0)
    rates.loaded(1000, 1.0)
    rates.computed(2, 1.0)  # too few to tell
    tries = 1
    while not rates.is_worth(100, 1000, 0.0):
        tries += 1
    assert 10 < tries < 40
    for _ in range(20):
        rates.loaded(1000, 0.01)
    assert rates.is_worth(100, 1000, 0.0)
    rates.loaded(0, 99.0)  # nothing was there: that says nothing of loading
    assert rates.is_worth(100, 1000, 0.0)
