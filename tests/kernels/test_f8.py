"""``f8`` against ml_dtypes, which has e4m3 of its own, and at the edges."""

import ml_dtypes
import numpy as np
import pytest
import torch

from respkv.kernels import f8
from tests.kernels import data


def encode(plane: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return scales, codes and whether it fits, of a plane [T, H, D]."""
    scales = data.poisoned((1, *plane.shape[:2]), torch.float32)
    codes = data.poisoned((1, *plane.shape))
    fits = f8.encode(plane.unsqueeze(0), scales=scales, codes=codes)
    return scales, codes, bool(fits)


@pytest.mark.parametrize("name", data.GENERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_are_e4m3_of_the_scaled_row(name: str, dtype: torch.dtype) -> None:
    plane = data.GENERATORS[name](37, 3, 33, 1, dtype=dtype)
    scales, codes, fits = encode(plane)
    assert fits
    exact = plane.float().numpy()
    scale = np.abs(exact).max(-1) * np.float32(1 / 448)
    scaled = np.clip(exact * (np.float32(1) / scale)[..., None], -448, 448)
    expected = scaled.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(scales[0].numpy(), scale)
    np.testing.assert_array_equal(codes[0].numpy(), expected.view(np.uint8))
    decoded = f8.decode(scales=scales, codes=codes)[0].numpy()
    np.testing.assert_array_equal(decoded, expected.astype(np.float32) * scale[..., None])
    bound = np.maximum(np.abs(exact) / 16, scale[..., None] / 1024)
    assert (np.abs(decoded - exact) <= bound * 1.0001).all()


def test_every_finite_code_decodes_to_its_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(1, 1, 1, -1)
    decoded = f8.decode(scales=torch.ones(1, 1, 1), codes=codes).flatten()
    expected = codes.flatten().numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert decoded.tolist() == expected.tolist()
    assert torch.equal(decoded.signbit(), codes.flatten() > 127)


# A row: whether it fits.
ROWS = {
    "zeros": ([0.0, -0.0, 0.0], True),
    "one number": ([5.0], True),
    "huge": ([2.0**127, -1.0, 0.0], True),
    "too huge": ([3.3e38, 1.0], False),
    "infinite": ([float("inf"), 1.0], False),
    "minus infinite": ([-float("inf"), 1.0], False),
    "not a number": ([1.0, float("nan"), 2.0], False),
    "small": ([448 * 2.0**-126, 2.0**-126], True),
    "too small": ([2.0**-120], False),
    "subnormal": ([2.0**-140], False),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_fits_or_says_that_it_does_not(name: str) -> None:
    row, expected = ROWS[name]
    plane = torch.ones(2, 1, len(row))
    plane[1] = torch.tensor(row)
    scales, codes, fits = encode(plane)
    assert fits == expected
    if expected:
        decoded = f8.decode(scales=scales, codes=codes)[0]
        assert decoded.isfinite().all()
        assert torch.allclose(decoded, plane, rtol=1 / 16, atol=float(plane.max()) / 2**18)
