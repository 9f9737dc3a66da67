"""Parameters of the asymmetric quantizer, at the edges of what fp16 holds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from respkv.kernels import interval

INF, NAN = float("inf"), float("nan")
# Low, high: the stored low end and step of 255 levels, and whether the group fits.
CASES = {
    "usual": ((-1.0, 1.0), (-1.0, 0.00784302), True),
    "all zero": ((0.0, 0.0), (0.0, 1.0), True),
    "zeros of both signs": ((-0.0, 0.0), (0.0, 1.0), True),
    "all equal": ((3.25, 3.25), (3.25, 1.0), True),
    "all equal and small": ((2.0**-18, 2.0**-18), (2.0**-18, 1.0), True),
    "all equal and smaller": ((2.0**-19, 2.0**-19), (2.0**-19, 1.0), False),
    "the smallest step": ((0.0, 255 * 2.0**-18), (0.0, 2.0**-18), True),
    "a smaller step": ((0.0, 255 * 2.0**-19), (0.0, 2.0**-19), False),
    "a smaller step of larger numbers": ((-0.25, -0.25 + 2.0**-12), (-0.25, 2.0**-20), True),
    "a step that vanishes": ((0.0, 2.0**-20), (0.0, 1.0), False),
    "a step that vanishes, of larger numbers": (
        (2.0**-8, 2.0**-8 + 2.0**-18),
        (2.0**-8, 1.0),
        True,
    ),
    "numbers that are subnormal": ((-(2.0**-130), 2.0**-130), (0.0, 1.0), False),
    "all of fp16": ((-65504.0, 65504.0), (-65504.0, 514.0), True),
    "beyond fp16": ((-66000.0, 0.0), (-INF, 258.75), False),
    "a step beyond fp16": ((0.0, 2.0**25), (0.0, INF), False),
    "infinity": ((0.0, INF), (0.0, INF), False),
    "minus infinity": ((-INF, 0.0), (-INF, INF), False),
    "nothing but infinity": ((INF, INF), (INF, NAN), False),
    "not a number": ((NAN, NAN), (NAN, NAN), False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_group_fits_when_fp16_holds_its_parameters(name: str) -> None:
    (low, high), (expected_low, expected_step), expected = CASES[name]
    lows, steps, fits = interval.parameters(torch.tensor([low]), torch.tensor([high]), 255)
    assert lows.dtype == steps.dtype == torch.float16
    assert fits.tolist() == [expected]
    torch.testing.assert_close(
        (lows.float(), steps.float()),
        (torch.tensor([expected_low]), torch.tensor([expected_step])),
        rtol=1e-2 if "smaller" in name else 1e-6,
        atol=0,
        equal_nan=True,
    )
    if low == 0:
        assert not lows.signbit().any()


@given(
    st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=40),
    st.sampled_from([15, 255]),
)
def test_numbers_of_a_group_that_fits_come_back_to_half_a_step(
    numbers: list[float], levels: int
) -> None:
    exact = torch.tensor(numbers)
    lows, steps, fits = interval.parameters(exact.min()[None], exact.max()[None], levels)
    if not fits:
        return
    codes = interval.quantize(exact.clone(), lows, steps, levels)
    assert torch.equal(codes, codes.round().clamp(0, levels))
    error = (interval.dequantize(codes, lows, steps) - exact).abs().max()
    # Rounding the step moves the last level, rounding the low end moves all of them.
    slack = 0.5 + levels * 2.0**-12
    assert error <= slack * steps.float() * 1.0001 + lows.float().abs() * 2.0**-11 + 2.0**-16


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, []), (3, [(1, 3)]), (4, [(1, 4)]), (9, [(2, 4), (1, 1)])],
)
def test_groups_are_views_and_the_last_may_be_shorter(
    axis: int, count: int, expected: list[tuple[int, int]]
) -> None:
    shape = [2, 2, 2]
    shape[axis] = count
    numbers = torch.zeros(shape)
    cut = list(interval.groups(numbers, axis, 4))
    assert [(g.shape[axis], g.shape[axis + 1]) for g, _ in cut] == expected
    assert [where.stop - where.start for _, where in cut] == [size for size, _ in expected]
    for group, where in cut:
        group += 1 + where.start
    full, rest = divmod(count, 4)
    marks = torch.tensor([1.0] * 4 * full + [1.0 + full] * rest).view(-1, 1, 1)
    assert torch.equal(numbers.movedim(axis, 0), marks.expand(count, 2, 2))
