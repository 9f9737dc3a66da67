"""Codes of 8 bits as operands of attention: int8, or e4m3, with a float32 scale per token and head.

Codes become float16, which holds them exactly. Scales never touch them. Those of keys multiply the
scores. Those of values, m * 2^e, go into the weights, e as a shift of the exponent,

    weight * scale = exp2(score + e) * m,

so that what meets the codes in the matrix product is below 2 whatever the scales are, and float16
holds it. The denominator takes the shift out again. Queries meet codes in float16 as well, divided
by a power of two for each row, which is exact, so that none overflows.

Matrix instructions want two neighbours in a register, of V two tokens, and shared memory transposes
units of 16 bits only; of bytes every one would be loaded by itself. So decoding reads words of two
codes and takes them apart in registers: two products of half the width, of the channels of even and
of odd index. On sm_90 that is 0.7 of the instructions per tile, and none of the slow conversions.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
import triton
import triton.language as tl

from respkv.kernels import launch

INT8 = tl.constexpr(1)
E4M3 = tl.constexpr(2)


def code_constants(codes: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the constants that say what codes are and how this device reads them."""
    is_e4m3 = codes == torch.float8_e4m3fn
    has_e4m3 = not launch.INTERPRETED and torch.cuda.get_device_capability(device) >= (8, 9)
    return {"KIND": (E4M3 if is_e4m3 else INT8).value, "HAS_E4M3": has_e4m3}


@triton.jit
def from_byte(code, KIND: tl.constexpr, HAS_E4M3: tl.constexpr):
    """Return codes, uint8, as float16.

    int8: offset by 128 and put under the exponent of 1024, where a unit is 1. The conversion
    instruction would be 8 times slower. e4m3 without an instruction for it: its bits, moved to where
    float16 has them, are those of x / 256, subnormal ones included.
    """
    if KIND == INT8:
        return ((code ^ 0x80).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    elif HAS_E4M3:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        wide = code.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def from_word(word, KIND: tl.constexpr, HAS_E4M3: tl.constexpr):
    """Return the low and the high codes of words, uint16, as float16; see ``from_byte``."""
    if KIND == INT8:
        offset = word ^ 0x8080
        low = ((offset & 0xFF) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
        return low, ((offset >> 8) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    elif HAS_E4M3:
        low = from_byte((word & 0xFF).to(tl.uint8), KIND, HAS_E4M3)
        return low, from_byte((word >> 8).to(tl.uint8), KIND, HAS_E4M3)
    else:
        low = (((word & 0x80) << 8) | ((word & 0x7F) << 7)).to(tl.float16, bitcast=True)
        high = ((word & 0x8000) | ((word & 0x7F00) >> 1)).to(tl.float16, bitcast=True)
        return low * 256.0, high * 256.0


@triton.jit
def split_scale(scale):
    """Return e, m and 2^-e of scales m * 2^e; m is in [1, 2)."""
    bits = scale.to(tl.int32, bitcast=True)
    exponent = bits & 0x7F800000
    # The exponent's 8 bits under that of 2^23, where a unit is 1, are a float without a conversion.
    power = ((exponent >> 23) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + 127.0)
    mantissa = (bits - exponent + 0x3F800000).to(tl.float32, bitcast=True)
    return power, mantissa, (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def split_rows(rows, INTERPRETED: tl.constexpr):
    """Return rows of queries as float16 below 2 in size, and the power of two taken out of each."""
    wide = rows.to(tl.float32)
    most = tl.max(tl.abs(wide), 1)
    bits = most.to(tl.int32, bitcast=True)  # pyright: ignore[reportAttributeAccessIssue]
    exponent = tl.maximum(bits & 0x7F800000, 0x00800000)  # the least, of a row of zeros
    scaled = wide * (0x7F000000 - exponent).to(tl.float32, bitcast=True)[:, None]
    power = exponent.to(tl.float32, bitcast=True)
    return (scaled if INTERPRETED else scaled.to(tl.float16)), power
