"""Counts are never too low, seldom too high, and fade."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from respkv.engine.sketch import COUNT_MAX, SAMPLE, Sketch


@given(st.lists(st.integers(0, 2**64 - 1), max_size=200))
def test_no_count_is_too_low(keys: list[int]) -> None:
    sketch = Sketch(256)
    for key in keys:
        sketch.add(key)
    for key, count in Counter(keys).items():
        assert sketch.estimate(key) >= min(count, COUNT_MAX)


def test_few_counts_are_too_high() -> None:
    rng = random.Random(3)
    sketch = Sketch(1 << 14)
    keys = [rng.getrandbits(64) for _ in range(10_000)]
    for key in keys:
        sketch.add(key)
    assert sum(sketch.estimate(key) > 1 for key in keys) < 100
    others = [rng.getrandbits(64) for _ in range(10_000)]
    assert sum(sketch.estimate(key) > 0 for key in others) < 1500


def test_hashes_of_either_sign_and_of_little_difference_are_told_apart() -> None:
    sketch = Sketch(1 << 10)
    for key in range(-50, 50, 2):
        sketch.add(key)
    assert all(sketch.estimate(key) == 1 for key in range(-50, 50, 2))
    assert sum(sketch.estimate(key) for key in range(-49, 51, 2)) <= 1


def test_a_count_stops_and_is_halved_in_time() -> None:
    sketch = Sketch(64)
    sketch.add(7, 100)
    assert sketch.estimate(7) == COUNT_MAX
    for number in range(SAMPLE * 64):
        sketch.add(number + 100, 0)
    sketch.add(8, SAMPLE * 64)
    assert sketch.num_halvings == 1
    assert sketch.estimate(7) == COUNT_MAX // 2
    assert sketch.nbytes == 4 * 64
