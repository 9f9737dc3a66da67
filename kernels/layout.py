"""How each codec lays out a plane: sections, their sizes and where they start.

A plane is K or V of one layer of a page, ``[T, H, D]``. The torch references, the Triton kernels
and whoever reads stored bytes agree through this file alone. Every section starts at a multiple of
``ALIGN_BYTES`` and a plane's size is a multiple of it, so that kernels load whole vectors. All
sizes but those of ``xs`` are known before anything is encoded; for ``xs`` there is a bound.

Sections, in order (numbers are little-endian; G groups of tokens, R = T * H rows):

* raw: the plane as it is.
* xs:  ``info`` 16 bytes (base, width, 2 zero bytes, u32 escapes, 8 zero bytes); ``starts`` u32 per
       block of ``XS_BLOCK`` elements: escapes before it; ``codes`` 3 or 4 bits each, 8 codes in
       little-endian bit order to 3 or 4 bytes; ``rest`` sign and mantissa, a byte each;
       ``escapes`` an exponent, a byte, for each code of all ones, in order. The last section is
       padded to ALIGN_BYTES.
* f8:  ``scales`` f32 [T, H]; ``codes`` e4m3 [T, H, D].
* i8:  of keys ``lows`` f16 [G, H, D] and ``steps`` f16 [G, H, D], groups of 64 tokens, ``codes``
       u8 [T, H, D]; of values ``steps`` f16 [T, H], ``codes`` i8 [T, H, D].
* i4:  ``lows`` f16, ``steps`` f16, of keys [G, H, D] in groups of 32 tokens, of values
       [T, H, ceil(D / 32)]; ``codes`` [T, H, ceil(D / 2)], the element of even index in the low half
       of its byte.
* rh4, rh3, rh2: ``means`` f16 [G, H, D], of keys only, groups of 256 tokens; ``gains`` f16 [T, H];
       ``codes`` [T, H, W * bits / 8], W = ``rotated_dim(D)``; 4 bits: 2 codes a byte, the even one
       low; 3 bits: 8 codes to 3 bytes, code i in the bits from 3 i on; 2 bits: 4 codes a byte,
       the first one lowest.
* rhz4, rhz3, rhz2: as rh4, codes of the mid-tread quantizer, 0 to 14. In files the codes go through
       zstd, which kernels/entropy.py does; here they are as a device has them.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final, Literal, NamedTuple

ALIGN_BYTES: Final = 16
XS_BLOCK: Final = 4096  # elements
XS_INFO_BYTES: Final = 16
GROUP_TOKENS_I8: Final = 64
GROUP_TOKENS_I4: Final = 32
GROUP_DIM_I4: Final = 32
GROUP_TOKENS_MEAN: Final = 256
ROTATED_MULTIPLE: Final = 16
HADAMARD_MAX: Final = 256

Side = Literal["key", "value"]


class Codec(IntEnum):
    """How a plane is stored. A number keeps its meaning for ever: it is in files."""

    RAW = 0
    XS = 1
    F8 = 2
    I8 = 3
    I4 = 4
    RH4 = 5
    RH3 = 6
    RH2 = 7
    RHZ4 = 8
    RHZ3 = 9
    RHZ2 = 10

    @property
    def is_lossless(self) -> bool:
        """Whether decoding gives back every bit."""
        return self <= Codec.XS

    @property
    def is_rotated(self) -> bool:
        """Whether rows go through the Hadamard rotation."""
        return self >= Codec.RH4

    @property
    def is_entropy_coded(self) -> bool:
        """Whether the codes go through zstd in files."""
        return self >= Codec.RHZ4


CODEC_NAMES: Final = {codec.name.lower(): codec for codec in Codec}
# Width of a code, levels and step of the uniform quantizer of unit-variance rows.
ROTATED_BITS: Final = {
    Codec.RH4: 4,
    Codec.RH3: 3,
    Codec.RH2: 2,
    Codec.RHZ4: 4,
    Codec.RHZ3: 4,
    Codec.RHZ2: 4,
}
ROTATED_STEPS: Final = {
    Codec.RH4: 0.335,
    Codec.RH3: 0.586,
    Codec.RH2: 0.996,
    Codec.RHZ4: 0.55,
    Codec.RHZ3: 0.7,
    Codec.RHZ2: 1.0,
}


class Section(NamedTuple):
    """A part of a plane: bytes from ``offset`` on."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """The sections of a plane and its size, padding included."""

    sections: tuple[Section, ...]
    nbytes: int

    def __getitem__(self, name: str) -> Section:
        """Return the section of this name. Raises KeyError."""
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(name)


@lru_cache(maxsize=1024)
def plane_layout(
    codec: Codec, side: Side, tokens: int, heads: int, dim: int, element_bytes: int
) -> PlaneLayout:
    """Return where the sections of a plane are.

    element_bytes: of the numbers of the page. For ``XS``, whose size depends on what is in the
    plane, this is the layout of width 4 in which nothing escapes; see ``xs_layout``.
    """
    rows, numbers = tokens * heads, tokens * heads * dim
    if codec == Codec.RAW:
        return _lay(("plane", numbers * element_bytes))
    if codec == Codec.XS:
        return xs_layout(numbers, width=4, num_escapes=0)
    if codec == Codec.F8:
        return _lay(("scales", 4 * rows), ("codes", numbers))
    if codec == Codec.I8 and side == "value":
        return _lay(("steps", 2 * rows), ("codes", numbers))
    if codec == Codec.I8:
        params = 2 * num_groups(tokens, GROUP_TOKENS_I8) * heads * dim
        return _lay(("lows", params), ("steps", params), ("codes", numbers))
    if codec == Codec.I4:
        params = 2 * rows * num_groups(dim, GROUP_DIM_I4)
        if side == "key":
            params = 2 * num_groups(tokens, GROUP_TOKENS_I4) * heads * dim
        return _lay(("lows", params), ("steps", params), ("codes", rows * num_groups(dim, 2)))
    codes = rows * rotated_dim(dim) * ROTATED_BITS[codec] // 8
    means = 2 * num_groups(tokens, GROUP_TOKENS_MEAN) * heads * dim if side == "key" else 0
    return _lay(("means", means), ("gains", 2 * rows), ("codes", codes))


def xs_layout(numbers: int, *, width: int, num_escapes: int) -> PlaneLayout:
    """Return the layout of an ``xs`` plane of so many 16-bit numbers."""
    return _lay(
        ("info", XS_INFO_BYTES),
        ("starts", 4 * num_groups(numbers, XS_BLOCK)),
        ("codes", num_groups(numbers, 8) * width),
        ("rest", numbers),
        ("escapes", num_escapes),
    )


def num_groups(count: int, size: int) -> int:
    """Return how many groups of ``size`` hold ``count``, the last one perhaps not full."""
    return -(-count // size)


def rotated_dim(dim: int) -> int:
    """Return the width of a row as it is rotated: D, padded to a multiple of 16."""
    return num_groups(dim, ROTATED_MULTIPLE) * ROTATED_MULTIPLE


def hadamard_dim(dim: int) -> int:
    """Return the width of the blocks in which a row is rotated: the largest power of two that fits."""
    width = rotated_dim(dim)
    return min(width & -width, HADAMARD_MAX)


def _lay(*parts: tuple[str, int]) -> PlaneLayout:
    sections: list[Section] = []
    at = 0
    for name, nbytes in parts:
        sections.append(Section(name, at, nbytes))
        at += num_groups(nbytes, ALIGN_BYTES) * ALIGN_BYTES
    return PlaneLayout(tuple(sections), at)
