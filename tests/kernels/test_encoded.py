"""Encoded pages decoded into tensors: the same numbers as a tier decodes into memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.client.views import decode_page
from respkv.errors import PageCorrupt
from respkv.kernels.container import raw_head
from respkv.kernels.encoded import decode_encoded
from respkv.kernels.layout import Codec
from respkv.page import Geometry
from respkv.tiers import codec as tier_codec
from tests.kernels import data

NAMES = [codec.name.lower() for codec in Codec]


def payload_of(shape: Geometry, seed: int) -> memoryview:
    numbers = data.gaussian(shape.layers * 2 * shape.tokens, shape.heads, shape.dim, seed)
    page = numbers.to(getattr(torch, shape.dtype)).contiguous()
    return memoryview(page.view(torch.uint8).numpy().tobytes())


def by_tier(encoded: memoryview, nbytes: int) -> bytes:
    into = bytearray(nbytes)
    tier_codec.decode_page(encoded, memoryview(into))
    return bytes(into)


def bytes_of(page: torch.Tensor) -> bytes:
    return page.contiguous().view(torch.uint8).numpy().tobytes()


@settings(max_examples=40, deadline=None)
@given(
    codecs=st.lists(
        st.tuples(st.sampled_from(list(Codec)), st.sampled_from(list(Codec))),
        min_size=1,
        max_size=3,
    ),
    tokens=st.integers(1, 40),
    dim=st.sampled_from([8, 20, 64]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    exact=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    seed=st.integers(0, 1000),
)
def test_a_tensor_has_the_numbers_that_a_tier_decodes(
    codecs: list[tuple[Codec, Codec]],
    tokens: int,
    dim: int,
    dtype: str,
    exact: tuple[int, int],
    seed: int,
) -> None:
    shape = Geometry(len(codecs), 2, dim, tokens, dtype)
    spec = tier_codec.PageSpec(shape, tuple(codecs), *exact)
    payload = payload_of(shape, seed)
    encoded = memoryview(tier_codec.encoded_page(payload, spec, has_parent=False))
    page = decode_encoded(encoded)
    assert page.shape == (len(codecs), 2, tokens, 2, dim)
    assert bytes_of(page) == by_tier(encoded, payload.nbytes)


def test_a_raw_page_behind_a_head_is_the_page() -> None:
    shape = Geometry(2, 3, 8, 5, "float8_e4m3fn")
    payload = payload_of(shape, 1)
    page = decode_page(raw_head(shape) + bytes(payload))
    assert page.dtype == torch.float8_e4m3fn
    assert bytes_of(page) == bytes(payload)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_that_was_cut_is_corrupt(name: str) -> None:
    shape = Geometry(1, 2, 32, 16, "bfloat16")
    spec = tier_codec.PageSpec.of(shape, *tier_codec.parse_codec(name))
    encoded = bytes(tier_codec.encoded_page(payload_of(shape, 2), spec, has_parent=True))
    for length in (0, 10, 47, 60, len(encoded) - 1):
        with pytest.raises(PageCorrupt):
            decode_encoded(encoded[:length])
