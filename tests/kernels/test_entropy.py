"""Packed planes come back whole; what is no packed plane is an error that takes no memory."""

import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from respkv.errors import PageCorrupt
from respkv.kernels.entropy import pack, packed_bytes_max, unpack
from respkv.kernels.ladder import encode_planes
from respkv.kernels.layout import Codec, PlaneLayout, Side, plane_layout
from tests.kernels import data

CODECS = [Codec.RHZ4, Codec.RHZ3, Codec.RHZ2]
SIDES: list[Side] = ["key", "value"]
# Bits of a number in a file, of 8192 tokens of 128.
BITS_MAX = {Codec.RHZ4: 3.25, Codec.RHZ3: 2.90, Codec.RHZ2: 2.42}


def encoded(codec: Codec, plane: torch.Tensor, side: Side) -> tuple[bytes, PlaneLayout]:
    rows, fits = encode_planes(codec, plane.unsqueeze(0), side=side)
    assert fits.all()
    layout = plane_layout(codec, side, *plane.shape, plane.element_size())
    return rows.numpy().tobytes(), layout


def unpacked(stored: bytes, layout: PlaneLayout) -> bytes:
    into = bytearray(b"\xff" * layout.nbytes)
    unpack(memoryview(stored), layout, memoryview(into))
    return bytes(into)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", data.GENERATORS)
def test_files_hold_the_promised_bits(codec: Codec, name: str) -> None:
    side: Side = "value" if name == "values" else "key"
    plane, layout = encoded(codec, data.GENERATORS[name](8192, 1, 128, 1), side)
    stored = pack(memoryview(plane), layout)
    assert 8 * len(stored) / (8192 * 128) <= BITS_MAX[codec]
    assert unpacked(stored, layout) == plane


@given(st.sampled_from(SIDES), st.integers(0, 9), st.integers(0, 3), st.integers(1, 40))
def test_any_plane_comes_back(side: Side, tokens: int, heads: int, dim: int) -> None:
    plane, layout = encoded(Codec.RHZ3, data.gaussian(tokens, heads, dim, dim), side)
    stored = pack(memoryview(plane), layout)
    assert len(stored) <= packed_bytes_max(layout)
    assert unpacked(stored, layout) == plane


def test_codes_without_a_pattern_are_stored_as_they_are() -> None:
    layout = plane_layout(Codec.RHZ4, "value", 64, 1, 128, 2)
    plane = data.random_words(1, 1, layout.nbytes // 2, 1).view(torch.uint8).numpy().tobytes()
    stored = pack(memoryview(plane), layout)
    assert len(stored) == packed_bytes_max(layout)
    assert unpacked(stored, layout) == plane


def test_padding_is_not_stored_and_comes_back_as_zeros() -> None:
    plane, layout = encoded(Codec.RHZ4, data.gaussian(3, 1, 8, 1), "value")
    assert (layout.nbytes, layout["gains"].nbytes, layout["codes"].nbytes) == (48, 6, 24)
    assert len(pack(memoryview(plane), layout)) <= 16 + 4 + 24
    assert unpacked(pack(memoryview(plane[:40] + b"padding!"), layout), layout) == plane


PLANE, LAYOUT = encoded(Codec.RHZ2, data.keys(20, 2, 64, 3), "key")
GOOD = pack(memoryview(PLANE), LAYOUT)
CODES_AT, CODES_BYTES = LAYOUT["codes"].offset, LAYOUT["codes"].nbytes


def lie(codes: bytes, length: int | None = None) -> bytes:
    return GOOD[:CODES_AT] + struct.pack("<I", len(codes) if length is None else length) + codes


LIES = {
    "nothing": b"",
    "an early end": GOOD[: CODES_AT + 3],
    "no codes": lie(b""),
    "a part of the frame": GOOD[:-1],
    "more than the frame": GOOD + b"!",
    "a length of 4 GiB": lie(GOOD[CODES_AT + 4 :], 0xFFFF_FFFF),
    "more than the codes": lie(bytes(CODES_BYTES + 1)),
    "a frame of fewer": lie(zstandard.compress(bytes(CODES_BYTES - 1))),
    "a frame that claims 32 MiB": lie(zstandard.compress(bytes(1 << 25))),
    "a frame without its size": lie(
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 22))
    ),
    "a skippable frame": lie(struct.pack("<II", 0x184D2A50, 4) + b"skip"),
    "two frames": lie(zstandard.compress(bytes(CODES_BYTES)) * 2),
    "no frame": lie(b"garbage" * 9),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_an_error_and_takes_no_memory(name: str) -> None:
    into = memoryview(bytearray(LAYOUT.nbytes))
    with pytest.raises(PageCorrupt):
        unpack(memoryview(LIES[name]), LAYOUT, into)
    tracemalloc.start()
    with pytest.raises(PageCorrupt):
        unpack(memoryview(LIES[name]), LAYOUT, into)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 10


@given(st.integers(0), st.integers(0, 255))
def test_a_changed_byte_is_an_error_or_a_plane(at: int, value: int) -> None:
    bad = bytearray(GOOD)
    bad[at % len(bad)] = value
    try:
        assert len(unpacked(bytes(bad), LAYOUT)) == len(PLANE)
    except PageCorrupt:
        assert bytes(bad) != GOOD


def test_sizes_of_the_caller_are_checked() -> None:
    with pytest.raises(ValueError, match="plane"):
        pack(memoryview(PLANE)[:-1], LAYOUT)
    with pytest.raises(ValueError, match="plane"):
        unpack(memoryview(GOOD), LAYOUT, memoryview(bytearray(LAYOUT.nbytes + 1)))


def test_threads_share_no_coder() -> None:
    planes = [encoded(Codec.RHZ3, data.gaussian(256, 2, 128, seed), "value") for seed in range(8)]

    def there_and_back(index: int) -> bool:
        plane, layout = planes[index % len(planes)]
        return unpacked(pack(memoryview(plane), layout), layout) == plane

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, range(64)))


def test_the_stored_form_keeps_its_meaning() -> None:
    """These bytes were stored by an earlier version and must be readable for ever."""
    layout = plane_layout(Codec.RHZ4, "value", 8, 1, 16, 2)
    assert unpacked(bytes.fromhex(GOLDEN), layout) == bytes(range(16)) + bytes(64)


GOLDEN = "000102030405060708090a0b0c0d0e0f1100000028b52ffd20404500001000000100930016"
