"""Copy on write: whole blocks, in every layout, by the reference and by the kernel."""

import pytest
import torch

from respkv.kernels import copy_triton
from respkv.kernels.block_copy import copy_blocks, whole_blocks
from respkv.kernels.paged import SIDES, PagedBuffer
from tests.kernels.caches import LAYOUTS, filled
from tests.kernels.compiled import ARCHES, compile_for

SHAPE = (2, 6, 4, 3, 40)  # L, num_blocks, block_tokens, H, D
PAIRS = ([4, 0, 4], [1, 5, 3])


def check_copied(cache: PagedBuffer, before: PagedBuffer) -> None:
    came_from = {target: source for source, target in zip(*PAIRS, strict=True)}
    for side in SIDES:
        for plane, old in zip(cache.planes(side), before.planes(side), strict=True):
            for block in range(SHAPE[1]):
                assert torch.equal(plane[block], old[came_from.get(block, block)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_whole", [True, False])
def test_targets_become_their_sources_and_nothing_else_changes(layout: str, is_whole: bool) -> None:
    cpu = torch.device("cpu")
    cache, before = (filled(layout, SHAPE, torch.bfloat16, cpu) for _ in range(2))
    sources, targets = map(torch.tensor, PAIRS)
    copy_blocks(whole_blocks(cache) if is_whole else cache, sources, targets)
    check_copied(cache, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_copies_the_same_blocks(layout: str, device: torch.device) -> None:
    cache, before = (filled(layout, SHAPE, torch.bfloat16, device) for _ in range(2))
    view = whole_blocks(cache)
    row = torch.arange(view.shape[1])
    old, new = ((torch.tensor(each)[:, None] * len(row) + row).flatten() for each in PAIRS)
    copy_triton.copy_tokens(view, old.to(device), view, new.to(device), len(old), SIDES)
    check_copied(cache, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_in_one_piece_is_seen_as_wide_rows(layout: str) -> None:
    cache = filled(layout, (1, 2, 16, 8, 128), torch.bfloat16, torch.device("cpu"))
    assert whole_blocks(cache).shape == (
        (2, 16, 8, 128) if layout == "padded" else (2, 16, 1, 1024)
    )


def test_no_blocks_are_no_copy() -> None:
    cache = filled("nhd", SHAPE, torch.bfloat16, torch.device("cpu"))
    nothing = torch.zeros(0, dtype=torch.int64)
    copy_blocks(whole_blocks(cache), nothing, nothing)


@pytest.mark.parametrize(
    ("sources", "targets", "problem"),
    [
        ([0], [6], "not within"),
        ([-1], [0], "not within"),
        ([0, 1], [2, 2], "cannot be written"),
        ([0, 1], [1, 2], "cannot be written"),
        ([0, 1], [2], "two"),
        ([0.0], [1], "two"),
    ],
)
def test_what_cannot_be_copied_is_refused(
    sources: list[int], targets: list[int], problem: str
) -> None:
    cache = filled("nhd", SHAPE, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ValueError, match=problem):
        copy_blocks(cache, torch.tensor(sources), torch.tensor(targets))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("layout", ["nhd", "hnd", "page_first"])
def test_a_block_is_copied_by_the_widest_loads_and_stores(layout: str, arch: int) -> None:
    cache = filled(layout, (1, 2, 16, 8, 128), torch.bfloat16, torch.device("cpu"))
    view = whole_blocks(cache)
    made = compile_for(
        copy_triton.copy_kernel,
        {
            "source": "*i64:16",
            "target": "*i64:16",
            "like": "*i16:16",
            "source_slots": "*i64:16",
            "target_slots": "*i64:16",
            "tokens": "i32:16",
        },
        {"FIRST_SIDE": 0, "SIDES": 2, **copy_triton.tile_shape(view, view)},
        arch,
        num_warps=copy_triton.NUM_WARPS,
    )
    assert made.spill_bytes == 0
    assert max(made.load_bits) == max(made.store_bits) == 128
