"""The paged cache and the plain copies, in memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from respkv.kernels import pages as contiguous
from respkv.kernels.paged import (
    PagedBuffer,
    copy_tokens,
    gather_pages_paged,
    scatter_pages_paged,
)
from tests.kernels.caches import LAYOUTS, bytes_of, cache, filled, some_slots
from tests.kernels.data import poisoned

CPU = torch.device("cpu")
SHAPE = (3, 7, 4, 2, 6)  # L, num_blocks, block_tokens, H, D


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_pages_are_the_tokens_in_the_order_of_their_slots(layout: str, dtype: torch.dtype) -> None:
    buffer = filled(layout, SHAPE, dtype, CPU)
    slots = some_slots(buffer, 15)
    pages = gather_pages_paged(buffer, slots, page_tokens=5)
    assert pages.shape == (3, 3, 2, 5, 2, 6)
    for token, slot in enumerate(slots.tolist()):
        for layer in range(3):
            for side, planes in enumerate((buffer.keys, buffer.values)):
                there = pages[token // 5, layer, side, token % 5]
                assert torch.equal(there, planes[layer][slot // 4, slot % 4])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scattering_writes_what_was_gathered_and_nothing_else(layout: str) -> None:
    buffer = filled("nhd", SHAPE, torch.bfloat16, CPU)
    slots = some_slots(buffer, 12)
    pages = gather_pages_paged(buffer, slots, page_tokens=4)
    target = cache(layout, SHAPE, torch.bfloat16, CPU)
    scatter_pages_paged(pages, target, slots, page_tokens=4)
    again = gather_pages_paged(target, slots, page_tokens=4)
    assert torch.equal(again, pages)
    for plane in (*target.keys, *target.values):
        assert int(plane.isfinite().sum()) == slots.numel() * 2 * 6


def test_pages_are_those_of_a_worker_that_keeps_its_tokens_in_order() -> None:
    buffer = filled("hnd", (2, 1, 12, 3, 5), torch.float16, CPU)
    keys = [key.transpose(1, 2) for key in buffer.keys]  # [1, H, tokens, D]
    values = [value.transpose(1, 2) for value in buffer.values]
    expected = contiguous.gather_pages(keys, values, first_token=0, num_pages=3, page_tokens=4)
    assert torch.equal(gather_pages_paged(buffer, torch.arange(12), page_tokens=4), expected)


def test_a_token_that_is_nowhere_reads_as_zeros_and_is_not_written() -> None:
    buffer = filled("nhd", SHAPE, torch.bfloat16, CPU)
    slots = torch.tensor([3, -1, 8, -1])
    pages = gather_pages_paged(buffer, slots, page_tokens=2)
    assert not pages[:, :, :, 1].any()
    target = cache("nhd", SHAPE, torch.bfloat16, CPU)
    scatter_pages_paged(pages + 1, target, slots, page_tokens=2)
    assert int(target.keys[0].isfinite().sum()) == 2 * 2 * 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_becomes_any_other(layout: str) -> None:
    source = filled(layout, SHAPE, torch.float16, CPU)
    for other in LAYOUTS:
        target = cache(other, SHAPE, torch.float16, CPU)
        copy_tokens(source, None, target, None, tokens=source.num_slots)
        assert all(map(torch.equal, bytes_of(target), bytes_of(source)))


def test_a_copied_block_leaves_its_source_alone() -> None:
    buffer = filled("page_first", SHAPE, torch.float16, CPU)
    before = buffer.keys[1][2].clone()
    old, new = torch.arange(8, 12), torch.arange(20, 24)  # blocks 2 and 5
    copy_tokens(buffer, old, buffer, new, tokens=4)
    assert torch.equal(buffer.keys[1][5], before)
    assert torch.equal(buffer.keys[1][2], before)


def test_no_pages_are_gathered_and_scattered_too() -> None:
    buffer = filled("nhd", SHAPE, torch.bfloat16, CPU)
    none = torch.empty(0, dtype=torch.int64)
    pages = gather_pages_paged(buffer, none, page_tokens=16)
    assert pages.shape == (0, 3, 2, 16, 2, 6)
    scatter_pages_paged(pages, buffer, none, page_tokens=16)


def test_alignment_is_of_every_row() -> None:
    assert filled("nhd", (1, 2, 2, 2, 8), torch.bfloat16, CPU).is_aligned
    assert not filled("nhd", (1, 2, 2, 2, 6), torch.bfloat16, CPU).is_aligned
    assert not filled("padded", (1, 2, 2, 2, 8), torch.bfloat16, CPU).is_aligned
    assert not PagedBuffer.from_planes(torch.zeros(65)[1:].view(1, 2, 4, 8)).is_aligned


def plane(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD_VIEWS: dict[str, tuple[Callable[[], object], str]] = {
    "no layers": (lambda: PagedBuffer((), ()), "0 layers of keys"),
    "a value missing": (lambda: PagedBuffer((plane(1, 1, 1, 2),), ()), "do not pair"),
    "three dimensions": (
        lambda: PagedBuffer.from_planes(plane(1, 1, 2)),
        r"must be \[num_blocks",
    ),
    "two dtypes": (
        lambda: PagedBuffer((plane(1, 1, 1, 2),), (plane(1, 1, 1, 2, dtype=torch.float16),)),
        "does not match",
    ),
    "two strides": (
        lambda: PagedBuffer((plane(2, 3, 3, 2),), (plane(2, 3, 3, 2).transpose(1, 2),)),
        "of strides",
    ),
    "numbers apart": (
        lambda: PagedBuffer.from_planes(plane(2, 3, 2, 4).transpose(2, 3)),
        "side by side",
    ),
    "pages of one side": (lambda: PagedBuffer.from_pages(plane(1, 1, 1, 4, 1, 2)), "pages must be"),
}


@pytest.mark.parametrize("case", BAD_VIEWS)
def test_views_that_are_no_cache_are_refused(case: str) -> None:
    make, said = BAD_VIEWS[case]
    with pytest.raises(ValueError, match=said):
        make()


BAD_SLOTS: dict[str, tuple[Tensor, int, str]] = {
    "part of a page": (torch.arange(7), 4, "are not those of pages of 4"),
    "no tokens in a page": (torch.arange(8), 0, "are not those of pages of 0"),
    "two dimensions": (torch.zeros(2, 4, dtype=torch.int64), 4, "are not those"),
    "32 bits": (torch.arange(8, dtype=torch.int32), 4, "must be contiguous int64"),
    "every other": (torch.arange(16)[::2], 4, "must be contiguous int64"),
    "past the end": (torch.arange(24, 32), 4, "slot 31 is not within 28"),
}


@pytest.mark.parametrize("case", BAD_SLOTS)
def test_slots_that_cannot_be_are_refused(case: str) -> None:
    slots, page_tokens, said = BAD_SLOTS[case]
    with pytest.raises(ValueError, match=said):
        gather_pages_paged(
            filled("nhd", SHAPE, torch.bfloat16, CPU), slots, page_tokens=page_tokens
        )


def test_pages_that_do_not_fit_are_refused() -> None:
    buffer = filled("nhd", SHAPE, torch.bfloat16, CPU)
    slots = torch.arange(8)
    with pytest.raises(ValueError, match="2 pages of 4 tokens"):
        scatter_pages_paged(plane(1, 3, 2, 4, 2, 6), buffer, slots, page_tokens=4)
    with pytest.raises(ValueError, match="are not 3 of"):
        scatter_pages_paged(plane(2, 2, 2, 4, 2, 6), buffer, slots, page_tokens=4)
    out = poisoned((2, 3, 2, 4, 2, 6), torch.float16)
    with pytest.raises(ValueError, match=r"are not 3 of .* torch.float16"):
        gather_pages_paged(buffer, slots, page_tokens=4, out=out)
    with pytest.raises(ValueError, match="29 tokens are not within 28"):
        copy_tokens(buffer, None, buffer, None, tokens=29)
