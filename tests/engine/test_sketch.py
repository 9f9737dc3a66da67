"""Counts are never too low, seldom too high, and fade."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from respkv.engine.sketch import COUNT_MAX, KEYS_MIN, PLACES, SAMPLE, Sketch


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=200), st.integers(0, 3 * KEYS_MIN))
def test_no_count_is_too_low_and_growing_loses_none(keys: list[int], num_keys: int) -> None:
    sketch = Sketch()
    sketch.grow(1)
    for key in keys:
        sketch.add(key, 1)
    sketch.grow(num_keys)
    for key, count in Counter(keys).items():
        assert sketch.count(key) >= min(count, COUNT_MAX)


def test_few_counts_are_too_high() -> None:
    rng = random.Random(3)
    sketch = Sketch()
    sketch.grow(16_384)
    keys = [rng.getrandbits(64) for _ in range(10_000)]
    for key in keys:
        sketch.add(key, 1)
    assert sum(sketch.count(key) > 1 for key in keys) < 700
    others = [rng.getrandbits(64) for _ in range(10_000)]
    assert sum(sketch.count(key) > 0 for key in others) < 1500


def test_a_count_stops_and_is_halved_in_time() -> None:
    sketch = Sketch()
    assert sketch.count(7) == 0
    sketch.grow(KEYS_MIN)
    sketch.add(7, 100)
    assert sketch.count(7) == COUNT_MAX
    sketch.add(8, SAMPLE * KEYS_MIN)
    assert sketch.count(7) == COUNT_MAX // 2
    assert sketch.nbytes == 4 * PLACES * KEYS_MIN


def test_keys_that_come_once_do_not_lend_others_their_counts() -> None:
    rng = random.Random(5)
    sketch = Sketch()
    sketch.grow(KEYS_MIN)
    often = [rng.getrandbits(64) for _ in range(10)]
    for number in range(3 * SAMPLE * KEYS_MIN):  # most of a cache's keys are of that kind
        sketch.add(rng.getrandbits(64), 1)
        if number % 50 == 0:
            sketch.add(often[number // 50 % 10], 1)
    others = [sketch.count(rng.getrandbits(64)) for _ in range(1000)]
    assert sum(others) / 1000 < 1.0
    assert sum(count > 2 for count in others) < 50
    assert sum(sketch.count(name) > 3 for name in often) == 10
