"""The reference is compared with indexing element by element; outputs start as NaN."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from respkv.kernels.pages import gather_layer, gather_pages, scatter_layer, scatter_pages
from respkv.page import Geometry

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# layers, tokens, heads, dim, page_tokens, first_token, num_pages
SHAPES = [
    (1, 1, 1, 1, 1, 0, 1),
    (2, 7, 3, 5, 2, 1, 3),
    (3, 64, 2, 64, 16, 0, 4),
    (2, 130, 1, 33, 63, 3, 2),
    (1, 10, 4, 8, 4, 10, 0),
]


def worker_kv(layers: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Return one side of a worker's KV: [1, H, tokens, D] per layer, every element different."""
    generator = torch.Generator().manual_seed(layers * 1000 + tokens)
    shape = (1, heads, tokens, dim)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(layers)]


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def naive_pages(
    keys: list[Tensor], values: list[Tensor], first: int, num_pages: int, page_tokens: int
) -> Tensor:
    _, heads, _, dim = keys[0].shape
    pages = poisoned(num_pages, len(keys), 2, page_tokens, heads, dim, dtype=keys[0].dtype)
    for page in range(num_pages):
        for layer in range(len(keys)):
            for token in range(page_tokens):
                at = first + page * page_tokens + token
                pages[page, layer, 0, token] = keys[layer][0, :, at]
                pages[page, layer, 1, token] = values[layer][0, :, at]
    return pages


def same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_matches_indexing_and_fills_all_of_a_poisoned_output(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layers, tokens, heads, dim, page_tokens, first, num_pages = shape
    keys = worker_kv(layers, tokens, heads, dim, dtype)
    values = [-key for key in keys]
    out = poisoned(num_pages, layers, 2, page_tokens, heads, dim, dtype=dtype)
    returned = gather_pages(
        keys, values, first_token=first, num_pages=num_pages, page_tokens=page_tokens, out=out
    )
    assert returned is out
    same(out, naive_pages(keys, values, first, num_pages, page_tokens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scatter_undoes_gather(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layers, tokens, heads, dim, page_tokens, first, num_pages = shape
    keys = worker_kv(layers, tokens, heads, dim, dtype)
    values = [key + 1 for key in keys]
    pages = gather_pages(
        keys, values, first_token=first, num_pages=num_pages, page_tokens=page_tokens
    )
    stop = first + num_pages * page_tokens
    ours_keys, ours_values = scatter_pages(pages)
    for layer in range(layers):
        same(ours_keys[layer], keys[layer][:, :, first:stop])
        same(ours_values[layer], values[layer][:, :, first:stop])
        assert ours_keys[layer].is_contiguous()


def test_scatter_writes_only_the_tokens_of_its_pages() -> None:
    pages = torch.ones(2, 1, 2, 3, 2, 4)
    keys, values = [poisoned(1, 2, 9, 4, dtype=torch.float32) for _ in range(2)]
    scatter_pages(pages, keys=[keys], values=[values], first_token=2)
    for side in (keys, values):
        assert side[:, :, 2:8].eq(1).all()
        assert side[:, :, :2].isnan().all()
        assert side[:, :, 8:].isnan().all()


def test_a_page_of_a_layer_range_is_that_byte_range_of_the_page() -> None:
    keys, values = worker_kv(5, 8, 2, 4, torch.float16), worker_kv(5, 8, 2, 4, torch.float16)
    page = gather_pages(keys, values, first_token=0, num_pages=1, page_tokens=8)
    layers = gather_pages(keys[1:4], values[1:4], first_token=0, num_pages=1, page_tokens=8)
    start, stop = Geometry(layers=5, heads=2, dim=4, tokens=8, dtype="float16").layer_range(1, 3)
    whole = page.view(torch.uint8).numpy().tobytes()
    assert layers.view(torch.uint8).numpy().tobytes() == whole[start:stop]


def test_layers_streamed_one_by_one_make_the_same_pages() -> None:
    keys, values = worker_kv(4, 12, 3, 5, torch.bfloat16), worker_kv(4, 12, 3, 5, torch.bfloat16)
    pages = poisoned(3, 4, 2, 4, 3, 5, dtype=torch.bfloat16)
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        gather_layer(key, value, first_token=0, num_pages=3, page_tokens=4, out=pages[:, layer])
    same(pages, gather_pages(keys, values, first_token=0, num_pages=3, page_tokens=4))
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        back_key, back_value = poisoned(2, 1, 3, 12, 5, dtype=torch.bfloat16)
        scatter_layer(pages[:, layer], back_key, back_value)
        same(back_key, key)
        same(back_value, value)


def test_a_page_is_written_straight_into_the_memory_it_was_given() -> None:
    """As with a reserved slot: bytes that torch does not own, at an offset."""
    slot = bytearray(b"\xff" * (64 + 2 * 2 * 4 * 3 * 8 * 4))
    page = torch.frombuffer(slot, dtype=torch.float32, offset=64).view(1, 2, 2, 4, 3, 8)
    keys, values = worker_kv(2, 4, 3, 8, torch.float32), worker_kv(2, 4, 3, 8, torch.float32)
    gather_pages(keys, values, first_token=0, num_pages=1, page_tokens=4, out=page)
    expected = naive_pages(keys, values, 0, 1, 4).numpy().tobytes()
    assert slot == b"\xff" * 64 + expected


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    layers, heads, dim, page_tokens = (draw(st.integers(1, 4)) for _ in range(4))
    num_pages, first, rest = (draw(st.integers(0, 4)) for _ in range(3))
    order = tuple(draw(st.permutations(range(4))))
    tokens = first + num_pages * page_tokens + rest
    shape = (layers, max(tokens, 1), heads, dim, page_tokens, first, num_pages)
    return shape, order, draw(st.booleans())


def strided(tensor: Tensor, order: tuple[int, ...], padded: bool) -> Tensor:
    """Return an equal tensor whose memory is laid out in another order, with gaps when padded."""
    shape = [tensor.shape[axis] for axis in order]
    memory = torch.full([*shape, 2 if padded else 1], torch.nan, dtype=tensor.dtype)[..., 0]
    back = [order.index(axis) for axis in range(4)]
    return memory.permute(back).copy_(tensor)


@given(layouts(), st.sampled_from(DTYPES))
def test_any_strides_give_the_same_pages_and_come_back(
    layout: tuple[tuple[int, ...], tuple[int, ...], bool], dtype: torch.dtype
) -> None:
    shape, order, padded = layout
    layers, tokens, heads, dim, page_tokens, first, num_pages = shape
    plain = worker_kv(layers, tokens, heads, dim, dtype)
    keys = [strided(key, order, padded) for key in plain]
    values = [strided(2 * key, order, padded) for key in plain]
    pages = gather_pages(
        keys, values, first_token=first, num_pages=num_pages, page_tokens=page_tokens
    )
    same(pages, naive_pages(plain, [2 * key for key in plain], first, num_pages, page_tokens))
    back_keys = [strided(torch.full_like(key, torch.nan), order, padded) for key in plain]
    back_values = [strided(torch.full_like(key, torch.nan), order, padded) for key in plain]
    scatter_pages(pages, keys=back_keys, values=back_values, first_token=first)
    stop = first + num_pages * page_tokens
    for layer, key in enumerate(plain):
        same(back_keys[layer][:, :, first:stop], key[:, :, first:stop])
        same(back_values[layer][:, :, first:stop], 2 * key[:, :, first:stop])
        assert back_keys[layer][:, :, stop:].isnan().all()


KEY = torch.zeros(1, 2, 8, 4)
PAGES = torch.zeros(2, 1, 2, 4, 2, 4)


@pytest.mark.parametrize(
    ("keys", "values", "first", "out", "message"),
    [
        ([KEY], [KEY], 1, None, "not within 0 to 8"),
        ([KEY], [KEY], -1, None, "not within 0 to 8"),
        ([KEY], [KEY, KEY], 0, None, "do not pair"),
        ([], [], 0, None, "do not pair"),
        ([KEY], [KEY.half()], 0, None, "do not match"),
        ([KEY], [KEY[:, :1]], 0, None, "do not match"),
        ([KEY.expand(2, 2, 8, 4)], [KEY], 0, None, "keys must be"),
        ([KEY[0]], [KEY[0]], 0, None, "keys must be"),
        ([KEY], [KEY], 0, PAGES[:1], "pages must be"),
        ([KEY], [KEY], 0, PAGES.half(), "pages must be"),
        ([KEY, KEY], [KEY, KEY], 0, PAGES, "pages must be"),
        ([KEY, KEY[:, :, :4]], [KEY, KEY[:, :, :4]], 0, None, "not within 0 to 4"),
        ([KEY, KEY.half()], [KEY, KEY.half()], 0, None, "pages must be"),
    ],
)
def test_gather_refuses_what_does_not_fit(
    keys: list[Tensor], values: list[Tensor], first: int, out: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gather_pages(keys, values, first_token=first, num_pages=2, page_tokens=4, out=out)


@pytest.mark.parametrize(
    ("pages", "keys", "values", "first", "message"),
    [
        (PAGES[0], None, None, 0, "pages must be"),
        (PAGES[:, :, :1], None, None, 0, "pages must be"),
        (PAGES, None, None, 1, "needs keys and values"),
        (PAGES, [KEY], [KEY], 1, "not within 0 to 8"),
        (PAGES, [KEY], [KEY], -1, "not within 0 to 8"),
        (PAGES, [KEY, KEY], [KEY, KEY], 0, "do not fit 2 layers"),
        (PAGES.half(), [KEY], [KEY], 0, "pages must be"),
        (PAGES, [KEY[:, :1]], [KEY[:, :1]], 0, "pages must be"),
        (PAGES, [KEY], [KEY.half()], 0, "do not match"),
    ],
)
def test_scatter_refuses_what_does_not_fit(
    pages: Tensor,
    keys: list[Tensor] | None,
    values: list[Tensor] | None,
    first: int,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        scatter_pages(pages, keys=keys, values=values, first_token=first)


def test_scatter_layer_refuses_pages_of_all_layers() -> None:
    with pytest.raises(ValueError, match="pages of a layer must be"):
        scatter_layer(PAGES, KEY, KEY)
