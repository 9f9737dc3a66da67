"""Whole pages in their form on a device, held against the planes one by one."""

import pytest
import torch
from torch import Tensor

from respkv.kernels.ladder import decode_planes, encode_planes
from respkv.kernels.layout import Codec, Side
from respkv.kernels.page_coding import as_page, decode_page, encode_page
from respkv.kernels.page_form import PageForm
from respkv.page import Geometry
from tests.kernels.data import seeded

LOSSY = [codec for codec in Codec if not codec.is_lossless]


def make_page(shape: Geometry, device: torch.device) -> Tensor:
    sizes = (shape.layers, 2, shape.tokens, shape.heads, shape.dim)
    page = torch.randn(sizes, generator=seeded(1)).to(getattr(torch, shape.dtype))
    return page.to(device)


def encoded(page: Tensor, form: PageForm) -> tuple[Tensor, bool]:
    out = torch.full((form.nbytes,), 0xA5, dtype=torch.uint8, device=page.device)
    return out, bool(encode_page(page, form, out=out))


def decoded(stored: Tensor, form: PageForm, like: Tensor) -> Tensor:
    return decode_page(stored, form, out=torch.full_like(like, float("nan")))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_each_plane_comes_back_as_by_itself(codec: Codec, dtype: str, device: torch.device) -> None:
    shape = Geometry(layers=2, heads=3, dim=40, tokens=37, dtype=dtype)
    page, form = make_page(shape, device), PageForm.of(shape, codec, codec)
    stored, fits = encoded(page, form)
    assert fits
    back = decoded(stored, form, page)
    sides: tuple[Side, Side] = ("key", "value")
    for number, side in enumerate(sides):
        planes, _ = encode_planes(codec, page[:, number], side=side)
        alone = torch.empty_like(page[:, number])
        decode_planes(codec, planes, side=side, out=alone)
        assert torch.equal(back[:, number], alone)


@pytest.mark.parametrize(("first", "last"), [(4, 0), (0, 16), (4, 16), (36, 0)])
def test_exact_tokens_come_back_exact(first: int, last: int, device: torch.device) -> None:
    shape = Geometry(layers=2, heads=2, dim=32, tokens=37, dtype="bfloat16")
    form = PageForm.of(shape, Codec.RH2, Codec.I4, exact_first=first, exact_last=last)
    page = make_page(shape, device)
    stored, fits = encoded(page, form)
    back = decoded(stored, form, page)
    assert fits
    assert torch.equal(back[:, :, :first], page[:, :, :first])
    assert torch.equal(back[:, :, 37 - last :], page[:, :, 37 - last :])
    assert not back.isnan().any()
    assert not torch.equal(back, page)


def test_one_side_may_be_raw(device: torch.device) -> None:
    shape = Geometry(layers=3, heads=1, dim=9, tokens=5, dtype="float16")
    for form in (
        PageForm.of(shape, Codec.RAW, Codec.I8),
        PageForm.of(shape, Codec.I8, Codec.RAW, exact_last=1),
    ):
        page = make_page(shape, device)
        back = decoded(encoded(page, form)[0], form, page)
        exact = 0 if form.key is Codec.RAW else 1
        assert torch.equal(back[:, exact], page[:, exact])
        assert not torch.equal(back[:, 1 - exact], page[:, 1 - exact])


@pytest.mark.parametrize("side", [0, 1])
def test_a_plane_that_does_not_fit_is_told(side: int, device: torch.device) -> None:
    shape = Geometry(layers=2, heads=2, dim=32, tokens=16, dtype="bfloat16")
    form = PageForm.of(shape, Codec.F8, Codec.I8)
    page = make_page(shape, device)
    page[1, side, 3, 1, 7] = float("inf")
    assert not encoded(page, form)[1]


def test_a_raw_page_is_viewed_without_a_copy(device: torch.device) -> None:
    shape = Geometry(layers=2, heads=2, dim=8, tokens=4, dtype="float32")
    memory = torch.zeros(shape.page_bytes, dtype=torch.uint8, device=device)
    page = as_page(memory, PageForm(shape))
    assert page.shape == (2, 2, 4, 2, 8)
    assert page.data_ptr() == memory.data_ptr()
    page[1, 1, 3, 1, 7] = 1.0
    assert memory.any()
