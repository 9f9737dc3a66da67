"""The arithmetic of kernels/interval.py in Triton: the asymmetric quantizer, and codes in pairs.

Two codes of four bits are packed by splitting what was loaded contiguously: loads of every other
number would be two bytes wide.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from respkv.kernels.rounding_triton import code_of


@triton.jit
def ordered(x):
    """Map float32 to int32 in the same order, -0 before +0, NaN outermost; its own inverse."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def parameters(low, high, LEVELS: tl.constexpr):
    """Return low ends and steps as float16, and for ``is_unfit`` what is large and small of groups.

    low, high: ends of groups, ``ordered``. A group that is all zeros is never in the way.
    """
    lo = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True) + 0.0
    hi = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    step = (hi - lo) * (1 / LEVELS)
    half = step.to(tl.float16)
    # Bits of magnitudes have their order, and those of NaN and infinity are the greatest.
    size = lo.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    large = tl.maximum(size, step.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    # Numbers from 2^-8 on count as steps of 2^-18, equal ones as they are; zero becomes the greatest.
    most = tl.maximum(tl.abs(lo), tl.abs(hi))
    least = tl.maximum(tl.maximum(half.to(tl.float32), most * 0.0009765625), 1e-30)
    small = tl.where(hi == lo, most, least).to(tl.uint32, bitcast=True) - 1
    return lo.to(tl.float16), tl.where(half == 0.0, 1.0, half).to(tl.float16), large, small


@triton.jit
def is_unfit(large, small):
    """Tell whether a group does not fit, of the greatest and the least of what came of the groups.

    From 65520 on a number rounds to an infinity of fp16; steps are good from 2^-18 on.
    """
    return (large >= 0x477FF000) | (small < 0x367FFFFF)


@triton.jit
def quantize(x, m, s, LEVELS: tl.constexpr):
    """Return codes, uint8, of numbers; their low ends and inverse steps are float32."""
    y = (x - m) * s
    return code_of(tl.minimum(tl.maximum(y, 0.0), LEVELS * 1.0))


@triton.jit
def pack_pairs(codes, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pack [ROWS, WIDTH] codes of four bits: even ones in the low halves of [ROWS, WIDTH / 2]."""
    even, odd = tl.split(tl.reshape(codes, (ROWS, WIDTH // 2, 2)))
    return even | (odd << 4)


@triton.jit
def unpack_pairs(packed, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Undo ``pack_pairs``."""
    return tl.reshape(tl.join(packed & 15, packed >> 4), (ROWS, WIDTH))
