"""``rh4``, ``rh3``, ``rh2`` and ``rhz*``: rows rotated, then quantized uniformly to few bits.

After a random rotation a row looks like Gaussian noise of one variance whatever it was before, so
one step fits all channels and a row needs one number of its own. Of keys the mean over 256 tokens
is taken off first: it carries most of what outlier channels hold, and an offset that all keys share
moves all logits of a query alike.

The gain of a row is the one of least squares: it makes the error as small as the codes allow, and
shrinks the row a little. ``unbiased`` asks for the gain whose row has the right projection on the
original, which at two bits keeps products with queries from shrinking.

Levels that follow the Gaussian (Lloyd and Max) were left: 10 % less error at 4 bits, 1 % at 2, for
a search in a table per number, and more bits once the codes go through an entropy coder.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from respkv.kernels import bits, interval
from respkv.kernels.hadamard import butterfly, signs, tree_sum
from respkv.kernels.layout import (
    GROUP_TOKENS_MEAN,
    ROTATED_BITS,
    ROTATED_STEPS,
    Codec,
    hadamard_dim,
    rotated_dim,
)

# Below it fp16 is too coarse for the gain of a row.
ROW_MAX_MIN: Final = 2.0**-13
RHZ_CODE_MAX: Final = 14


class Quantizer(NamedTuple):
    """Numbers of variance 1 to codes: number / step, shifted, and rounded down or to the nearest.

    Codes are 0 to ``code_max``; code k stands for (k - ``zero``) * ``step``.
    """

    step: float
    code_max: int
    zero: float
    is_rounding: bool

    def codes(self, numbers: Tensor, out: Tensor) -> Tensor:
        """Return codes as float32, in the memory of ``out``; [...] float32 in, not written."""
        steps = torch.mul(numbers, 1 / self.step, out=out)
        if self.is_rounding:
            return steps.round_().add_(self.zero).clamp_(0, self.code_max)
        return steps.floor_().add_(self.zero + 0.5).clamp_(0, self.code_max)

    def numbers(self, codes: Tensor) -> Tensor:
        """Return what codes, float32, stand for; they are overwritten."""
        return codes.sub_(self.zero).mul_(self.step)


def quantizer(codec: Codec) -> Quantizer:
    """Return the mid-rise quantizer of an ``rh``, or the mid-tread one of an ``rhz``."""
    step = ROTATED_STEPS[codec]
    if codec.is_entropy_coded:
        return Quantizer(step, RHZ_CODE_MAX, RHZ_CODE_MAX / 2, is_rounding=True)
    levels = 1 << ROTATED_BITS[codec]
    return Quantizer(step, levels - 1, levels / 2 - 0.5, is_rounding=False)


def encode(
    codec: Codec,
    planes: Tensor,
    *,
    means: Tensor | None,
    gains: Tensor,
    codes: Tensor,
    unbiased: bool = False,
) -> Tensor:
    """Encode planes.

    planes:  [N, T, H, D] bfloat16, float16 or float32, any strides.
    means:   of keys [N, G, H, D] float16, G groups of 256 tokens, written; None for values.
    gains:   [N, T, H] float16, written.
    codes:   [N, T, H, W * bits / 8] uint8, written; W = ``rotated_dim(D)``.
    Returns: [N] bool, which planes fit: finite, means and gains within fp16, and no row of numbers
             so small that its gain would be coarse.
    Error:   relative L2 of N(0, 1), D = 128: .105, .191, .341 for rh4, rh3, rh2; .156, .197, .276
             for rhz4, rhz3, rhz2.
    Source:  Zandieh et al., TurboQuant, 2025, arXiv:2504.19874; mean and gain are our own.
    """
    num_planes, tokens, heads, dim = planes.shape
    numbers = planes.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    amax = torch.maximum(numbers.amax(-1), -numbers.amin(-1))
    fits = ((amax == 0) | (amax >= ROW_MAX_MIN)) & amax.isfinite()
    good = fits.flatten(1).all(1)
    if means is not None:
        good &= _take_means(numbers, means)
    rows = numbers.new_zeros((rotated_dim(dim), num_planes * tokens * heads))
    rows[:dim] = numbers.view(-1, dim).t()
    del numbers  # the rotation wants as much memory
    rows = rotate(rows.mul_(_signs_of(rows)), dim)
    gain, levels = _quantize_rows(rows, quantizer(codec), unbiased=unbiased)
    gains.copy_(gain.view(num_planes, tokens, heads))
    by_row = levels.t().contiguous()  # [R, W]
    bits.pack(by_row.view(num_planes, tokens, heads, -1), ROTATED_BITS[codec], codes)
    return good & gains.isfinite().flatten(1).all(1)


def decode(codec: Codec, dim: int, *, means: Tensor | None, gains: Tensor, codes: Tensor) -> Tensor:
    """Decode planes. Returns [N, T, H, dim] float32."""
    levels = bits.unpack(codes, ROTATED_BITS[codec]).flatten(0, 2)  # [R, W]
    rows = quantizer(codec).numbers(
        levels.t().to(torch.float32, memory_format=torch.contiguous_format)
    )
    rows = rotate(rows.mul_(gains.float().flatten()), dim)
    rows.mul_(_signs_of(rows))
    numbers = rows[:dim].t().contiguous().view(*gains.shape, dim)
    if means is not None:
        for group, where in interval.groups(numbers, 1, GROUP_TOKENS_MEAN):
            group.add_(means[:, where].float().unsqueeze(2))
    return numbers


def rotate(rows: Tensor, dim: int) -> Tensor:
    """Multiply rows by the orthogonal Hadamard matrix.

    rows:    [W, R] float32, one row of dim D padded to W per column; overwritten.
    Returns: [W, R]
    """
    width = hadamard_dim(dim)
    return butterfly(rows, width).mul_(width**-0.5)


def _signs_of(rows: Tensor) -> Tensor:
    return signs(rows.shape[0]).to(rows.device).unsqueeze(1)


def _take_means(numbers: Tensor, means: Tensor) -> Tensor:
    good = torch.ones(numbers.shape[0], dtype=torch.bool, device=numbers.device)
    for group, where in interval.groups(numbers, 1, GROUP_TOKENS_MEAN):
        # The zero added makes sums of negative zeros positive, as padding a group would.
        mean = ((tree_sum(group.movedim(2, 0)) + 0.0) / group.shape[2]).half()
        means[:, where] = mean
        good &= mean.isfinite().flatten(1).all(1)
        group.sub_(mean.float().unsqueeze(2))
    return good


def _quantize_rows(rows: Tensor, how: Quantizer, *, unbiased: bool) -> tuple[Tensor, Tensor]:
    # Returns gains [R] float16 and codes [W, R] int8; rows are overwritten. New memory is the
    # larger part of the time here, so what is done with is written over.
    spare = rows * rows
    # Some libraries' float32 square root is a bit off now and then; through float64 it is exact.
    norm = (tree_sum(spare) / rows.shape[0]).double().sqrt_().float()
    unit = rows.mul_((1.0 / norm).masked_fill_(norm == 0, 0.0))
    steps = how.codes(unit, out=spare)
    codes = steps.to(torch.int8)
    found = how.numbers(steps)
    if unbiased:
        top = tree_sum(unit * unit)
        bottom = tree_sum(unit.mul_(found))
    else:
        top = tree_sum(unit.mul_(found))
        bottom = tree_sum(found.mul_(found))
    # Where the norm is infinite this must not be finite: it is how the plane is known not to fit.
    gain = (norm * top / bottom).masked_fill_(norm == 0, 0.0)
    return gain.half(), codes
