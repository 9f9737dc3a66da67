"""``i8`` against its formulas, written once more group by group."""

import numpy as np
import pytest
import torch

from respkv.kernels import i8
from tests.kernels import data

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_are_steps_from_the_low_end_of_64_tokens(tokens: int, dtype: torch.dtype) -> None:
    plane = data.keys(tokens, 2, 33, tokens, dtype=dtype)
    lows, steps = (data.poisoned((1, -(-tokens // 64), 2, 33), torch.float16) for _ in range(2))
    codes = data.poisoned((1, tokens, 2, 33))
    assert i8.encode_keys(plane.unsqueeze(0), lows=lows, steps=steps, codes=codes)
    decoded = i8.decode_keys(lows=lows, steps=steps, codes=codes)[0].numpy()
    exact = plane.float().numpy()
    for group, start in enumerate(range(0, tokens, 64)):
        part = exact[start : start + 64]
        low = part.min(0).astype(np.float16)
        step = ((part.max(0) - part.min(0)) * np.float32(1 / 255)).astype(np.float16)
        step[step == 0] = 1
        np.testing.assert_array_equal(lows[0, group].numpy(), low)
        np.testing.assert_array_equal(steps[0, group].numpy(), step)
        low32, step32 = low.astype(np.float32), step.astype(np.float32)
        found = np.clip(np.rint((part - low32) * (1 / step32)), 0, 255)
        np.testing.assert_array_equal(codes[0, start : start + 64].numpy(), found)
        np.testing.assert_array_equal(decoded[start : start + 64], low32 + found * step32)
        bound = 0.57 * step32 + np.abs(low32) / 2048 + 2.0**-16
        assert (np.abs(decoded[start : start + 64] - part) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_steps_from_zero_of_one_token(dtype: torch.dtype) -> None:
    plane = data.values(70, 2, 33, 1, dtype=dtype)
    steps, codes = data.poisoned((1, 70, 2), torch.float16), data.poisoned((1, 70, 2, 33))
    assert i8.encode_values(plane.unsqueeze(0), steps=steps, codes=codes)
    decoded = i8.decode_values(steps=steps, codes=codes)[0].numpy()
    exact = plane.float().numpy()
    step = (np.abs(exact).max(-1) * np.float32(1 / 127)).astype(np.float16)
    np.testing.assert_array_equal(steps[0].numpy(), step)
    step32 = step.astype(np.float32)[..., None]
    found = np.clip(np.rint(exact * (1 / step32)), -127, 127)
    np.testing.assert_array_equal(codes[0].view(torch.int8).numpy(), found)
    np.testing.assert_array_equal(decoded, found * step32)
    assert (np.abs(decoded - exact) <= 0.54 * step32 + 2.0**-18).all()


# The greatest number of a row of values: whether it fits.
AMAX = {
    "zero": (0.0, True),
    "the smallest step": (127 * 2.0**-18, True),
    "a smaller step": (127 * 2.0**-19, False),
    "a step that vanishes": (2.0**-30, False),
    "the largest step": (127 * 65504.0, True),
    "a larger step": (127 * 65600.0, False),
    "infinity": (float("inf"), False),
    "not a number": (float("nan"), False),
}


@pytest.mark.parametrize("name", AMAX)
def test_a_row_of_values_fits_or_says_that_it_does_not(name: str) -> None:
    amax, expected = AMAX[name]
    plane = torch.ones(3, 1, 4)
    plane[1, 0] = torch.tensor([0.0, -amax, amax / 2, -0.0])
    steps, codes = data.poisoned((1, 3, 1), torch.float16), data.poisoned((1, 3, 1, 4))
    assert bool(i8.encode_values(plane.unsqueeze(0), steps=steps, codes=codes)) == expected
    if expected:
        decoded = i8.decode_values(steps=steps, codes=codes)[0]
        assert torch.allclose(decoded, plane, rtol=0, atol=max(amax, 1) / 127)
