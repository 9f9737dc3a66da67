"""``xs`` on a GPU: launches the kernels of exponent_window_triton.py and exponent_blocks_triton.py.

Two launches encode any number of planes, one decodes them, straight out of and into a worker's paged
cache where D is a power of two; else by way of contiguous planes.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from respkv.errors import PageCorrupt
from respkv.kernels import launch
from respkv.kernels.exponent_blocks_triton import decode_block_kernel, encode_block_kernel
from respkv.kernels.exponent_window_triton import window_kernel
from respkv.kernels.layout import ALIGN_BYTES, XS_BLOCK, XS_INFO_BYTES, Side, num_groups
from respkv.kernels.paged import SIDES, PagedBuffer, copy_tokens

NUMBERS_MAX: Final = 1 << 30  # of a plane: offsets within one are 32 bits
# Told of no limit ptxas sets itself one of 80 registers on sm_90, and spills.
WINDOW_OPTIONS: Final[dict[str, Any]] = {"num_warps": 8, "maxnreg": 112}
BLOCK_WARPS: Final = 4
PROGRAMS_MIN: Final = 2048
SHARE_MAX: Final = 4


def encode(planes: Tensor) -> list[Tensor | None]:
    """Encode planes [N, T, H, D] bfloat16, any strides; waits for their sizes.

    Returns: for each [bytes] uint8, views of one memory; None where that would not be smaller.
    """
    count, tokens, _heads, _dim = planes.shape
    if not planes.numel():
        return [None] * count
    buffer = PagedBuffer.from_planes(planes.contiguous())
    encoded, sizes = encode_paged(buffer, "key", None, page_tokens=tokens, num_pages=count)
    taken: list[int] = sizes[:, 0].tolist()
    return [encoded[i, 0, :size] if size else None for i, size in enumerate(taken)]


def decode(encoded: Tensor, out: Tensor) -> None:
    """Decode a plane, [bytes] uint8, into out [T, H, D] bfloat16, any strides; waits for it.

    Raises PageCorrupt when these are not the bytes of a plane of so many numbers.
    """
    numbers = (
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    buffer = PagedBuffer.from_planes(numbers.unsqueeze(0))
    is_good = decode_paged([encoded], buffer, "key", None, page_tokens=out.shape[0])
    if not bool(is_good.all()):
        raise PageCorrupt(f"xs: {encoded.numel()} bytes that are no plane of {out.numel()} numbers")
    if numbers is not out:
        out.copy_(numbers)


def encode_paged(
    buffer: PagedBuffer, side: Side, slots: Tensor | None, *, page_tokens: int, num_pages: int
) -> tuple[Tensor, Tensor]:
    """Encode the planes of one side of pages in a worker's cache; waits for nothing.

    slots:   [P * T] int64 as of ``paged_coding.encode_paged``; None: page p is block p.
    Returns: [P, L, capacity] uint8, and [P, L] int32: how many bytes of each are its encoding, 0
             where that would not be smaller than the plane.
    Raises ValueError for numbers that are not bfloat16, and for planes of over 2^30 numbers.
    """
    if not _is_direct(buffer, slots, page_tokens):
        buffer, slots = _gathered(buffer, side, slots, page_tokens, num_pages), None
    shape = plane_shape(buffer, side, slots, page_tokens)
    device, layers = buffer.device, buffer.num_layers
    capacity = num_groups(2 * shape["NUMBERS"], ALIGN_BYTES) * ALIGN_BYTES
    out = torch.empty((num_pages, layers, capacity), dtype=torch.uint8, device=device)
    sizes = torch.empty((num_pages, layers), dtype=torch.int32, device=device)
    planes, blocks = num_pages * layers, shape["BLOCKS"]
    share = share_of(planes, blocks)
    counts = torch.empty((planes, blocks, 256), dtype=torch.int16, device=device)
    given = (buffer.table, buffer.keys[0], slots, out, sizes)
    strides = out.stride()[:2]
    launch.run(window_kernel, planes, device, *given, counts, *strides, **WINDOW_OPTIONS, **shape)
    launch.run(
        encode_block_kernel,
        planes * num_groups(blocks, share),
        device,
        *given,
        *strides,
        SHARE=share,
        num_warps=BLOCK_WARPS,
        **shape,
    )
    return out, sizes


def decode_paged(
    encoded: Sequence[Tensor] | Tensor,
    buffer: PagedBuffer,
    side: Side,
    slots: Tensor | None,
    *,
    page_tokens: int,
    sizes: Tensor | None = None,
) -> Tensor:
    """Decode planes of one side of pages into a worker's cache; waits for nothing.

    encoded: P * L planes, page after page, each [bytes] uint8, contiguous, which must live until the
             kernel has run; or [P, L, capacity] uint8 with ``sizes``, as ``encode_paged`` gives both,
             which takes no look at each plane.
    Returns: [P, L] bool: whether a plane's bytes can be one's of so many numbers. What was written
             for one whose cannot, or that has none, is of no use.
    """
    num_pages = len(encoded) // (1 if isinstance(encoded, Tensor) else buffer.num_layers)
    if not _is_direct(buffer, slots, page_tokens):
        planes = _new_planes(buffer, page_tokens, num_pages)
        good = decode_paged(encoded, planes, side, None, page_tokens=page_tokens, sizes=sizes)
        tokens = num_pages * page_tokens
        copy_tokens(planes, None, buffer, slots, tokens=tokens, sides=(side,))
        return good
    device, count = buffer.device, num_pages * buffer.num_layers
    shape = plane_shape(buffer, side, slots, page_tokens)
    share = share_of(count, shape["BLOCKS"])
    if isinstance(encoded, Tensor):
        assert sizes is not None
        kept = [encoded]
        places, lengths = _places_in(encoded, sizes)
    else:
        places, lengths, kept = _places_of(encoded, device)
    good = torch.ones((num_pages, buffer.num_layers), dtype=torch.bool, device=device)
    launch.run(
        decode_block_kernel,
        count * num_groups(shape["BLOCKS"], share),
        device,
        buffer.table,
        buffer.keys[0],
        slots,
        places,
        lengths,
        good.view(torch.uint8),
        SHARE=share,
        num_warps=BLOCK_WARPS,
        **shape,
    )
    del kept  # copies made for the kernel: until it is queued
    return good


def share_of(planes: int, blocks: int) -> int:
    """Return how many blocks a program does: more than one where all SMs have several programs."""
    share = SHARE_MAX
    while share > 1 and planes * num_groups(blocks, share) < PROGRAMS_MIN:
        share //= 2
    return share


def plane_shape(
    buffer: PagedBuffer, side: Side, slots: Tensor | None, page_tokens: int
) -> dict[str, Any]:
    """Return the constexprs that all three kernels have in common. Raises ValueError."""
    geometry = buffer.geometry()
    numbers = page_tokens * geometry["HEADS"] * geometry["DIM"]
    if buffer.dtype != torch.bfloat16 or not 0 < numbers <= NUMBERS_MAX:
        raise ValueError(f"xs is for planes of bfloat16, not of {numbers} {buffer.dtype}")
    return {
        **geometry,
        "TOKENS": page_tokens,
        "SIDE": SIDES.index(side),
        "NUMBERS": numbers,
        "BLOCKS": num_groups(numbers, XS_BLOCK),
        "FLAT": _is_flat(buffer, slots, page_tokens),
    }


def _is_flat(buffer: PagedBuffer, slots: Tensor | None, page_tokens: int) -> bool:
    return slots is None and buffer.shape[1] == page_tokens and buffer.keys[0][0].is_contiguous()


def _is_direct(buffer: PagedBuffer, slots: Tensor | None, page_tokens: int) -> bool:
    dim = buffer.shape[3]
    is_power = dim & (dim - 1) == 0 and dim <= XS_BLOCK
    return is_power or _is_flat(buffer, slots, page_tokens)


def _new_planes(buffer: PagedBuffer, page_tokens: int, num_pages: int) -> PagedBuffer:
    shape = (buffer.num_layers, num_pages, page_tokens, *buffer.shape[2:])
    planes = torch.empty(shape, dtype=buffer.dtype, device=buffer.device).unbind(0)
    return PagedBuffer(planes, planes)


def _gathered(
    buffer: PagedBuffer, side: Side, slots: Tensor | None, page_tokens: int, num_pages: int
) -> PagedBuffer:
    planes = _new_planes(buffer, page_tokens, num_pages)
    tokens = num_pages * page_tokens
    copy_tokens(buffer, slots, planes, None, tokens=tokens, sides=(side,))
    return planes


def _places_in(encoded: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    # Addresses and sizes of planes [P, L, capacity], on their device.
    pages, layers, _ = encoded.shape
    page = torch.arange(pages, device=encoded.device).unsqueeze(1) * encoded.stride(0)
    layer = torch.arange(layers, device=encoded.device) * encoded.stride(1)
    return (page + layer + encoded.data_ptr()).flatten(), sizes.to(torch.int64).flatten()


def _places_of(
    encoded: Sequence[Tensor], device: torch.device
) -> tuple[Tensor, Tensor, list[Tensor]]:
    # Addresses and sizes of planes, copied without waiting for what the device does, and the planes.
    # One that is too short for its head is read from one that is wrong.
    spare = torch.zeros(XS_INFO_BYTES, dtype=torch.uint8, device=device)
    kept = [_aligned(each) if each.numel() >= XS_INFO_BYTES else spare for each in encoded]
    rows = torch.tensor(
        [[each.data_ptr() for each in kept], [each.numel() for each in kept]], dtype=torch.int64
    )
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[0], rows[1], kept


def _aligned(encoded: Tensor) -> Tensor:
    return encoded.clone() if encoded.data_ptr() % ALIGN_BYTES else encoded
