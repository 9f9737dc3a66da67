"""Payloads go through every lossless codec and come back; damaged ones never get far."""

import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import lz4.block
import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from respkv.errors import PageCorrupt
from respkv.kernels.lossless import (
    BLOCK_BYTES,
    CODEC_NAMES,
    CODECS,
    GAIN_SHARE_MIN,
    LOOK_BYTES,
    LZ4,
    RAW,
    ZSTD,
    decode,
    encode,
)

COMPRESSING = ["zstd", "lz4"]
ELEMENT_BYTES = [1, 2, 4]
GUARD = b"\xa5" * 64

by_codec = pytest.mark.parametrize("codec", COMPRESSING)
by_element = pytest.mark.parametrize("element_bytes", ELEMENT_BYTES)


def decoded(codec: int, stored: bytes | memoryview, nbytes: int) -> bytes:
    """Decode into the middle of a larger buffer, and check that the rest was left alone."""
    around = bytearray(GUARD + b"\xff" * nbytes + GUARD)
    into = memoryview(around)[len(GUARD) : len(GUARD) + nbytes]
    try:
        decode(codec, memoryview(stored), into)
    finally:
        assert around[: len(GUARD)] == GUARD
        assert around[len(GUARD) + nbytes :] == GUARD
    return bytes(into)


def stored(payload: bytes, element_bytes: int, codec: str) -> tuple[int, bytes]:
    codec_id, data = encode(memoryview(payload), element_bytes=element_bytes, codec=codec)
    return codec_id, bytes(data)


def gaussian(nbytes: int, dtype: str, seed: int = 1) -> bytes:
    numbers = np.random.default_rng(seed).standard_normal(nbytes, dtype=np.float32)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return numbers.astype(kind).tobytes()[:nbytes]


def damaged(payload: bytes, codec_id: int, data: bytes) -> None:
    """Whatever comes out of damaged bytes, it is of the payload's size, or an error."""
    with suppress(PageCorrupt):
        assert len(decoded(codec_id, data, len(payload))) == len(payload)


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """Text, zeros, noise and numbers, pieced together, of any length from 0."""
    noise = np.random.default_rng(draw(st.integers(0, 9)))
    pieces: list[bytes] = []
    for kind in draw(st.lists(st.sampled_from("tzng"), max_size=4)):
        nbytes = draw(st.integers(0, 5000))
        match kind:
            case "t":
                pieces.append((b"a page of a prefix, " * 250)[:nbytes])
            case "z":
                pieces.append(bytes(nbytes))
            case "n":
                pieces.append(noise.bytes(nbytes))
            case _:
                pieces.append(gaussian(nbytes, "bfloat16"))
    return b"".join(pieces) + draw(st.binary(max_size=9))


@given(payloads(), st.sampled_from(ELEMENT_BYTES), st.sampled_from([*CODECS]))
def test_a_payload_comes_back_whatever_it_is(
    payload: bytes, element_bytes: int, codec: str
) -> None:
    codec_id, data = stored(payload, element_bytes, codec)
    assert decoded(codec_id, data, len(payload)) == payload
    assert codec_id in (RAW, CODECS[codec])


@by_codec
@by_element
def test_sizes_around_blocks_and_looks_come_back(codec: str, element_bytes: int) -> None:
    long = gaussian(2 * BLOCK_BYTES + 64, "bfloat16")
    for middle in (0, 3 * LOOK_BYTES, BLOCK_BYTES, 2 * BLOCK_BYTES):
        for nbytes in range(max(0, middle - 5), middle + 6):
            payload = long[:nbytes]
            codec_id, data = stored(payload, element_bytes, codec)
            assert decoded(codec_id, data, nbytes) == payload


@by_codec
def test_a_payload_may_lie_anywhere_in_memory(codec: str) -> None:
    payload = gaussian(100_000, "bfloat16")
    for shift in range(1, 4):
        moved = memoryview(b"\0" * shift + payload)[shift:]
        codec_id, data = encode(moved, element_bytes=2, codec=codec)
        assert codec_id == CODECS[codec]
        into = bytearray(shift + len(payload))
        decode(codec_id, memoryview(data), memoryview(into)[shift:])
        assert into[shift:] == payload


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@by_codec
def test_every_16_bit_pattern_comes_back_nan_and_inf_among_them(dtype: str, codec: str) -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    shuffled = np.random.default_rng(2).permutation(words)
    numbers = words.view(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    assert not np.isfinite(numbers.astype(np.float32)).all()
    for payload in (words.tobytes(), shuffled.tobytes()):
        codec_id, data = stored(payload, 2, codec)
        assert decoded(codec_id, data, len(payload)) == payload


@by_codec
def test_special_32_bit_patterns_come_back(codec: str) -> None:
    exponents = np.arange(512, dtype=np.uint32) << 23  # both signs
    mantissas = np.array([0, 1, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFF], dtype=np.uint32)
    words = (exponents[:, None] | mantissas).ravel()
    payload = np.tile(words, 8).tobytes()
    codec_id, data = stored(payload, 4, codec)
    assert codec_id == CODECS[codec]
    assert decoded(codec_id, data, len(payload)) == payload


@pytest.mark.parametrize(
    ("codec", "dtype", "element_bytes", "ratio_min"),
    [
        ("zstd", "bfloat16", 2, 1.46),
        ("lz4", "bfloat16", 2, 1.19),
        ("zstd", "float16", 2, 1.17),
        ("zstd", "float32", 4, 1.17),
        ("lz4", "float32", 4, 1.08),
    ],
)
def test_gaussian_numbers_shrink(
    codec: str, dtype: str, element_bytes: int, ratio_min: float
) -> None:
    payload = gaussian(4 << 20, dtype)
    codec_id, data = stored(payload, element_bytes, codec)
    assert codec_id == CODECS[codec]
    assert len(payload) / len(data) >= ratio_min


@by_codec
@by_element
@pytest.mark.parametrize("nbytes", [0, 1, 63, 1000, 5 << 20])
def test_noise_is_left_where_it_is(codec: str, element_bytes: int, nbytes: int) -> None:
    payload = memoryview(np.random.default_rng(3).bytes(nbytes))
    codec_id, data = encode(payload, element_bytes=element_bytes, codec=codec)
    assert codec_id == RAW
    assert data is payload


@by_codec
def test_noise_costs_no_memory(codec: str) -> None:
    payload = memoryview(np.random.default_rng(3).bytes(8 << 20))
    encode(payload, element_bytes=2, codec=codec)  # the thread's coders are there from now on
    tracemalloc.start()
    encode(payload, element_bytes=2, codec=codec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * LOOK_BYTES


@by_codec
def test_a_gain_under_one_part_in_64_is_no_gain(codec: str) -> None:
    noise = np.random.default_rng(4).bytes(64_000)
    edges = set()
    for zeros in range(800, 1400, 10):
        payload = noise + bytes(zeros)
        codec_id, data = stored(payload, 1, codec)
        edges.add(codec_id)
        if codec_id != RAW:
            assert len(data) <= len(payload) - len(payload) // GAIN_SHARE_MIN
    assert edges == {RAW, CODECS[codec]}


def test_raw_is_the_payload_itself() -> None:
    payload = memoryview(bytes(1000))
    assert encode(payload, element_bytes=1, codec="raw") == (RAW, payload)
    assert encode(payload, element_bytes=1, codec="raw")[1] is payload


@by_codec
@by_element
@pytest.mark.parametrize("nbytes", [400, 6000])
def test_every_truncation_is_found(codec: str, element_bytes: int, nbytes: int) -> None:
    payload = (b"the same words again, " * 300)[:nbytes]
    codec_id, data = stored(payload, element_bytes, codec)
    assert codec_id == CODECS[codec]
    for length in range(len(data)):
        with pytest.raises(PageCorrupt):
            decoded(codec_id, data[:length], nbytes)
    for extra in (b"\0", b"\0" * 5, data):
        with pytest.raises(PageCorrupt):
            decoded(codec_id, data + extra, nbytes)


@by_codec
@by_element
def test_another_size_than_the_stored_one_is_found(codec: str, element_bytes: int) -> None:
    payload = gaussian(8000, "bfloat16") + bytes(8001)
    codec_id, data = stored(payload, element_bytes, codec)
    for nbytes in [0, 1, 8000, len(payload) - 1, len(payload) + 1, 3 * BLOCK_BYTES]:
        with pytest.raises(PageCorrupt):
            decoded(codec_id, data, nbytes)


@by_codec
@by_element
def test_every_flipped_bit_is_an_error_or_bytes_of_that_size(
    codec: str, element_bytes: int
) -> None:
    payload = b"some text, " * 9 + gaussian(300, "bfloat16") + bytes(300)
    codec_id, data = stored(payload, element_bytes, codec)
    assert codec_id == CODECS[codec]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged(payload, codec_id, bytes(flipped))


@given(
    st.sampled_from(COMPRESSING),
    st.sampled_from(ELEMENT_BYTES),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)), min_size=1),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_bytes_written_over_a_stored_payload_do_no_harm(
    codec: str, element_bytes: int, overwrites: list[tuple[int, bytes]]
) -> None:
    payload = gaussian(6000, "bfloat16") + b"some text, " * 500
    codec_id, data = stored(payload, element_bytes, codec)
    wrong = bytearray(data)
    for place, piece in overwrites:
        start = place % len(wrong)
        wrong[start : start + len(piece)] = piece[: len(wrong) - start]
    damaged(payload, codec_id, bytes(wrong))


@given(st.integers(0, 255), st.binary(max_size=300), st.integers(0, 300))
def test_garbage_is_an_error_or_bytes_of_that_size(codec: int, data: bytes, nbytes: int) -> None:
    damaged(bytes(nbytes), codec, data)


def frame(element_bytes: int, *planes: bytes) -> bytes:
    parts = [struct.pack("<I", len(plane)) + plane for plane in planes]
    return bytes([element_bytes]) + b"".join(parts)


LIES = {
    "a zstd frame that claims 32 MiB": (
        ZSTD,
        frame(1, zstandard.compress(bytes(1 << 25))),
    ),
    "a zstd frame without its size": (
        ZSTD,
        frame(1, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 25))),
    ),
    "a skippable zstd frame": (ZSTD, frame(1, struct.pack("<II", 0x184D2A50, 4) + b"skip")),
    "two zstd frames": (ZSTD, frame(1, zstandard.compress(bytes(500)) * 2)),
    "an lz4 block of 32 MiB": (
        LZ4,
        frame(1, lz4.block.compress(bytes(1 << 25), store_size=False)[:900]),
    ),
    "an empty plane": (LZ4, frame(1, b"")),
    "an empty zstd plane": (ZSTD, frame(1, b"")),
    "a length of 4 GiB": (ZSTD, b"\x01\xff\xff\xff\xff" + bytes(100)),
    "an element of 3 bytes": (LZ4, frame(3, b"a", b"b", b"c")),
    "an element of no bytes": (LZ4, b"\0"),
    "nothing": (ZSTD, b""),
    "an unknown codec": (77, bytes(1000)),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_takes_no_memory(name: str) -> None:
    codec, data = LIES[name]
    into = memoryview(bytearray(1000))
    with pytest.raises(PageCorrupt):
        decode(codec, memoryview(data), into)
    tracemalloc.start()
    with pytest.raises(PageCorrupt):
        decode(codec, memoryview(data), into)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 10


def test_a_frame_that_holds_more_than_it_claims_is_found() -> None:
    data = bytearray(zstandard.compress(bytes(70_000)))
    parameters = zstandard.get_frame_parameters(bytes(data))
    at = bytes(data).index(struct.pack("<I", parameters.content_size))
    data[at : at + 4] = struct.pack("<I", 66_000)
    with pytest.raises(PageCorrupt, match="damaged"):
        decoded(ZSTD, frame(1, bytes(data)), 66_000)


@by_codec
def test_threads_share_no_coder(codec: str) -> None:
    bodies = [gaussian(300_000, "bfloat16", seed=seed) for seed in range(16)]

    def there_and_back(payload: bytes) -> bool:
        codec_id, data = stored(payload, 2, codec)
        return decoded(codec_id, data, len(payload)) == payload

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, bodies * 4))


def test_ids_keep_their_meaning() -> None:
    """These bytes were stored by an earlier version and must be readable for ever."""
    assert CODECS == {"raw": 0, "zstd": 1, "lz4": 2}
    assert CODEC_NAMES == {0: "raw", 1: "zstd", 2: "lz4"}
    assert BLOCK_BYTES == 1 << 20
    payload = bytes(range(5)) * 40 + b"end"
    for codec, data in GOLDEN.items():
        assert decoded(codec, bytes.fromhex(data), len(payload)) == payload


GOLDEN = {
    ZSTD: "021600000028b52ffd20656d00003000020401036501008ca968"
    "011600000028b52ffd20656d00003001030002046e01008ca9680164",
    LZ4: "020f0000005f00020401030500485002040103650f0000005f010300020405004850030002046e64",
}
