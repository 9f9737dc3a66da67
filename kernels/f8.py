"""``f8``: e4m3 floats, one scale per token and head.

The scale brings the greatest magnitude of a row to 448, the greatest e4m3. Numbers are clamped
before they are cast, since what a cast does beyond 448 differs between implementations.
"""

from typing import Final

import torch
from torch import Tensor

E4M3_MAX: Final = 448.0
# Beyond these the scale would be subnormal, or 448 times the scale infinite.
AMAX_MAX: Final = 2.0**127
SCALE_MIN: Final = 2.0**-126


def encode(planes: Tensor, *, scales: Tensor, codes: Tensor) -> Tensor:
    """Encode planes.

    planes:  [N, T, H, D] bfloat16, float16 or float32, any strides.
    scales:  [N, T, H] float32, written.
    codes:   [N, T, H, D] uint8, written: e4m3 bit patterns.
    Returns: [N] bool, which planes fit: finite, and no scale outside float32's normal numbers.
    Error:   |x - code * scale| <= max(|x| / 16, scale / 1024), element by element.
    Source:  Micikevicius et al., FP8 formats for deep learning, 2022, arXiv:2209.05433.
    """
    numbers = planes.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    amax = torch.maximum(numbers.amax(-1), -numbers.amin(-1))
    scale = amax * (1 / E4M3_MAX)
    fits = (amax == 0) | ((scale >= SCALE_MIN) & (amax <= AMAX_MAX))
    scale.masked_fill_(amax == 0, 1.0)
    numbers.mul_((1.0 / scale).unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX)
    codes.view(torch.float8_e4m3fn).copy_(numbers)
    scales.copy_(scale)
    return fits.flatten(1).all(1)


def decode(*, scales: Tensor, codes: Tensor) -> Tensor:
    """Decode planes. Returns [N, T, H, D] float32: code times scale."""
    # An e4m3 pattern, moved to where fp16 has its exponent and mantissa, is the number / 256.
    wide = codes.view(torch.int8).to(torch.int16)
    halves = ((wide << 7) & 0x3F80).bitwise_or_(wide & -0x8000)
    return halves.view(torch.float16).float().mul_(256.0).mul_(scales.unsqueeze(-1))
