"""Copy tokens between paged caches of any layouts: one launch for all layers, keys and values.

Gathering pages, scattering them, a block copied on write and every conversion between layouts are
this one copy, since pages are a paged cache too. Numbers are copied as integers of their size.

A tile is tokens by numbers that lie side by side: all heads of a token where both caches have token
before head, the numbers of one head otherwise.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from respkv.kernels import launch
from respkv.kernels.layout import Side, num_groups
from respkv.kernels.paged import PagedBuffer
from respkv.kernels.paged_triton import token_starts

WORDS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# 64 bytes of each of 256 threads: enough loads in flight, and 16 registers for them.
TILE_BYTES: Final = 16384
WIDTH_MAX: Final = 1024
NUM_WARPS: Final = 8


@triton.jit
def copy_kernel(
    source, target, like, source_slots, target_slots, tokens,
    FIRST_SIDE: tl.constexpr, SIDES: tl.constexpr, LAYERS: tl.constexpr, RUNS: tl.constexpr,
    RUN: tl.constexpr, SOURCE_BLOCK_TOKENS: tl.constexpr, SOURCE_STRIDE_BLOCK: tl.constexpr,
    SOURCE_STRIDE_TOKEN: tl.constexpr, SOURCE_STRIDE_HEAD: tl.constexpr,
    TARGET_BLOCK_TOKENS: tl.constexpr, TARGET_STRIDE_BLOCK: tl.constexpr,
    TARGET_STRIDE_TOKEN: tl.constexpr, TARGET_STRIDE_HEAD: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy a tile of ROWS runs by WIDTH numbers; a token has RUNS runs of RUN numbers.

    source, target: [L, 2] int64, addresses of planes. like: a pointer to the words copied.
    Programs:       columns fastest, then sides, layers and rows, so that what runs at the same
                    time is near in caches that keep layers together and in pages.
    """
    COLUMNS: tl.constexpr = (RUN + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    column = program % COLUMNS
    plane = (program // COLUMNS) % (LAYERS * SIDES)
    tile = (program // (COLUMNS * LAYERS * SIDES)).to(tl.int64)

    entry = plane // SIDES * 2 + plane % SIDES + FIRST_SIDE
    old = tl.load(source + entry).to(tl.pointer_type(like.dtype.element_ty))
    new = tl.load(target + entry).to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        old = tl.multiple_of(old, 16)
        new = tl.multiple_of(new, 16)

    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // RUNS
    run = row % RUNS
    inside = token < tokens
    there, can_read = token_starts(
        source_slots, token, inside, SOURCE_BLOCK_TOKENS, SOURCE_STRIDE_BLOCK, SOURCE_STRIDE_TOKEN
    )
    here, can_write = token_starts(
        target_slots, token, inside, TARGET_BLOCK_TOKENS, TARGET_STRIDE_BLOCK, TARGET_STRIDE_TOKEN
    )
    there += run * SOURCE_STRIDE_HEAD
    here += run * TARGET_STRIDE_HEAD

    number = column * WIDTH + tl.arange(0, WIDTH)
    in_run = (number < RUN)[None, :]
    words = tl.load(
        old + there[:, None] + number[None, :], mask=can_read[:, None] & in_run, other=0
    )
    tl.store(new + here[:, None] + number[None, :], words, mask=can_write[:, None] & in_run)


def copy_tokens(
    source: PagedBuffer,
    source_slots: Tensor | None,
    target: PagedBuffer,
    target_slots: Tensor | None,
    tokens: int,
    sides: Sequence[Side],
) -> None:
    """Copy tokens; see ``paged.copy_tokens``, which checks the arguments."""
    shape = tile_shape(source, target)
    columns = num_groups(shape["RUN"], shape["WIDTH"])
    tiles = num_groups(tokens * shape["RUNS"], shape["ROWS"])
    launch.run(
        copy_kernel,
        tiles * source.num_layers * len(sides) * columns,
        source.device,
        source.table,
        target.table,
        source.keys[0].view(WORDS[source.dtype.itemsize]),
        source_slots,
        target_slots,
        tokens,
        FIRST_SIDE=0 if sides[0] == "key" else 1,
        SIDES=len(sides),
        num_warps=NUM_WARPS,
        **shape,
    )


def tile_shape(source: PagedBuffer, target: PagedBuffer) -> dict[str, Any]:
    """Return the constexprs that depend on the caches: the geometry of both, and the tile."""
    here, there = source.geometry(), target.geometry()
    heads, dim = here["HEADS"], here["DIM"]
    runs, run = heads, dim
    if here["STRIDE_HEAD"] == there["STRIDE_HEAD"] == dim:
        runs, run = 1, heads * dim
    width = _width(run)
    rows = max(1, TILE_BYTES // (width * source.dtype.itemsize))
    strides = ("BLOCK_TOKENS", "STRIDE_BLOCK", "STRIDE_TOKEN", "STRIDE_HEAD")
    return {
        "LAYERS": here["LAYERS"],
        "RUNS": runs,
        "RUN": run,
        **{f"SOURCE_{name}": here[name] for name in strides},
        **{f"TARGET_{name}": there[name] for name in strides},
        "ALIGNED": here["ALIGNED"] and there["ALIGNED"],
        "ROWS": rows,
        "WIDTH": width,
    }


def _width(run: int) -> int:
    # The power of two that leaves the fewest lanes idle, and of those the greatest: 640 numbers
    # are five times 128 rather than one time 1024.
    widths = [1 << i for i in range(6, WIDTH_MAX.bit_length())]
    return min(widths, key=lambda width: (num_groups(run, width) * width, -width))
