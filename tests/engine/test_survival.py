"""The survival model: the estimate by hand, what it borrows, and what it says before it knows."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.engine.survival import (
    CENSOR_S,
    FIRST_BIN_S,
    LEARN_EVERY,
    LEFT,
    NUM_KINDS,
    TURN_MAX,
    Curve,
    Survival,
    kind_of,
)

ages = st.floats(0.0, 5000.0, allow_nan=False)


def test_kinds_are_numbered_by_turn_and_length() -> None:
    kinds = [kind_of(turn, tokens) for turn in range(TURN_MAX + 1) for tokens in (1, 5000, 50_000)]
    assert kinds == list(range(NUM_KINDS))
    assert kind_of(0, 1023) == 0
    assert kind_of(0, 1024) == 1
    assert kind_of(0, 8192) == 2


def test_the_hazard_is_the_share_of_those_waiting_that_were_continued() -> None:
    curve = Curve()
    curve.continued[0] = 3000.0
    curve.continued[5] = 2000.0
    lost = curve.lost_by(0.0)
    lost[2] = 2000.0
    lost[9] = 3000.0
    rates = curve.rates(lost, None)
    # 10,000 begin, 3,000 are continued at once, 2,000 lost sight of, 2,000 of 5,000 continued.
    assert rates[0] == pytest.approx(0.3, abs=0.01)
    assert rates[5] == pytest.approx(0.4, abs=0.01)
    assert rates[3] < 0.01


def test_what_still_waits_counts_as_not_continued_yet() -> None:
    patient, hasty = Survival(), Survival()
    for model in (patient, hasty):
        for _ in range(50):
            model.continued(0, 30.0, 100.0)
    for _ in range(500):
        patient.begin(0, 0.0)
    patient.learn(200.0)
    hasty.learn(200.0)
    assert patient.chance(0, 0.0, 60.0) < hasty.chance(0, 0.0, 60.0) / 3


def test_before_anything_is_learned_the_oldest_is_the_least_likely() -> None:
    model = Survival()
    chances = [model.chance(kind, 60.0, 60.0) for kind in range(LEFT + 1)]
    assert len(set(chances)) == 1
    falling = [model.chance(0, FIRST_BIN_S * 2**doubling, 60.0) for doubling in range(12)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < falling[0] / 10


def test_a_kind_of_which_little_was_seen_is_like_all_others() -> None:
    model = Survival()
    for _ in range(1000):
        model.continued(0, 30.0, 0.0)
        model.lost(1, CENSOR_S, 0.0)
    model.lost(2, CENSOR_S, 0.0)
    model.learn(0.0)
    often, never, unknown = (model.chance(kind, 10.0, 100.0) for kind in range(3))
    assert never < 0.05 < unknown < often
    assert often > 0.8


def test_hazards_are_worked_out_after_so_many_observations() -> None:
    model = Survival()
    before = model.chance(0, 0.0, 60.0)
    for _ in range(LEARN_EVERY):
        model.lost(0, CENSOR_S, 0.0)
    assert model.chance(0, 0.0, 60.0) == before
    model.lost(0, CENSOR_S, 0.0)
    assert model.chance(0, 0.0, 60.0) < before


def test_what_is_forgotten_teaches_nothing() -> None:
    model = Survival()
    times = [float(now) for now in range(0, 600, 7)]
    for now in times:
        model.begin(3, now)
        model.moved(3, now, now + 40.0)
    for now in times:
        model.forget(3, now + 40.0)
    fresh = Survival()
    model.learn(1000.0)
    assert not model.curves[3].waiting
    assert model.curves[3].hazard == fresh.curves[3].hazard


def test_an_exponential_return_is_found_again() -> None:
    """A third returns after a mean of 100 s, the rest never."""
    model, order = Survival(), random.Random(7)
    for _ in range(6000):
        age = order.expovariate(1 / 100) if order.random() < 1 / 3 else CENSOR_S
        if age < CENSOR_S:
            model.continued(4, age, 0.0)
        else:
            model.lost(4, CENSOR_S, 0.0)
    model.learn(0.0)
    assert model.chance(4, 0.0, CENSOR_S * 0.99) == pytest.approx(1 / 3, abs=0.04)
    assert model.chance(4, 0.0, 100.0) == pytest.approx((1 / 3) * 0.632, abs=0.04)
    assert model.age_by(4, 0.0, 0.3) == pytest.approx(60.0, rel=0.5)


@settings(max_examples=100, deadline=None)
@given(
    seen=st.lists(st.tuples(st.integers(0, LEFT), ages, st.booleans()), max_size=200),
    kind=st.integers(0, LEFT),
    age=ages,
    spans=st.tuples(ages, ages),
)
def test_chances_are_probabilities_and_grow_with_the_time_given(
    seen: list[tuple[int, float, bool]], kind: int, age: float, spans: tuple[float, float]
) -> None:
    model = Survival()
    for each, waited, is_continued in seen:
        (model.continued if is_continued else model.lost)(each, waited, 0.0)
    model.learn(0.0)
    shorter, longer = sorted(spans)
    assert 0.0 <= model.chance(kind, age, shorter) <= model.chance(kind, age, longer) <= 1.0
    assert model.age_by(kind, age, 0.5) >= age
