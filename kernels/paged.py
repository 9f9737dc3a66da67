"""Move pages straight from and into a worker's paged KV cache.

A worker keeps K and V of each layer in blocks of tokens, in an order of its own: token before head
or head before token, all layers in one allocation or each in its own, K beside V or apart. All of
these are strides: a ``PagedBuffer`` is L pairs of ``[num_blocks, block_tokens, H, D]`` views with
common strides, and a kernel finds a plane through a small table of addresses. So one launch serves
all layers of many pages, whatever the layout, and pages in any layout are such a buffer too. Where
tokens are, ``slots`` says, as an engine's slot mapping does.

Tensors in memory take the plain torch reference, on a GPU kernels/copy_triton.py does the work;
kernels/paged_coding.py encodes on the way.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from respkv.kernels.layout import Side

SIDES: Final[tuple[Side, Side]] = ("key", "value")
VECTOR_BYTES: Final = 16  # of the widest access of a thread
Places = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PagedBuffer:
    """The paged KV cache of a worker: views of its memory, nothing of its own.

    keys, values: per layer [num_blocks, block_tokens, H, D]; one shape, dtype, device and strides;
                  the numbers of a head lie side by side.
    Raises ValueError when they are not so.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    table: Tensor = field(init=False, repr=False)  # [L, 2] int64: where keys and values begin

    def __post_init__(self) -> None:
        _check_views(self.keys, self.values)
        pairs = zip(self.keys, self.values, strict=True)
        rows = [[key.data_ptr(), value.data_ptr()] for key, value in pairs]
        table = to_device(torch.tensor(rows, dtype=torch.int64), self.device)
        object.__setattr__(self, "table", table)

    @classmethod
    def from_nhd(cls, layers: Sequence[Tensor]) -> "PagedBuffer":
        """Take [2, num_blocks, block_tokens, H, D] per layer: token before head."""
        return cls(tuple(kv[0] for kv in layers), tuple(kv[1] for kv in layers))

    @classmethod
    def from_hnd(cls, layers: Sequence[Tensor]) -> "PagedBuffer":
        """Take [2, num_blocks, H, block_tokens, D] per layer: head before token."""
        return cls.from_nhd([kv.transpose(2, 3) for kv in layers])

    @classmethod
    def from_pages(cls, pages: Tensor) -> "PagedBuffer":
        """Take pages [P, L, 2, T, H, D], any strides but the last: a block is a page's plane."""
        if pages.dim() != 6 or pages.shape[2] != 2:
            raise ValueError(f"pages must be [P, L, 2, T, H, D], not {list(pages.shape)}")
        layers = pages.unbind(1)
        return cls(tuple(kv[:, 0] for kv in layers), tuple(kv[:, 1] for kv in layers))

    @classmethod
    def from_planes(cls, planes: Tensor) -> "PagedBuffer":
        """Take planes [N, T, H, D], of one side, as N blocks of one layer."""
        return cls((planes,), (planes,))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return num_blocks, block_tokens, H, D."""
        blocks, tokens, heads, dim = self.keys[0].shape
        return blocks, tokens, heads, dim

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the numbers."""
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        """Return where the cache is."""
        return self.keys[0].device

    @property
    def num_layers(self) -> int:
        """Return L."""
        return len(self.keys)

    @property
    def num_slots(self) -> int:
        """Return how many tokens the cache holds."""
        return self.shape[0] * self.shape[1]

    @property
    def is_aligned(self) -> bool:
        """Whether each run of D numbers begins at a multiple of 16 bytes."""
        strides = self.keys[0].stride()[:3]
        if any(stride * self.dtype.itemsize % VECTOR_BYTES for stride in strides):
            return False
        return not any(each.data_ptr() % VECTOR_BYTES for each in (*self.keys, *self.values))

    def geometry(self) -> dict[str, Any]:
        """Return the constexprs by which kernels find rows: a worker has one cache shape."""
        _, block_tokens, heads, dim = self.shape
        block, token, head, _ = self.keys[0].stride()
        return {
            "LAYERS": self.num_layers,
            "HEADS": heads,
            "DIM": dim,
            "BLOCK_TOKENS": block_tokens,
            "STRIDE_BLOCK": block,
            "STRIDE_TOKEN": token,
            "STRIDE_HEAD": head,
            "ALIGNED": self.is_aligned,
        }

    def planes(self, side: Side) -> tuple[Tensor, ...]:
        """Return the views of one side, a layer each."""
        return self.keys if side == "key" else self.values


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a small table to a device without waiting for what that has still to do.

    From memory that is not pinned the copy would wait for the stream; the pinned copy is kept by
    torch until the stream has passed it.
    """
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


def gather_pages_paged(
    buffer: PagedBuffer, slots: Tensor, *, page_tokens: int, out: Tensor | None = None
) -> Tensor:
    """Copy tokens out of a worker's cache into pages [P, L, 2, T, H, D], made when not given.

    slots: as of ``encode_paged``. out: any strides, but the numbers of a head side by side.
    Raises ValueError when shapes, dtypes or slots do not fit.
    """
    num_pages = check_slots(buffer, slots, page_tokens)
    _, _, heads, dim = buffer.shape
    if out is None:
        shape = (num_pages, buffer.num_layers, 2, page_tokens, heads, dim)
        out = torch.empty(shape, dtype=buffer.dtype, device=buffer.device)
    copy_tokens(buffer, slots, _pages_of(out, num_pages, page_tokens), None, tokens=slots.numel())
    return out


def scatter_pages_paged(
    pages: Tensor, buffer: PagedBuffer, slots: Tensor, *, page_tokens: int
) -> None:
    """Copy pages [P, L, 2, T, H, D] into a worker's cache; slots as of ``decode_paged``.

    Raises ValueError when shapes, dtypes or slots do not fit.
    """
    num_pages = check_slots(buffer, slots, page_tokens)
    copy_tokens(_pages_of(pages, num_pages, page_tokens), None, buffer, slots, tokens=slots.numel())


def copy_tokens(
    source: PagedBuffer,
    source_slots: Tensor | None,
    target: PagedBuffer,
    target_slots: Tensor | None,
    *,
    tokens: int,
    sides: Sequence[Side] = SIDES,
) -> None:
    """Copy tokens of all layers from one cache to another; their layouts may differ.

    source_slots, target_slots: [tokens] int64 each; None when token i is at slot i. A token that is
    nowhere in the source is zeros; one that is nowhere in the target is not written.
    Raises ValueError when the caches do not match.
    """
    if (source.num_layers, source.shape[2:], source.dtype, source.device) != (
        target.num_layers,
        target.shape[2:],
        target.dtype,
        target.device,
    ):
        raise ValueError(
            f"{source.num_layers} layers of {source.shape[2:]} {source.dtype} on {source.device}"
            f" are not {target.num_layers} of {target.shape[2:]} {target.dtype} on {target.device}"
        )
    for buffer, slots in ((source, source_slots), (target, target_slots)):
        if slots is not None:
            check_slots(buffer, slots, tokens or 1)
        elif tokens > buffer.num_slots:
            raise ValueError(f"{tokens} tokens are not within {buffer.num_slots} slots")
    if source.device.type != "cpu":
        # A machine without a GPU need not have triton, which this imports.
        kernels: Any = importlib.import_module("respkv.kernels.copy_triton")
        kernels.copy_tokens(source, source_slots, target, target_slots, tokens, sides)
        return
    where_from = blocks_of(source, source_slots, tokens)
    where_to = blocks_of(target, target_slots, tokens)
    for side in sides:
        for old, new in zip(source.planes(side), target.planes(side), strict=True):
            write_tokens(new, where_to, read_tokens(old, where_from))


def check_slots(buffer: PagedBuffer, slots: Tensor, page_tokens: int) -> int:
    """Return of how many pages these are the slots. Raises ValueError when they cannot be slots."""
    if page_tokens < 1 or slots.dim() != 1 or slots.numel() % page_tokens:
        raise ValueError(
            f"slots {list(slots.shape)} are not those of pages of {page_tokens} tokens"
        )
    if slots.dtype != torch.int64 or slots.device != buffer.device or not slots.is_contiguous():
        raise ValueError(
            f"slots must be contiguous int64 on {buffer.device}, not {slots.dtype}"
            f" of strides {slots.stride()} on {slots.device}"
        )
    # On a GPU looking at them would wait for all that is queued before.
    if slots.device.type == "cpu" and slots.numel() and int(slots.max()) >= buffer.num_slots:
        raise ValueError(f"slot {int(slots.max())} is not within {buffer.num_slots} slots")
    return slots.numel() // page_tokens


def blocks_of(buffer: PagedBuffer, slots: Tensor | None, tokens: int) -> Places:
    """Return block and offset of each token, and whether it is anywhere (0 and 0 if not)."""
    if slots is None:
        slots = torch.arange(tokens, device=buffer.device)
    is_there = slots >= 0
    slots = slots.clamp(min=0)
    return slots // buffer.shape[1], slots % buffer.shape[1], is_there


def read_tokens(plane: Tensor, where: Places) -> Tensor:
    """Return tokens [N, H, D] of a plane, zeros for one that is nowhere."""
    block, offset, is_there = where
    return plane[block, offset].masked_fill_(~is_there[:, None, None], 0)


def write_tokens(plane: Tensor, where: Places, tokens: Tensor) -> None:
    """Write tokens [N, H, D] of a plane, but not one that is nowhere."""
    block, offset, is_there = where
    plane[block[is_there], offset[is_there]] = tokens[is_there]


def _pages_of(pages: Tensor, num_pages: int, page_tokens: int) -> PagedBuffer:
    if tuple(pages.shape[i] for i in (0, 3) if i < pages.dim()) != (num_pages, page_tokens):
        raise ValueError(
            f"slots name {num_pages} pages of {page_tokens} tokens, pages are {list(pages.shape)}"
        )
    return PagedBuffer.from_pages(pages)


def _check_views(keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    if not keys or len(keys) != len(values):
        raise ValueError(f"{len(keys)} layers of keys and {len(values)} of values do not pair")
    first = keys[0]
    if first.dim() != 4:
        raise ValueError(f"keys must be [num_blocks, block_tokens, H, D], not {list(first.shape)}")
    if first.stride(3) != 1 and first.shape[3] > 1:
        raise ValueError(
            f"the numbers of a head must lie side by side, not {first.stride(3)} apart"
        )
    kind = (first.shape, first.dtype, first.device, first.stride())
    for each in (*keys, *values):
        if (each.shape, each.dtype, each.device, each.stride()) != kind:
            raise ValueError(
                f"{list(each.shape)} {each.dtype} of strides {each.stride()} on {each.device} does"
                f" not match {list(first.shape)} {first.dtype} of strides {first.stride()}"
                f" on {first.device}"
            )
