"""``i4``: asymmetric, two codes a byte; keys per channel and 32 tokens, values per 32 channels.

The smaller groups cost half a bit per number and side, and earn it: at four bits the range of a
group is what decides the error.
"""

from typing import Final

import torch
from torch import Tensor

from respkv.kernels import bits, interval
from respkv.kernels.layout import GROUP_DIM_I4, GROUP_TOKENS_I4, Side

LEVELS: Final = 15
# Of each side: the axis that is grouped and the size of a group.
GROUPS: Final[dict[Side, tuple[int, int]]] = {
    "key": (1, GROUP_TOKENS_I4),
    "value": (3, GROUP_DIM_I4),
}


def encode(planes: Tensor, *, side: Side, lows: Tensor, steps: Tensor, codes: Tensor) -> Tensor:
    """Encode planes; the last group may be shorter.

    planes:      [N, T, H, D] bfloat16, float16 or float32, any strides.
    lows, steps: float16, written; of keys [N, G, H, D], G groups of 32 tokens, of values
                 [N, T, H, G], G groups of 32 channels.
    codes:       [N, T, H, ceil(D / 2)] uint8, written; even channels in the low halves, and zero
                 in the last high half when D is odd.
    Returns:     [N] bool, which planes fit; see ``interval.parameters``.
    Error:       |x - (low + code * step)| <= 0.51 step + |low| / 2048 + 2 ** -20 per element.
    Source:      Liu et al., KIVI, ICML 2024, arXiv:2402.02750.
    """
    axis, size = GROUPS[side]
    numbers = planes.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    fits = torch.ones(planes.shape[0], dtype=torch.bool, device=planes.device)
    lows, steps = lows.movedim(axis, 0), steps.movedim(axis, 0)  # [G, ...]
    for group, where in interval.groups(numbers, axis, size):
        low, high = group.amin(axis + 1), group.amax(axis + 1)
        low16, step16, good = interval.parameters(low, high, LEVELS)
        lows[where], steps[where] = low16.movedim(axis, 0), step16.movedim(axis, 0)
        fits &= good.flatten(1).all(1)
        interval.quantize(group, low16.unsqueeze(axis + 1), step16.unsqueeze(axis + 1), LEVELS)
    dim = planes.shape[-1]
    if dim % 2:
        whole = torch.zeros((*planes.shape[:-1], dim + 1), dtype=torch.int8, device=planes.device)
        whole[..., :dim] = numbers
    else:
        whole = numbers.to(torch.int8)
    bits.pack(whole, 4, codes)
    return fits


def decode(dim: int, *, side: Side, lows: Tensor, steps: Tensor, codes: Tensor) -> Tensor:
    """Decode planes. Returns [N, T, H, dim] float32: low + code * step."""
    axis, size = GROUPS[side]
    numbers = bits.unpack(codes, 4)[..., :dim].float()
    lows, steps = lows.movedim(axis, 0), steps.movedim(axis, 0)
    for group, where in interval.groups(numbers, axis, size):
        low16, step16 = lows[where].movedim(0, axis), steps[where].movedim(0, axis)
        interval.dequantize(group, low16.unsqueeze(axis + 1), step16.unsqueeze(axis + 1))
    return numbers
