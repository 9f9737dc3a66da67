"""Pages go into the form that a namespace asks for and come back, whatever is in them."""

import random
from itertools import product

import numpy as np
import pytest
import torch

from respkv.errors import CommandError, PageCorrupt
from respkv.kernels.container import codec_name, raw_head, read_head
from respkv.kernels.layout import Codec
from respkv.page import DTYPE_BYTES, Geometry
from respkv.tiers.codec import (
    PageSpec,
    check_available,
    decode_page,
    decode_stored,
    encode_page,
    encoded_page,
    parse_codec,
)
from tests.kernels import data

SHAPE = Geometry(layers=3, heads=2, dim=64, tokens=96, dtype="bfloat16")
LOSSY = [codec for codec in Codec if not codec.is_lossless]
# Relative L2 of Gaussian numbers, keys and values together.
BOUNDS = {
    Codec.F8: 0.0275,
    Codec.I8: 0.0070,
    Codec.I4: 0.083,
    Codec.RH4: 0.112,
    Codec.RH3: 0.200,
    Codec.RH2: 0.358,
    Codec.RHZ4: 0.163,
    Codec.RHZ3: 0.205,
    Codec.RHZ2: 0.288,
}


def numbers_of(shape: Geometry, seed: int = 1) -> torch.Tensor:
    """Return [L, 2, T, H, D] Gaussian numbers of the geometry's dtype; of integers any."""
    sizes = (shape.layers, 2, shape.tokens, shape.heads, shape.dim)
    if shape.dtype in ("int8", "uint8"):
        return torch.from_numpy(np.random.default_rng(seed).integers(0, 30, sizes, dtype=np.uint8))
    numbers = torch.randn(sizes, generator=data.seeded(seed))
    return numbers.to(getattr(torch, shape.dtype))


def bytes_of(page: torch.Tensor) -> memoryview:
    return page.contiguous().view(torch.uint8).numpy().data.cast("B")


def there_and_back(
    page: torch.Tensor, spec: PageSpec, *, has_parent: bool = True
) -> tuple[torch.Tensor, int, bool]:
    """Return a page that was stored, in how many bytes, and whether it is said to be the same."""
    payload = bytes_of(page)
    codec, stored = encode_page(payload, spec, has_parent=has_parent)
    into = bytearray(b"\xff" * payload.nbytes)
    is_lossless = decode_stored(codec, memoryview(stored), memoryview(into))
    return torch.frombuffer(into, dtype=page.dtype).view(page.shape), len(stored), is_lossless


def error_of(page: torch.Tensor, again: torch.Tensor) -> float:
    return float((again.double() - page.double()).norm() / page.double().norm())


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_lossy_codecs_keep_to_their_bounds_in_every_dtype(codec: Codec, dtype: str) -> None:
    shape = Geometry(SHAPE.layers, SHAPE.heads, SHAPE.dim, SHAPE.tokens, dtype)
    page = numbers_of(shape)
    again, nbytes, is_lossless = there_and_back(page, PageSpec.of(shape, codec, codec))
    assert not is_lossless
    assert 0 < error_of(page, again) <= BOUNDS[codec]
    assert nbytes < shape.page_bytes / 1.7


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_lossless_pages_come_back_with_every_bit(dtype: str) -> None:
    shape = Geometry(2, 4, 64, 128, dtype)
    page = numbers_of(shape)
    again, nbytes, is_lossless = there_and_back(page, PageSpec.of(shape, Codec.XS, Codec.XS))
    assert is_lossless
    assert bytes_of(again) == bytes_of(page)
    assert nbytes < 0.95 * shape.page_bytes


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (1, 3, 5, 7), (2, 1, 100, 33), (3, 2, 16, 300), (2, 5, 80, 65)],
    ids=str,
)
@pytest.mark.parametrize("codec", [Codec.XS, *LOSSY])
def test_odd_shapes_fit(codec: Codec, shape: tuple[int, int, int, int]) -> None:
    layers, heads, dim, tokens = shape
    geometry = Geometry(layers, heads, dim, tokens, "bfloat16")
    page = numbers_of(geometry)
    spec = PageSpec.of(geometry, codec, codec, exact_first=1, exact_last=2)
    for has_parent in (False, True):
        again, _, is_lossless = there_and_back(page, spec, has_parent=has_parent)
        assert error_of(page, again) < 0.6
        assert not is_lossless or torch.equal(page, again)
        # Always a container, also where nothing is gained.
        stored = encoded_page(bytes_of(page), spec, has_parent=has_parent)
        into = bytearray(geometry.page_bytes)
        decode_page(memoryview(stored), memoryview(into))
        whole = torch.frombuffer(into, dtype=page.dtype).view(page.shape)
        assert error_of(page, whole) < 0.6


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize(("first", "last"), [(4, 0), (0, 16), (4, 64), (3, 5)])
def test_exact_tokens_come_back_with_every_bit(codec: Codec, first: int, last: int) -> None:
    page = numbers_of(SHAPE)
    page[:, :, 0] *= 1000  # as those that attention sinks into
    spec = PageSpec.of(SHAPE, codec, codec, exact_first=first, exact_last=last)
    again, *_ = there_and_back(page, spec, has_parent=False)
    assert torch.equal(again[:, :, :first], page[:, :, :first])
    assert torch.equal(again[:, :, 96 - last :], page[:, :, 96 - last :])
    middle = slice(first, 96 - last)
    assert not torch.equal(again[:, :, middle], page[:, :, middle])
    if first:
        later, *_ = there_and_back(page, spec, has_parent=True)
        assert not torch.equal(later[:, :, :first], page[:, :, :first])


def test_a_page_of_nothing_but_exact_tokens_is_stored_without_loss() -> None:
    spec = PageSpec.of(SHAPE, Codec.RH2, Codec.RH2, exact_first=4, exact_last=92)
    again, nbytes, is_lossless = there_and_back(numbers_of(SHAPE), spec, has_parent=False)
    assert is_lossless
    assert torch.equal(again, numbers_of(SHAPE))
    assert nbytes < SHAPE.page_bytes / 1.3


def test_keys_values_and_layers_have_codecs_of_their_own() -> None:
    rows = ((Codec.I8, Codec.RH2), (Codec.XS, Codec.RAW), (Codec.I8, Codec.RHZ3))
    page = numbers_of(SHAPE)
    codec, stored = encode_page(bytes_of(page), PageSpec(SHAPE, rows), has_parent=True)
    assert codec_name(codec) == "mixed"
    head = read_head(stored)
    assert [plane.codec for plane in head.planes] == [each for row in rows for each in row]
    again, *_ = there_and_back(page, PageSpec(SHAPE, rows))
    for layer, side in product(range(3), (0, 1)):
        error = error_of(page[layer, side], again[layer, side])
        assert error <= BOUNDS.get(rows[layer][side], 0.0)


@pytest.mark.parametrize("codec", LOSSY)
def test_a_plane_that_a_codec_cannot_hold_is_stored_as_it_is(codec: Codec) -> None:
    page = numbers_of(SHAPE)
    page[1, 0, 5, 1, 3] = float("nan")
    page[2, 1, 0, 0, 0] = float("inf")
    spec = PageSpec.of(SHAPE, codec, codec)
    _, stored = encode_page(bytes_of(page), spec, has_parent=True)
    raw = [i for i, plane in enumerate(read_head(stored).planes) if plane.codec == Codec.RAW]
    assert raw == [2, 5]
    again, *_ = there_and_back(page, spec)
    assert bytes_of(again[1, 0]) == bytes_of(page[1, 0])
    assert bytes_of(again[2, 1]) == bytes_of(page[2, 1])


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.XS])
def test_a_page_that_gains_nothing_is_the_payload_itself(codec: Codec) -> None:
    noise = memoryview(random.Random(1).randbytes(SHAPE.page_bytes))
    stored = encode_page(noise, PageSpec.of(SHAPE, codec, codec), has_parent=True)
    assert stored[0] == 0
    assert stored[1] is noise


def test_a_raw_page_behind_its_head_is_an_encoded_page() -> None:
    payload = bytes_of(numbers_of(SHAPE))
    into = bytearray(SHAPE.page_bytes)
    assert decode_page(memoryview(raw_head(SHAPE) + payload), memoryview(into))
    assert into == payload


@pytest.mark.parametrize("codec", [Codec.XS, Codec.F8, Codec.I4, Codec.RH4, Codec.RHZ3])
def test_every_flipped_byte_is_noticed_or_stays_in_its_numbers(codec: Codec) -> None:
    shape = Geometry(2, 2, 16, 24, "bfloat16")
    spec = PageSpec.of(shape, codec, codec, exact_last=3)
    stored = encoded_page(bytes_of(numbers_of(shape)), spec, has_parent=True)
    head_bytes = read_head(stored).head_bytes
    into = memoryview(bytearray(shape.page_bytes))
    for at in range(0, len(stored), 1 if codec == Codec.XS else 3):
        damaged = bytearray(stored)
        damaged[at] ^= 0x41
        try:
            decode_page(memoryview(damaged), into)
        except PageCorrupt:
            continue
        assert at >= head_bytes


def test_a_page_of_another_size_is_refused_before_anything_is_decoded() -> None:
    stored = encoded_page(
        bytes_of(numbers_of(SHAPE)), PageSpec.of(SHAPE, Codec.F8, Codec.F8), has_parent=True
    )
    for size in (1, SHAPE.page_bytes - 1, 2 * SHAPE.page_bytes):
        with pytest.raises(PageCorrupt, match="is stored, not of"):
            decode_page(memoryview(stored), memoryview(bytearray(size)))
    with pytest.raises(PageCorrupt):
        decode_stored(0, memoryview(b"12"), memoryview(bytearray(3)))
    with pytest.raises(PageCorrupt, match="no codec 9"):
        decode_stored(9, memoryview(b"12"), memoryview(bytearray(3)))


def test_a_readonly_payload_is_encoded_without_a_warning() -> None:
    payload = memoryview(bytes(bytes_of(numbers_of(SHAPE))))
    assert encode_page(payload, PageSpec.of(SHAPE, Codec.RH4, Codec.RH4), has_parent=True)[0] == 21


def test_codecs_have_names() -> None:
    assert parse_codec("rh4") == (Codec.RH4, Codec.RH4)
    assert parse_codec("I8/rh2") == (Codec.I8, Codec.RH2)
    assert parse_codec("rhz") == (Codec.RHZ3, Codec.RHZ3)
    for wrong in ("", "rh5", "rh4/", "/rh4", "rh4/rh4/rh4", "zstd"):
        with pytest.raises(ValueError, match="is not one of raw, xs, f8"):
            parse_codec(wrong)


def test_a_spec_is_for_pages_that_its_codecs_take() -> None:
    with pytest.raises(ValueError, match="rh4 takes pages of bfloat16, float16, float32, not int8"):
        PageSpec.of(Geometry(1, 1, 8, 8, "int8"), Codec.XS, Codec.RH4)
    with pytest.raises(ValueError, match="1 layers of codecs for 3"):
        PageSpec(SHAPE, ((Codec.XS, Codec.XS),))
    check_available(Codec.XS, "uint8")
    check_available(Codec.RH4, "float16")
    with pytest.raises(CommandError, match="not float8_e4m3fn"):
        check_available(Codec.F8, "float8_e4m3fn")
    lossy = PageSpec.of(SHAPE, Codec.RAW, Codec.RH4, exact_first=4)
    assert lossy.without_loss() == PageSpec.of(SHAPE, Codec.RAW, Codec.XS)
    assert lossy.without_loss().is_lossless
    assert not lossy.is_lossless
