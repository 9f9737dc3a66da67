"""Seeded planes for the tests of kernels: what keys and values of a model look like, and worse.

``keys`` are keys after RoPE with a few outlier channels in its slow pairs, as large models have
them: such a channel hardly turns, so its offset stays. ``values`` have heavy tails and a scale of
their own for each token. Both, and ``gaussian``, come as [T, H, D] and are rounded to bfloat16
unless another dtype is asked for.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

ROPE_BASE: Final = 10000.0
OUTLIER_CHANNELS: Final = (50, 55, 60, 63, 114, 119, 127)  # of 128
Generate = Callable[..., Tensor]


def gaussian(
    tokens: int, heads: int, dim: int, seed: int, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return [T, H, D] independent N(0, 1)."""
    return torch.randn(tokens, heads, dim, generator=seeded(seed)).to(dtype)


def keys(
    tokens: int, heads: int, dim: int, seed: int, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return [T, H, D] keys after RoPE; the heads differ in scale, offset and signs of outliers."""
    generator = seeded(seed)
    sigma = (0.3 * torch.randn(heads, dim, generator=generator)).exp()
    mu = 0.5 * torch.randn(heads, dim, generator=generator)
    for channel in sorted({channel * dim // 128 for channel in OUTLIER_CHANNELS}):
        sign = torch.randint(0, 2, (heads,), generator=generator) * 2 - 1
        mu[:, channel] += sign * (8 + 8 * torch.rand(heads, generator=generator))
        sigma[:, channel] *= 2
    plain = mu + sigma * torch.randn(tokens, heads, dim, generator=generator)
    return rope(plain).to(dtype)


def values(
    tokens: int, heads: int, dim: int, seed: int, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return [T, H, D] of Student-t with 6 degrees of freedom times a lognormal scale per token."""
    generator = seeded(seed)
    normal = torch.randn(tokens, heads, dim, generator=generator)
    chi2 = torch.zeros(tokens, heads, dim)
    for _ in range(6):
        chi2 += torch.randn(tokens, heads, dim, generator=generator).square_()
    scale = (0.4 * torch.randn(tokens, heads, 1, generator=generator)).exp()
    return normal.div_((chi2 / 6).sqrt_()).mul_(scale).to(dtype)


GENERATORS: Final[dict[str, Generate]] = {"gaussian": gaussian, "keys": keys, "values": values}


def rope(plain: Tensor) -> Tensor:
    """Return [T, H, D] with channel i turned with channel i + D // 2; a last odd one stays."""
    tokens, _, dim = plain.shape
    half = dim // 2
    turned = plain.clone()
    angles = torch.outer(
        torch.arange(tokens, dtype=torch.float64),
        ROPE_BASE ** (-torch.arange(half, dtype=torch.float64) / max(half, 1)),
    )
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]  # [T, 1, D / 2]
    first, second = plain[..., :half], plain[..., half : 2 * half]
    turned[..., :half] = first * cos - second * sin
    turned[..., half : 2 * half] = second * cos + first * sin
    return turned


def every_pattern(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return [512, 1, 128]: each 16-bit word once, so every NaN, infinity, zero and subnormal."""
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return words.view(dtype).reshape(512, 1, 128)


def random_words(
    tokens: int, heads: int, dim: int, seed: int, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return [T, H, D] of random 16-bit words: nothing makes them smaller."""
    shape = (tokens, heads, dim)
    words = torch.randint(-(1 << 15), 1 << 15, shape, generator=seeded(seed), dtype=torch.int16)
    return words.view(dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    """Return memory that shows what was not written: NaN, or 0xFF where there is no NaN."""
    if dtype.is_floating_point:
        return torch.full(shape, torch.nan, dtype=dtype)
    return torch.full(shape, 255 if dtype == torch.uint8 else -1, dtype=dtype)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Return |ours - exact| / |exact|, both norms L2 over everything."""
    exact64 = exact.double()
    return float((ours.double() - exact64).norm() / exact64.norm())


def seeded(seed: int) -> torch.Generator:
    """Return a generator of its own for this seed."""
    return torch.Generator().manual_seed(seed)
