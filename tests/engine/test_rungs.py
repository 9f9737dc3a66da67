"""The choice of codecs: every plane keeps the bound at the least cost."""

from hypothesis import given
from hypothesis import strategies as st

from respkv.engine.rungs import Plane, Rung, choose_ratio, choose_within
from respkv.kernels.layout import Codec

CALM = [
    Rung(Codec.RAW, 16.0, 0.0),
    Rung(Codec.XS, 11.2, 0.0),
    Rung(Codec.I8, 8.5, 0.002),
    Rung(Codec.RH4, 4.4, 0.04),
    Rung(Codec.RH2, 2.4, 0.14),
]
WILD = [
    Rung(Codec.RAW, 16.0, 0.0),
    Rung(Codec.XS, 11.6, 0.0),
    Rung(Codec.I8, 8.5, 0.013),
    Rung(Codec.RH4, 4.4, 0.11),
    Rung(Codec.RH2, 2.4, 0.36),
]
MEASURED = {(0, 0): CALM, (0, 1): WILD}


def mean_bits(chosen: dict[Plane, Codec], measured: dict[Plane, list[Rung]]) -> float:
    bits = [
        next(rung.bits for rung in measured[plane] if rung.codec == codec)
        for plane, codec in chosen.items()
    ]
    return sum(bits) / len(bits)


def test_each_plane_gets_the_cheapest_codec_within_the_bound() -> None:
    assert choose_within(MEASURED, 0.05) == {(0, 0): Codec.RH4, (0, 1): Codec.I8}
    assert choose_within(MEASURED, 0.001) == {(0, 0): Codec.XS, (0, 1): Codec.XS}
    assert choose_within(MEASURED, 1.0) == {(0, 0): Codec.RH2, (0, 1): Codec.RH2}


def test_of_two_that_cost_the_same_the_more_exact_one_is_taken() -> None:
    rungs = [Rung(Codec.I4, 4.0, 0.09), Rung(Codec.RH4, 4.0, 0.04)]
    assert choose_within({(0, 0): rungs}, 0.1) == {(0, 0): Codec.RH4}


def test_a_plane_for_which_nothing_is_exact_enough_stays_raw() -> None:
    assert choose_within({(3, 1): [Rung(Codec.RH2, 2.4, 0.4)]}, 0.1) == {(3, 1): Codec.RAW}


def test_a_ratio_is_reached_with_the_smallest_common_bound() -> None:
    assert choose_ratio(MEASURED, 1.2, 16.0) == {(0, 0): Codec.XS, (0, 1): Codec.XS}
    assert choose_ratio(MEASURED, 2.0, 16.0) == {(0, 0): Codec.RH4, (0, 1): Codec.I8}


def test_a_ratio_that_nothing_reaches_gives_what_saves_most() -> None:
    assert choose_ratio(MEASURED, 100.0, 16.0) == {(0, 0): Codec.RH2, (0, 1): Codec.RH2}


@given(
    measured=st.dictionaries(
        st.tuples(st.integers(0, 3), st.integers(0, 1)),
        st.lists(
            st.builds(
                Rung,
                st.sampled_from(list(Codec)),
                st.floats(1.0, 16.0),
                st.floats(0.0, 1.0),
            ),
            min_size=1,
            max_size=5,
            unique_by=lambda rung: rung.codec,
        ).map(lambda rungs: [Rung(Codec.RAW, 16.0, 0.0), *(r for r in rungs if r.codec)]),
        min_size=1,
    ),
    ratio=st.floats(1.0, 16.0),
)
def test_whatever_was_measured_a_choice_keeps_the_ratio_if_any_does(
    measured: dict[Plane, list[Rung]], ratio: float
) -> None:
    best = mean_bits(choose_within(measured, 2.0), measured)
    chosen = choose_ratio(measured, ratio, 16.0)
    assert chosen.keys() == measured.keys()
    reached = mean_bits(chosen, measured)
    assert 16.0 / reached >= min(ratio, 16.0 / best) - 1e-9
