"""Codes of 2, 3 or 4 bits, packed: each code in the lowest bits that are still free.

Codes come and go as bytes. Eight bytes, or four, or two are taken as one integer and folded: each
step halves the gaps between the codes, so it is a shift, an or and a mask over everything.
"""

from typing import Final

import torch
from torch import Tensor

# Of a width: codes in a word, the word's dtype and the steps of folding as (shift, mask).
_FOLDS: Final[dict[int, tuple[int, torch.dtype, tuple[tuple[int, int], ...]]]] = {
    2: (4, torch.int32, ((6, 0x000F000F), (12, 0xFF))),
    3: (8, torch.int64, ((5, 0x003F_003F_003F_003F), (10, 0xFFF_0000_0FFF), (20, 0xFF_FFFF))),
    4: (2, torch.int16, ((4, 0xFF),)),
}
_UNFOLDS: Final[dict[int, tuple[tuple[int, int], ...]]] = {
    2: ((12, 0x000F000F), (6, 0x03030303)),
    3: ((20, 0xFFF_0000_0FFF), (10, 0x003F_003F_003F_003F), (5, 0x0707_0707_0707_0707)),
    4: ((4, 0x0F0F),),
}


def pack(codes: Tensor, bits: int, out: Tensor) -> None:
    """Pack codes along the last axis.

    codes: [..., W] uint8 or int8 below 2 ** bits, contiguous; W a multiple of the codes in a word.
    out:   [..., W * bits / 8] uint8, any strides.
    """
    _, dtype, steps = _FOLDS[bits]
    words = codes.view(dtype)
    for shift, mask in steps:
        words = (words >> shift).bitwise_or_(words).bitwise_and_(mask)
    if bits == 3:
        out.copy_(torch.unflatten(words.view(torch.uint8), -1, (-1, 8))[..., :3].flatten(-2))
    else:
        out.copy_(words)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpack codes along the last axis.

    packed:  [..., W * bits / 8] uint8, any strides.
    Returns: [..., W] uint8, contiguous.
    """
    _, dtype, _ = _FOLDS[bits]
    if bits == 3:
        octets = packed.new_zeros((*packed.shape[:-1], packed.shape[-1] // 3, 8))
        octets[..., :3] = torch.unflatten(packed, -1, (-1, 3))
        words = octets.flatten(-2).view(dtype)
    else:
        words = packed.to(dtype, memory_format=torch.contiguous_format)
    for shift, mask in _UNFOLDS[bits]:
        words = (words << shift).bitwise_or_(words).bitwise_and_(mask)
    return words.view(torch.uint8)
