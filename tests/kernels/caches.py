"""Workers' paged caches in every layout, for tests of the kernels that read and write them."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from respkv.kernels.paged import PagedBuffer
from tests.kernels.data import poisoned, seeded

# [num_blocks, block_tokens, H, D] per layer, K and V, out of one allocation.
Shape = tuple[int, int, int, int, int]  # L, num_blocks, block_tokens, H, D


def nhd(shape: Shape, dtype: torch.dtype) -> PagedBuffer:
    """Token before head, a tensor for each layer."""
    layers, *block = shape
    return PagedBuffer.from_nhd([poisoned((2, *block), dtype) for _ in range(layers)])


def hnd(shape: Shape, dtype: torch.dtype) -> PagedBuffer:
    """Head before token, a tensor for each layer."""
    layers, blocks, tokens, heads, dim = shape
    kv = (2, blocks, heads, tokens, dim)
    return PagedBuffer.from_hnd([poisoned(kv, dtype) for _ in range(layers)])


def interleaved(shape: Shape, dtype: torch.dtype) -> PagedBuffer:
    """K beside V in each block: [num_blocks, 2, block_tokens, H, D]."""
    layers, blocks, *rest = shape
    each = [poisoned((blocks, 2, *rest), dtype).transpose(0, 1) for _ in range(layers)]
    return PagedBuffer.from_nhd(each)


def page_first(shape: Shape, dtype: torch.dtype) -> PagedBuffer:
    """All layers of a block together, as pages are: [num_blocks, L, 2, block_tokens, H, D]."""
    layers, blocks, *rest = shape
    return PagedBuffer.from_pages(poisoned((blocks, layers, 2, *rest), dtype))


def padded(shape: Shape, dtype: torch.dtype) -> PagedBuffer:
    """Rows with a gap of one number behind them, so that none but the first is aligned."""
    layers, *rest, dim = shape
    wide = [poisoned((2, *rest, dim + 1), dtype) for _ in range(layers)]
    return PagedBuffer.from_nhd([kv[..., :dim] for kv in wide])


LAYOUTS: Final[dict[str, Callable[[Shape, torch.dtype], PagedBuffer]]] = {
    "nhd": nhd,
    "hnd": hnd,
    "interleaved": interleaved,
    "page_first": page_first,
    "padded": padded,
}


def cache(layout: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> PagedBuffer:
    """Return an empty cache: all NaN."""
    with torch.device("cpu"):
        made = LAYOUTS[layout](shape, dtype)
    return made if device.type == "cpu" else moved(made, device)


def filled(
    layout: str, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PagedBuffer:
    """Return a cache of random numbers, the same in every layout."""
    made = LAYOUTS[layout](shape, dtype)
    generator = seeded(seed)
    for plane in (*made.keys, *made.values):
        numbers = torch.randn(plane.shape, generator=generator) * 3
        plane.copy_(numbers if dtype.is_floating_point else numbers.mul(20).to(dtype))
    return made if device.type == "cpu" else moved(made, device)


def moved(buffer: PagedBuffer, device: torch.device) -> PagedBuffer:
    """Return a copy of a cache on a device, strides included."""

    def move(plane: Tensor) -> Tensor:
        there = torch.empty_strided(plane.shape, plane.stride(), dtype=plane.dtype, device=device)
        return there.copy_(plane)

    return PagedBuffer(tuple(map(move, buffer.keys)), tuple(map(move, buffer.values)))


def some_slots(buffer: PagedBuffer, count: int, seed: int = 1) -> Tensor:
    """Return ``count`` slots of a cache, no two equal, in no order."""
    slots = torch.randperm(buffer.num_slots, generator=seeded(seed))[:count]
    return slots.to(buffer.device)


def bytes_of(buffer: PagedBuffer) -> list[Tensor]:
    """Return all numbers of a cache as bytes in memory: NaN is equal to itself."""
    return [plane.cpu().contiguous().view(torch.uint8) for plane in (*buffer.keys, *buffer.values)]
