"""The copying kernel against the reference, and what the compiler makes of it."""

from typing import Any

import pytest
import torch

from respkv.kernels import copy_triton
from respkv.kernels.paged import SIDES, PagedBuffer, blocks_of, read_tokens, write_tokens
from tests.kernels.caches import LAYOUTS, bytes_of, cache, filled, some_slots
from tests.kernels.compiled import ARCHES, compile_for
from tests.kernels.data import poisoned

CPU = torch.device("cpu")
SHAPE = (2, 5, 4, 3, 40)  # L, num_blocks, block_tokens, H, D


def reference(
    source: PagedBuffer,
    source_slots: torch.Tensor | None,
    target: PagedBuffer,
    target_slots: torch.Tensor | None,
    tokens: int,
) -> None:
    """Copy with torch alone, wherever the tensors are."""
    there = blocks_of(source, source_slots, tokens)
    here = blocks_of(target, target_slots, tokens)
    for side in SIDES:
        for old, new in zip(source.planes(side), target.planes(side), strict=True):
            write_tokens(new, here, read_tokens(old, there))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["nhd", "hnd"])
def test_the_kernel_copies_from_any_layout_to_any_other(
    layout: str, other: str, device: torch.device
) -> None:
    source = filled(layout, SHAPE, torch.bfloat16, device)
    ours = cache(other, SHAPE, torch.bfloat16, device)
    theirs = cache(other, SHAPE, torch.bfloat16, device)
    old, new = some_slots(source, 13, seed=1), some_slots(ours, 13, seed=2)
    copy_triton.copy_tokens(source, old, ours, new, 13, SIDES)
    reference(source, old, theirs, new, 13)
    assert all(map(torch.equal, bytes_of(ours), bytes_of(theirs)))


# Numbers of D whose tiles are whole, or not, and of sizes from 1 to 8 bytes.
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.int8, 33), (torch.float16, 64), (torch.float32, 1), (torch.float64, 7)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_the_kernel_copies_numbers_of_every_size(
    layout: str, dtype: torch.dtype, dim: int, device: torch.device
) -> None:
    shape = (1, 4, 4, 2, dim)
    source = filled(layout, shape, dtype, device)
    pages = poisoned((3, 1, 2, 5, 2, dim), dtype).to(device)
    ours = PagedBuffer.from_pages(pages)
    slots = some_slots(source, 15)
    copy_triton.copy_tokens(source, slots, ours, None, 15, SIDES)
    theirs = PagedBuffer.from_pages(poisoned((3, 1, 2, 5, 2, dim), dtype).to(device))
    reference(source, slots, theirs, None, 15)
    assert all(map(torch.equal, bytes_of(ours), bytes_of(theirs)))


def test_the_kernel_skips_what_is_nowhere(device: torch.device) -> None:
    source = filled("nhd", SHAPE, torch.bfloat16, device)
    ours, theirs = (cache("hnd", SHAPE, torch.bfloat16, device) for _ in range(2))
    old = torch.tensor([3, -1, 8, 0], device=device)
    new = torch.tensor([7, 1, -5, 2], device=device)
    copy_triton.copy_tokens(source, old, ours, new, 4, SIDES)
    reference(source, old, theirs, new, 4)
    assert all(map(torch.equal, bytes_of(ours), bytes_of(theirs)))


@pytest.mark.parametrize("side", SIDES)
def test_the_kernel_copies_one_side_alone(side: Any, device: torch.device) -> None:
    source = filled("nhd", SHAPE, torch.bfloat16, device)
    ours = cache("nhd", SHAPE, torch.bfloat16, device)
    copy_triton.copy_tokens(source, None, ours, None, 8, (side,))
    for name in SIDES:
        planes = zip(ours.planes(name), source.planes(name), strict=True)
        for new, old in planes:
            assert bool(new.isnan().all()) == (name != side)
            assert name != side or torch.equal(new[:2], old[:2])


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    source = filled("nhd", SHAPE, torch.bfloat16, device)
    copy_triton.copy_tokens(source, None, source, None, 0, SIDES)


def test_a_tile_wastes_few_lanes() -> None:
    widths = {8 * 128: 1024, 128: 128, 80: 128, 8 * 80: 128, 576: 64, 33: 64, 2048: 1024}
    for run, width in widths.items():
        buffer = cache("nhd", (1, 1, 1, 1, run), torch.bfloat16, CPU)
        shape = copy_triton.tile_shape(buffer, buffer)
        assert (shape["WIDTH"], shape["WIDTH"] * shape["ROWS"]) == (width, 8192)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_the_kernel_compiles_to_whole_vectors(layout: str, arch: int) -> None:
    source = cache(layout, (2, 4, 16, 8, 128), torch.bfloat16, CPU)
    pages = cache("page_first", (2, 4, 64, 8, 128), torch.bfloat16, CPU)
    made = compile_for(
        copy_triton.copy_kernel,
        {
            "source": "*i64:16",
            "target": "*i64:16",
            "like": "*i16:16",
            "source_slots": "*i64:16",
            "tokens": "i32:16",
        },
        {
            "target_slots": None,
            "FIRST_SIDE": 0,
            "SIDES": 2,
            **copy_triton.tile_shape(source, pages),
        },
        arch,
        num_warps=copy_triton.NUM_WARPS,
    )
    assert made.spill_bytes == 0
    assert made.store_bits == {128}
    assert made.load_bits == {64, 128}  # addresses and slots, and the numbers
    assert made.registers <= 64
