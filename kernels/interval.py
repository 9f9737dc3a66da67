"""The asymmetric quantizer: numbers of a group as steps from the lowest of them.

Low end and step of a group are stored as fp16, and codes are made from what was stored, so that a
decoder, which has nothing else, agrees. A group of equal numbers has no step: it is stored as 1,
with codes 0.

Numbers may be too large for fp16, or so small that it holds them too coarsely: such a group does
not fit. Small is meant with care. Two tokens that happen to be nearly equal in a channel, or a
channel that hardly moves, make a step below fp16's normal numbers, and their page must not be
refused for that. Steps are good down to 2 ** -18, where fp16 still has 8 bits; below that the error
is at most 2 ** -16, which does not matter where the numbers themselves are larger than 2 ** -8.

Source: Liu et al., KIVI, ICML 2024, arXiv:2402.02750, section 3.
"""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

# Down to here fp16 has 8 bits.
STEP_MIN: Final = 2.0**-18
# Numbers from here on do not mind the error of any smaller step.
NUMBER_MIN: Final = 2.0**-8


def parameters(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return low ends and steps as fp16, and which groups fit.

    low, high: the least and the greatest number of each group, any shape, float32.
    levels:    the greatest code.
    Returns:   lows and steps float16, fits bool, all of the shape of ``low``. A group fits when
               its low end and its step are finite, and its step is at least ``STEP_MIN``, or one
               of its numbers at least ``NUMBER_MIN``, or all are equal and 0 or ``STEP_MIN``.
    """
    # The sum makes zeros positive: which zero is the least one of +0 and -0 is not defined.
    lows = (low + 0.0).half()
    steps = ((high - low) * (1 / levels)).half()
    most = torch.maximum(low.abs(), high.abs())
    is_equal = (high == low) & ((low == 0) | (most >= STEP_MIN))
    fits = is_equal | (steps >= STEP_MIN) | (most >= NUMBER_MIN)
    fits &= lows.isfinite() & steps.isfinite()
    return lows, steps.masked_fill_(steps == 0, 1.0), fits


def quantize(numbers: Tensor, lows: Tensor, steps: Tensor, levels: int) -> Tensor:
    """Replace numbers by their codes, 0 to ``levels``, still float32.

    numbers:     float32, overwritten.
    lows, steps: fp16, of shapes that broadcast to it.
    """
    inverses = 1.0 / steps.float()
    return numbers.sub_(lows.float()).mul_(inverses).clamp_(0, levels).round_()


def dequantize(codes: Tensor, lows: Tensor, steps: Tensor) -> Tensor:
    """Replace codes, float32, by the numbers they stand for."""
    return codes.mul_(steps.float()).add_(lows.float())


def groups(numbers: Tensor, axis: int, size: int) -> Iterator[tuple[Tensor, slice]]:
    """Cut an axis into groups.

    Yields views with the axis as two, [groups, size], and which groups these are: first all full
    groups at once, then the last one if it is shorter.
    """
    count, rest = divmod(numbers.shape[axis], size)
    if count:
        full = numbers.narrow(axis, 0, count * size)
        yield torch.unflatten(full, axis, (count, size)), slice(0, count)
    if rest:
        tail = numbers.narrow(axis, count * size, rest)
        yield tail.unsqueeze(axis), slice(count, count + 1)
