"""How a page lies on a device, in numbers."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respkv.kernels.layout import Codec, plane_layout
from respkv.kernels.page_form import PART_ALIGN_BYTES, PageForm, form_of_name
from respkv.page import Geometry

SHAPE = Geometry(layers=3, heads=4, dim=64, tokens=32, dtype="bfloat16")
FIXED = [codec for codec in Codec if codec is not Codec.XS]
geometries = st.builds(
    Geometry,
    layers=st.integers(1, 4),
    heads=st.integers(1, 5),
    dim=st.integers(1, 140),
    tokens=st.integers(1, 70),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)


def test_a_raw_page_has_the_bytes_of_its_geometry() -> None:
    form = PageForm.of(SHAPE)
    assert form.nbytes == SHAPE.page_bytes
    assert form.is_lossless
    assert form.name == "raw"


@given(
    geometries,
    st.sampled_from(FIXED),
    st.sampled_from(FIXED),
    st.integers(0, 6),
    st.integers(0, 6),
)
def test_parts_follow_each_other_aligned_and_the_name_says_it_all(
    shape: Geometry, key: Codec, value: Codec, first: int, last: int
) -> None:
    form = PageForm.of(shape, key, value, exact_first=first, exact_last=last)
    assert form_of_name(form.name, shape) == form
    if form.is_lossless:
        assert form == form.raw == PageForm(shape)
        return
    assert form.tokens + form.num_exact == shape.tokens
    assert form.tokens > 0
    assert form.exact_bytes <= form.keys_offset < form.values_offset < form.nbytes
    assert form.keys_offset % PART_ALIGN_BYTES == form.values_offset % PART_ALIGN_BYTES == 0
    assert form.values_offset - form.keys_offset >= shape.layers * form.plane_bytes("key")
    assert form.nbytes - form.values_offset == shape.layers * form.plane_bytes("value")
    assert form.raw.nbytes == shape.page_bytes


def test_a_plane_has_the_bytes_that_its_codec_says() -> None:
    form = PageForm.of(SHAPE, Codec.I8, Codec.RH4, exact_first=4)
    assert form.plane_bytes("key") == plane_layout(Codec.I8, "key", 28, 4, 64, 2).nbytes
    assert form.plane_bytes("value") == plane_layout(Codec.RH4, "value", 28, 4, 64, 2).nbytes
    assert form.name == "i8/rh4+4+0"


@pytest.mark.parametrize(
    "form",
    [
        PageForm.of(SHAPE, Codec.XS, Codec.XS),
        PageForm.of(SHAPE, Codec.I8, Codec.I8, exact_first=16, exact_last=16),
        PageForm.of(Geometry(1, 1, 64, 16, "float8_e4m3fn"), Codec.I4, Codec.I4),
        PageForm.of(Geometry(1, 1, 64, 16, "int8"), Codec.I4, Codec.I4),
    ],
    ids=["variable size", "no token left", "float8", "int8"],
)
def test_what_cannot_be_encoded_stays_raw(form: PageForm) -> None:
    assert form.is_lossless
    assert form.nbytes == form.geometry.page_bytes


@pytest.mark.parametrize("codec", [codec for codec in FIXED if codec is not Codec.RAW])
def test_one_side_may_stay_raw(codec: Codec) -> None:
    forms = {PageForm.of(SHAPE, *pair) for pair in product([Codec.RAW, codec], repeat=2)}
    assert len(forms) == 4
    assert sum(form.is_lossless for form in forms) == 1


@pytest.mark.parametrize("name", ["", "none", "i8/none", "i8+0+0", "i8+x", "xs", "i8/i8"])
def test_a_name_of_no_form_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"form|int"):
        form_of_name(name, SHAPE)
