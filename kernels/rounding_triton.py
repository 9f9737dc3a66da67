"""Rounding that is the same on a GPU, in Triton's interpreter and in torch.

The interpreter truncates when it casts to bf16 and to e4m3, so those casts are made of integer
arithmetic there. Where a GPU has an instruction that rounds half to even, that one is used.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def round_even(x):
    """Round float32 of at most 2^22 in size to integers, half to even.

    At 1.5 * 2^23 float32 holds integers only: the addition rounds.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def code_of(x):
    """Round as ``round_even`` and return the lowest 8 bits of the integer, as uint8.

    They are the lowest of the sum's mantissa; a cast would run at a quarter of the speed.
    """
    return ((x + 12582912.0).to(tl.uint32, bitcast=True) & 0xFF).to(tl.uint8)


@triton.jit
def number_of(code):
    """Return uint8 as float32, by putting them where 2^23 has the lowest bits of its mantissa."""
    return (code.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def reciprocal(x):
    """Return 1 / x of float32, correctly rounded: the one division that a group of codes costs."""
    return tl.math.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def is_finite(x):
    """Tell which float32 are neither infinite nor NaN."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def to_element(x, ELEMENT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Convert float32 to the type of a page's numbers, half to even; float16 saturates."""
    if tl.float16 == ELEMENT:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    if INTERPRETED and tl.bfloat16 == ELEMENT:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return rounded.to(tl.bfloat16, bitcast=True)
    else:
        return x.to(ELEMENT)


@triton.jit
def to_e4m3(y):
    """Convert float32 in [-448, 448] to the bits of e4m3, half to even.

    Normal numbers: add half of the 20 bits that go, less one if the last that stays is even, and
    move the exponent's bias from 127 to 7. Below 2^-6 the numbers are multiples of 2^-9, which is
    the distance of float32 numbers at 2^14: there the addition rounds.
    """
    bits = y.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3(code):
    """Convert the bits of e4m3, NaN excepted, to float32: exact.

    With the exponent's bits in place only its bias is wrong, by 120; subnormal numbers as well.
    """
    wide = code.to(tl.uint32)
    shifted = ((wide & 0x7F) << 20) | ((wide & 0x80) << 24)
    return shifted.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
