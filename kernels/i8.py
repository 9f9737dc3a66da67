"""``i8``: keys per channel and 64 tokens, asymmetric; values per token and head, symmetric.

Keys have channels with an offset of their own, and values have tokens with a scale of their own;
each is grouped along what its numbers have in common.
"""

from typing import Final

import torch
from torch import Tensor

from respkv.kernels import interval
from respkv.kernels.layout import GROUP_TOKENS_I8

LEVELS: Final = 255
VALUE_MAX: Final = 127


def encode_keys(planes: Tensor, *, lows: Tensor, steps: Tensor, codes: Tensor) -> Tensor:
    """Encode keys; the last group of tokens may be shorter.

    planes:      [N, T, H, D] bfloat16, float16 or float32, any strides.
    lows, steps: [N, G, H, D] float16, G groups of 64 tokens, written.
    codes:       [N, T, H, D] uint8, written.
    Returns:     [N] bool, which planes fit; see ``interval.parameters``.
    Error:       |x - (low + code * step)| <= 0.57 step + |low| / 2048 + 2 ** -16 per element.
    Source:      Liu et al., KIVI, ICML 2024, arXiv:2402.02750 (keys per channel; here 8 bit).
    """
    numbers = planes.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    fits = torch.ones(planes.shape[0], dtype=torch.bool, device=planes.device)
    for group, where in interval.groups(numbers, 1, GROUP_TOKENS_I8):
        low, high = group.amin(2), group.amax(2)
        lows[:, where], steps[:, where], good = interval.parameters(low, high, LEVELS)
        fits &= good.flatten(1).all(1)
        interval.quantize(group, lows[:, where].unsqueeze(2), steps[:, where].unsqueeze(2), LEVELS)
    # A cast to int8 is several times as fast as one to uint8.
    codes.view(torch.int8).copy_(numbers.sub_(128.0)).bitwise_xor_(-128)
    return fits


def decode_keys(*, lows: Tensor, steps: Tensor, codes: Tensor) -> Tensor:
    """Decode keys. Returns [N, T, H, D] float32: low + code * step."""
    numbers = codes.float()
    for group, where in interval.groups(numbers, 1, GROUP_TOKENS_I8):
        interval.dequantize(group, lows[:, where].unsqueeze(2), steps[:, where].unsqueeze(2))
    return numbers


def encode_values(planes: Tensor, *, steps: Tensor, codes: Tensor) -> Tensor:
    """Encode values.

    planes:  [N, T, H, D] bfloat16, float16 or float32, any strides.
    steps:   [N, T, H] float16, written.
    codes:   [N, T, H, D] uint8, written: int8 bit patterns of -127 to 127.
    Returns: [N] bool, which planes fit: steps finite, and at least 2 ** -18 or of a row of zeros.
    Error:   |x - code * step| <= 0.54 step + 2 ** -18, element by element.
    Source:  Liu et al., KIVI, ICML 2024, arXiv:2402.02750 (values per token; here symmetric, 8 bit).
    """
    numbers = planes.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    amax = torch.maximum(numbers.amax(-1), -numbers.amin(-1))
    step = (amax * (1 / VALUE_MAX)).half()
    fits = (amax == 0) | ((step >= interval.STEP_MIN) & step.isfinite())
    step.masked_fill_(step == 0, 1.0)
    inverses = (1.0 / step.float()).unsqueeze(-1)
    numbers.mul_(inverses).clamp_(-VALUE_MAX, VALUE_MAX).round_()
    codes.view(torch.int8).copy_(numbers)
    steps.copy_(step)
    return fits.flatten(1).all(1)


def decode_values(*, steps: Tensor, codes: Tensor) -> Tensor:
    """Decode values. Returns [N, T, H, D] float32: code * step."""
    return codes.view(torch.int8).float().mul_(steps.float().unsqueeze(-1))
