"""Counts are never too low, seldom too high, and fade."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from respkv.engine.sketch import COUNT_MAX, SAMPLE, WIDTH_MIN, Sketch


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=200), st.integers(0, 3 * WIDTH_MIN))
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
    sketch.grow(WIDTH_MIN)
    sketch.add(7, 100)
    assert sketch.count(7) == COUNT_MAX
    sketch.add(8, SAMPLE * WIDTH_MIN)
    assert sketch.count(7) == COUNT_MAX // 2
    assert sketch.nbytes == 4 * WIDTH_MIN
