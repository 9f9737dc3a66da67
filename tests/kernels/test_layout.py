"""The layout is what stored bytes mean, so sizes are checked against figures, not formulas."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respkv.kernels.layout import (
    ALIGN_BYTES,
    CODEC_NAMES,
    XS_BLOCK,
    Codec,
    Side,
    hadamard_dim,
    plane_layout,
    rotated_dim,
    xs_layout,
)

codecs = st.sampled_from(list(Codec))
sides: st.SearchStrategy[Side] = st.sampled_from(["key", "value"])
sizes = st.integers(0, 300)


@given(codecs, sides, sizes, st.integers(0, 9), st.integers(1, 300), st.sampled_from([2, 4]))
def test_sections_are_aligned_and_follow_each_other(
    codec: Codec, side: Side, tokens: int, heads: int, dim: int, element_bytes: int
) -> None:
    layout = plane_layout(codec, side, tokens, heads, dim, element_bytes)
    assert layout.nbytes % ALIGN_BYTES == 0
    stops = [section.offset for section in layout.sections[1:]] + [layout.nbytes]
    assert layout.sections[0].offset == 0
    for section, stop in zip(layout.sections, stops, strict=True):
        assert section.offset % ALIGN_BYTES == 0
        assert 0 <= stop - section.offset - section.nbytes < ALIGN_BYTES
        assert layout[section.name] == section


# Bits per element of 256 tokens, 8 heads of 128: keys, values.
BITS = {
    Codec.RAW: (16.0, 16.0),
    Codec.F8: (8.25, 8.25),
    Codec.I8: (8.5, 8.125),
    Codec.I4: (5.0, 5.0),
    Codec.RH4: (4.1875, 4.125),
    Codec.RH3: (3.1875, 3.125),
    Codec.RH2: (2.1875, 2.125),
    Codec.RHZ4: (4.1875, 4.125),
    Codec.RHZ3: (4.1875, 4.125),
    Codec.RHZ2: (4.1875, 4.125),
}


@pytest.mark.parametrize("codec", BITS)
def test_a_plane_takes_the_bits_that_its_codec_promises(codec: Codec) -> None:
    numbers = 256 * 8 * 128
    keys, values = (plane_layout(codec, side, 256, 8, 128, 2) for side in ("key", "value"))
    assert (8 * keys.nbytes / numbers, 8 * values.nbytes / numbers) == BITS[codec]


def test_xs_without_escapes_takes_three_bits_or_four_beside_the_rest() -> None:
    numbers = 1 << 20
    starts = 4 * numbers // XS_BLOCK
    for width in (3, 4):
        layout = xs_layout(numbers, width=width, num_escapes=0)
        assert layout.nbytes == 16 + starts + numbers * width // 8 + numbers
    assert plane_layout(Codec.XS, "key", 1024, 8, 128, 2) == layout
    assert xs_layout(numbers, width=3, num_escapes=17)["escapes"].nbytes == 17


def test_small_and_odd_planes_are_padded_and_nothing_takes_nothing() -> None:
    assert plane_layout(Codec.I4, "key", 33, 1, 5, 2).sections == (
        ("lows", 0, 20),
        ("steps", 32, 20),
        ("codes", 64, 99),
    )
    assert plane_layout(Codec.RH3, "key", 257, 1, 5, 2).sections == (
        ("means", 0, 20),
        ("gains", 32, 514),
        ("codes", 560, 1542),
    )
    for codec, side in itertools.product(set(Codec) - {Codec.XS}, ("key", "value")):
        assert plane_layout(codec, side, 0, 8, 128, 2).nbytes == 0
    with pytest.raises(KeyError):
        plane_layout(Codec.F8, "key", 1, 1, 1, 2)["gains"]


@pytest.mark.parametrize(
    ("dim", "width", "block"),
    [
        *((1, 16, 16), (16, 16, 16), (80, 80, 16), (96, 96, 32), (100, 112, 16), (128, 128, 128)),
        *((192, 192, 64), (256, 256, 256), (512, 512, 256), (576, 576, 64)),
    ],
)
def test_rows_are_rotated_in_the_largest_blocks_that_fit(dim: int, width: int, block: int) -> None:
    assert (rotated_dim(dim), hadamard_dim(dim)) == (width, block)


def test_numbers_of_codecs_keep_their_meaning() -> None:
    names = ["raw", "xs", "f8", "i8", "i4", "rh4", "rh3", "rh2", "rhz4", "rhz3", "rhz2"]
    assert [CODEC_NAMES[name] for name in names] == list(range(11))
    assert [codec for codec in Codec if codec.is_lossless] == [Codec.RAW, Codec.XS]
    assert [codec for codec in Codec if codec.is_rotated] == list(Codec)[5:]
    assert [codec for codec in Codec if codec.is_entropy_coded] == list(Codec)[8:]
