"""``i4`` against its formulas, written once more group by group."""

import numpy as np
import pytest
import torch

from respkv.kernels import i4
from respkv.kernels.layout import Side
from tests.kernels import data


def reference_group(part: np.ndarray, axis: int) -> tuple[np.ndarray, ...]:
    """Return low ends, steps, codes and decoded numbers of one group along an axis."""
    low32, high32 = part.min(axis, keepdims=True), part.max(axis, keepdims=True)
    low = low32.astype(np.float16)
    step = ((high32 - low32) * np.float32(1 / 15)).astype(np.float16)
    step[step == 0] = 1
    inverse = 1 / step.astype(np.float32)
    codes = np.clip(np.rint((part - low.astype(np.float32)) * inverse), 0, 15)
    return low, step, codes, low.astype(np.float32) + codes * step.astype(np.float32)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("dim", [1, 31, 32, 33, 128])
@pytest.mark.parametrize("tokens", [1, 32, 67])
def test_codes_are_steps_from_the_low_end_of_32_numbers(side: Side, dim: int, tokens: int) -> None:
    plane = data.GENERATORS[f"{side}s"](tokens, 2, dim, dim)
    axis, count = (0, tokens) if side == "key" else (2, dim)
    shape = [tokens, 2, dim]
    shape[axis] = -(-count // 32)
    lows, steps = (data.poisoned((1, *shape), torch.float16) for _ in range(2))
    packed = data.poisoned((1, tokens, 2, -(-dim // 2)))
    assert i4.encode(plane.unsqueeze(0), side=side, lows=lows, steps=steps, codes=packed)
    decoded = i4.decode(dim, side=side, lows=lows, steps=steps, codes=packed)[0].numpy()
    octets = packed[0].numpy()
    codes = np.stack((octets & 15, octets >> 4), -1).reshape(tokens, 2, -1)
    assert not codes[..., dim:].any()
    exact = np.moveaxis(plane.float().numpy(), axis, 0)
    ours = [
        np.moveaxis(each, axis, 0)
        for each in (lows[0].numpy(), steps[0].numpy(), codes[..., :dim], decoded)
    ]
    for group, start in enumerate(range(0, count, 32)):
        part = exact[start : start + 32]
        low, step, found, numbers = reference_group(part, 0)
        np.testing.assert_array_equal(ours[0][group], low[0])
        np.testing.assert_array_equal(ours[1][group], step[0])
        np.testing.assert_array_equal(ours[2][start : start + 32], found)
        np.testing.assert_array_equal(ours[3][start : start + 32], numbers)
        bound = 0.51 * step.astype(np.float32) + np.abs(low.astype(np.float32)) / 2048 + 2.0**-20
        assert (np.abs(numbers - part) <= bound).all()
