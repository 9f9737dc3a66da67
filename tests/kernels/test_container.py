"""The head of an encoded page says where every plane is, and nothing wrong is believed."""

import random
import zlib
from contextlib import suppress
from itertools import product
from typing import Any

import pytest

from respkv.errors import PageCorrupt
from respkv.kernels.container import (
    HEAD_BYTES,
    LOSSY_DTYPES,
    PACKED,
    PLAIN,
    SIDES,
    PageHead,
    Part,
    codec_id,
    codec_name,
    coded_tokens,
    exact_bytes,
    lay_page,
    raw_head,
    raw_plane_bytes,
    read_head,
    select_layers,
)
from respkv.kernels.layout import Codec, plane_layout, xs_layout
from respkv.page import DTYPE_BYTES, Geometry

SHAPE = Geometry(layers=3, heads=2, dim=16, tokens=21, dtype="bfloat16")
ODD = Geometry(layers=2, heads=3, dim=5, tokens=7, dtype="float8_e5m2")  # planes of 105 bytes


def part(shape: Geometry, codec: Codec, side: int, first: int = 0, last: int = 0) -> Part:
    """Return a part of the size that a codec makes."""
    if codec == Codec.XS:
        numbers = raw_plane_bytes(shape) // DTYPE_BYTES[shape.dtype]
        return Part(codec, PLAIN, xs_layout(numbers, width=3, num_escapes=9).nbytes)
    if codec == Codec.RAW:
        return Part(codec, PLAIN, raw_plane_bytes(shape))
    tokens = coded_tokens(shape, codec, first, last)
    size = plane_layout(
        codec, SIDES[side], tokens, shape.heads, shape.dim, DTYPE_BYTES[shape.dtype]
    ).nbytes
    return Part(codec, PLAIN, exact_bytes(shape, codec, first, last) + size)


def page_of(shape: Geometry, codecs: list[Codec], first: int = 0, last: int = 0) -> PageHead:
    parts = [part(shape, codec, index % 2, first, last) for index, codec in enumerate(codecs)]
    return lay_page(shape, parts, exact_first=first, exact_last=last)


def encoded(head: PageHead) -> bytearray:
    """Return a page with this head and planes of random bytes."""
    return bytearray(head.pack()) + random.Random(1).randbytes(head.total_bytes - head.head_bytes)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize(("first", "last"), [(0, 0), (4, 3)])
def test_a_head_says_what_it_was_made_of(codec: Codec, first: int, last: int) -> None:
    head = page_of(SHAPE, [codec] * 6, first, last)
    found = read_head(encoded(head))
    assert found == head
    assert found.is_lossless == codec.is_lossless
    assert codec_name(found.codec_id) == codec.name.lower()
    for layer, side in product(range(3), (0, 1)):
        plane = found.plane(layer, SIDES[side])
        assert plane == found.planes[2 * layer + side] == found.plane(layer, 1 if side else 0)
        assert plane.offset % 16 == 0
        assert found.coded_tokens(plane) == (21 if codec.is_lossless else 21 - first - last)
        assert found.exact_bytes(plane) % 16 == 0


def test_planes_may_have_codecs_of_their_own() -> None:
    codecs = [Codec.RAW, Codec.XS, Codec.RH4, Codec.RHZ3, Codec.F8, Codec.I8]
    head = page_of(SHAPE, codecs, 4, 1)
    found = read_head(encoded(head))
    assert [plane.codec for plane in found.planes] == codecs
    assert (codec_name(found.codec_id), found.is_lossless) == ("mixed", False)


def test_ids_of_codecs_have_names() -> None:
    names = ["raw", "zstd", "lz4", *[f"codec-{id_}" for id_ in range(3, 15)], "mixed"]
    assert [codec_name(id_) for id_ in range(16)] == names
    assert [codec_name(16 + codec) for codec in Codec] == [
        "raw",
        *[c.name.lower() for c in Codec][1:],
    ]
    assert codec_name(255) == "codec-255"
    assert codec_id([Codec.RAW]) == 0
    assert codec_id([Codec.RH4] * 2) == 21


@pytest.mark.parametrize("shape", [SHAPE, ODD], ids=["aligned", "odd"])
def test_a_raw_page_needs_nothing_but_a_head_in_front(shape: Geometry) -> None:
    payload = random.Random(2).randbytes(shape.page_bytes)
    page = raw_head(shape) + payload
    head = read_head(page)
    assert (head.codec_id, head.is_lossless, head.is_payload) == (0, True, True)
    whole = b"".join(page[plane.offset : plane.offset + plane.nbytes] for plane in head.planes)
    assert whole == payload
    for first, count in [(0, 1), (1, shape.layers - 1)]:
        start, stop = shape.layer_range(first, count)
        assert page[slice(*head.layer_range(first, count))] == payload[start:stop]


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.RH3])
def test_layers_of_an_encoded_page_are_an_encoded_page(codec: Codec) -> None:
    head = page_of(SHAPE, [codec, Codec.I8, Codec.RAW, Codec.RAW, Codec.XS, codec], 4, 2)
    page = encoded(head)
    for first, count in [(0, 1), (1, 1), (1, 2), (2, 1), (0, 3)]:
        front, start, stop = select_layers(head, first, count)
        some = front + page[start:stop]
        found = read_head(some)
        assert found.geometry.layers == count
        for layer, side in product(range(count), (0, 1)):
            mine, whole = found.planes[2 * layer + side], head.planes[2 * (first + layer) + side]
            assert mine[:2] == whole[:2]
            assert (
                some[mine.offset : mine.offset + mine.nbytes]
                == page[whole.offset : whole.offset + whole.nbytes]
            )
    odd = read_head(raw_head(ODD), HEAD_BYTES + 16 * 4 + ODD.page_bytes)
    front, start, stop = select_layers(odd, 1, 1)
    assert read_head(front, len(front) + stop - start).is_payload
    with pytest.raises(ValueError, match="layers 2 to 3"):
        select_layers(head, 2, 2)


def test_every_flipped_bit_of_a_head_is_noticed() -> None:
    page = encoded(page_of(SHAPE, [Codec.RHZ4, Codec.XS] * 3, 4, 2))
    for at in range(read_head(page).head_bytes):
        for bit in range(8):
            page[at] ^= 1 << bit
            with pytest.raises(PageCorrupt):
                read_head(page)
            page[at] ^= 1 << bit
    read_head(page)


def test_a_page_that_is_cut_short_or_too_long_is_refused() -> None:
    page = encoded(page_of(SHAPE, [Codec.I4] * 6))
    for size in [*range(200), len(page) - 1, len(page) + 16]:
        with pytest.raises(PageCorrupt):
            read_head((page + bytes(16))[:size])


def changed(head: PageHead, fields: dict[str, Any]) -> bytes:
    """Return a head, its checksum right, of which one plane says something else."""
    planes = list(head.planes)
    planes[0] = planes[0]._replace(**fields)
    return PageHead(
        head.geometry, head.exact_first, head.exact_last, tuple(planes), head.total_bytes, False
    ).pack()


@pytest.mark.parametrize(
    ("codec", "fields", "message"),
    [
        (Codec.I8, {"nbytes": 0}, "not where"),
        (Codec.I8, {"codec": Codec.I4}, "bytes, not"),
        (Codec.RH4, {"codec": 77}, "no codec 77"),
        (Codec.RH4, {"form": 2}, "no form 2"),
        (Codec.RH4, {"form": PACKED}, "no form 1"),
        (Codec.RAW, {"form": PACKED}, "no form 1"),
        (Codec.F8, {"offset": 4096}, "not where"),
        (Codec.F8, {"offset": 1 << 63}, "not where"),
        (Codec.XS, {"codec": Codec.RAW}, "bytes, not"),
    ],
    ids=str,
)
def test_a_plane_of_another_size_or_place_is_refused(
    codec: Codec, fields: dict[str, Any], message: str
) -> None:
    head = page_of(SHAPE, [codec] * 6)
    with pytest.raises(PageCorrupt, match=message):
        read_head(changed(head, fields), head.total_bytes)


def test_a_codec_must_take_the_dtype_and_have_tokens_left() -> None:
    for dtype in DTYPE_BYTES:
        shape = Geometry(1, 2, 16, 5, dtype)
        for codec in (Codec.XS, Codec.F8):
            head = page_of(shape, [codec] * 2)
            is_taken = dtype == "bfloat16" if codec == Codec.XS else dtype in LOSSY_DTYPES
            if is_taken:
                read_head(head.pack(), head.total_bytes)
            else:
                with pytest.raises(PageCorrupt, match=r"have codec|bytes, not"):
                    read_head(head.pack(), head.total_bytes)
    shape = Geometry(1, 2, 16, 5, "float16")
    nothing = Part(Codec.F8, PLAIN, exact_bytes(shape, Codec.F8, 3, 2))
    head = lay_page(shape, [nothing] * 2, exact_first=3, exact_last=2)
    with pytest.raises(PageCorrupt, match="no 0 tokens"):
        read_head(head.pack(), head.total_bytes)


def test_heads_of_any_bytes_are_refused_or_read() -> None:
    rng = random.Random(3)
    good = page_of(SHAPE, [Codec.RH4] * 6).pack()
    for _ in range(3000):
        page = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            page[rng.randrange(len(page))] = rng.randrange(256)
        # With a checksum that fits, only what the head says is left to be held against the sizes.
        with suppress(PageCorrupt):
            read_head(sealed(page), page_of(SHAPE, [Codec.RH4] * 6).total_bytes)


def sealed(page: bytearray) -> bytes:
    """Return a head with the checksum that belongs to it."""
    crc = zlib.crc32(page[44:], zlib.crc32(page[:40]))
    return bytes(page[:40]) + crc.to_bytes(4, "little") + bytes(page[44:])
