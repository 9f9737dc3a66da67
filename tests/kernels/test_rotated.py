"""The rotated codecs against the same in double precision with the matrix, and at the edges."""

import pytest
import torch
from torch import Tensor

from respkv.kernels import bits, rotated
from respkv.kernels.hadamard import signs
from respkv.kernels.layout import (
    ROTATED_BITS,
    ROTATED_STEPS,
    Codec,
    Side,
    hadamard_dim,
    num_groups,
    rotated_dim,
)
from tests.kernels import data
from tests.kernels.test_hadamard import sylvester

CODECS = [codec for codec in Codec if codec.is_rotated]


def encode(
    codec: Codec, plane: Tensor, side: Side, *, unbiased: bool = False
) -> tuple[dict[str, Tensor], bool]:
    """Return the sections of a plane [T, H, D], and whether it fits."""
    tokens, heads, dim = plane.shape
    width = rotated_dim(dim) * ROTATED_BITS[codec] // 8
    sections = {
        "gains": data.poisoned((1, tokens, heads), torch.float16),
        "codes": data.poisoned((1, tokens, heads, width)),
    }
    means = None
    if side == "key":
        means = data.poisoned((1, num_groups(tokens, 256), heads, dim), torch.float16)
    fits = rotated.encode(codec, plane.unsqueeze(0), means=means, unbiased=unbiased, **sections)
    if means is not None:
        sections["means"] = means
    return sections, bool(fits)


def decode(codec: Codec, dim: int, sections: dict[str, Tensor]) -> Tensor:
    return rotated.decode(
        codec,
        dim,
        means=sections.get("means"),
        gains=sections["gains"],
        codes=sections["codes"],
    )[0]


def rotation(dim: int) -> Tensor:
    """Return the matrix that rows of W are multiplied by, [W, W] float64."""
    width, block = rotated_dim(dim), hadamard_dim(dim)
    matrix = torch.kron(torch.eye(width // block).double(), sylvester(block)) / block**0.5
    signed: Tensor = signs(width).double().unsqueeze(1) * matrix
    return signed


def exact_codes(codec: Codec, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes of numbers of variance 1, and what they stand for."""
    step = ROTATED_STEPS[codec]
    if codec.is_entropy_coded:
        codes = (unit / step).round().clamp(-7, 7) + 7
        return codes, (codes - 7) * step
    levels = 1 << ROTATED_BITS[codec]
    codes = ((unit / step).floor() + levels // 2).clamp(0, levels - 1)
    return codes, (codes - levels // 2 + 0.5) * step


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(300, 2, 128), (9, 1, 100), (1, 3, 1)])
def test_codes_and_gains_are_those_of_double_precision(
    codec: Codec, side: Side, tokens: int, heads: int, dim: int
) -> None:
    plane = data.GENERATORS[f"{side}s"](tokens, heads, dim, 1)
    sections, fits = encode(codec, plane, side)
    assert fits
    exact, means = plane.double(), torch.zeros(tokens, heads, dim, dtype=torch.float64)
    if side == "key":
        for group, start in enumerate(range(0, tokens, 256)):
            mean = exact[start : start + 256].mean(0).half()
            torch.testing.assert_close(sections["means"][0, group], mean, rtol=1e-3, atol=1e-6)
            means[start : start + 256] = sections["means"][0, group].double()
    padded = torch.zeros(tokens, heads, rotated_dim(dim), dtype=torch.float64)
    padded[..., :dim] = exact - means
    rows = padded @ rotation(dim)
    norms = rows.square().mean(-1, keepdim=True).sqrt()
    unit = torch.where(norms > 0, rows / norms, 0)
    codes, numbers = exact_codes(codec, unit)
    # What lies at the border of two codes may fall to either side: 1 in 10,000.
    ours = bits.unpack(sections["codes"], ROTATED_BITS[codec])[0]
    wrong = (ours != codes).sum()
    assert wrong <= max(1, ours.numel() // 10_000)
    gains = norms * (unit * numbers).sum(-1, True) / numbers.square().sum(-1, True)
    gains = torch.where(norms > 0, gains, 0)
    stored = sections["gains"][0].double().unsqueeze(-1)
    torch.testing.assert_close(stored, gains, rtol=2e-3, atol=1e-7)
    _, ours_numbers = exact_codes(codec, (ours.double() - codes) * ROTATED_STEPS[codec] + numbers)
    expected = ((ours_numbers * stored) @ rotation(dim).T)[..., :dim] + means
    decoded = decode(codec, dim, sections)
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
def test_the_gain_is_the_best_or_the_unbiased_one(codec: Codec) -> None:
    """The error of least squares is at right angles to the row, of the other to the original."""
    plane = data.gaussian(200, 2, 128, 3, dtype=torch.float32)
    best, _ = encode(codec, plane, "value")
    unbiased, _ = encode(codec, plane, "value", unbiased=True)
    assert torch.equal(best["codes"], unbiased["codes"])
    for sections, reference in ((best, decode(codec, 128, best)), (unbiased, plane)):
        error = decode(codec, 128, sections) - plane
        share = (error * reference).sum(-1) / reference.square().sum(-1)
        assert share.abs().max() < 1e-3
    errors = [data.relative_error(decode(codec, 128, each), plane) for each in (best, unbiased)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("codec", CODECS)
def test_rows_of_zeros_and_equal_tokens_come_back(codec: Codec) -> None:
    plane = torch.zeros(5, 1, 40, dtype=torch.bfloat16)
    sections, fits = encode(codec, plane, "value")
    assert fits
    assert not decode(codec, 40, sections).any()
    equal = data.gaussian(1, 2, 40, 1).expand(300, 2, 40)
    sections, fits = encode(codec, equal, "key")
    assert fits
    torch.testing.assert_close(decode(codec, 40, sections), equal.float(), rtol=1e-6, atol=1e-7)


# A row among ones: whether keys fit, whether values do.
ROWS = {
    "small": ([2.0**-13, 0.0], True),
    "too small": ([2.0**-14, 0.0], False),
    "subnormal": ([2.0**-130, 0.0], False),
    "large": ([30000.0, -30000.0], True),
    "huge": ([1e30, 1.0], False),
    "the largest": ([3.3e38, 3.3e38], False),
    "infinity": ([float("inf"), 0.0], False),
    "both infinities": ([float("inf"), -float("inf")], False),
    "not a number": ([float("nan"), 0.0], False),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("side", ["key", "value"])
def test_a_plane_fits_or_says_that_it_does_not(name: str, side: Side) -> None:
    row, expected = ROWS[name]
    plane = torch.ones(4, 1, 2)
    plane[2, 0] = torch.tensor(row)
    for codec in CODECS:
        sections, fits = encode(codec, plane, side)
        assert fits == expected, codec
        if expected:
            assert decode(codec, 2, sections).isfinite().all()
