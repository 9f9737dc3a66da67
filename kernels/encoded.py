"""Decode an encoded page on the device where it is wanted.

What a server hands out ``AS raw`` goes to the device as it came, a third or a quarter of the page's
bytes, and is decoded there. zstd alone has to be undone before, on the host: the codes of rhz, and
the byte planes of numbers that are not bfloat16.
"""

import torch
from torch import Tensor

from respkv.errors import PageCorrupt
from respkv.kernels import entropy, lossless
from respkv.kernels.container import (
    PACKED,
    SIDES,
    Buffer,
    PageHead,
    Plane,
    raw_plane_bytes,
    read_head,
)
from respkv.kernels.ladder import decode_planes, decode_xs
from respkv.kernels.layout import ALIGN_BYTES, Codec, plane_layout
from respkv.page import DTYPE_BYTES


def decode_encoded(encoded: Buffer, *, device: torch.device | str = "cpu") -> Tensor:
    """Decode an encoded page.

    encoded: head, table and planes (kernels/container.py).
    Returns: [L, 2, T, H, D] of the page's dtype on the device.
    Raises PageCorrupt naming what is wrong: nothing is believed before it was checked.
    """
    view = memoryview(encoded).cast("B")
    head = read_head(view)
    shape = head.geometry
    dtype: torch.dtype = getattr(torch, shape.dtype)
    sizes = (shape.layers, 2, shape.tokens, shape.heads, shape.dim)
    if head.is_payload:
        return _to(view[head.head_bytes :], device).view(dtype).view(sizes)
    page = torch.empty(sizes, dtype=dtype, device=device)
    stored = _to(view, device)
    groups: dict[tuple[Codec, int], list[int]] = {}
    for number, plane in enumerate(head.planes):
        layer, side = divmod(number, 2)
        if plane.codec.is_lossless:
            _decode_lossless(head, plane, view, stored, page[layer, side])
        else:
            groups.setdefault((plane.codec, side), []).append(layer)
    for (codec, side), layers in groups.items():
        _decode_group(head, codec, side, layers, view, stored, page)
    return page


def _to(view: memoryview, device: torch.device | str) -> Tensor:
    # torch would warn of memory that may not be written to, and never writes to it here; the copy
    # to a device must not be of memory that its owner takes back.
    return torch.frombuffer(bytearray(view), dtype=torch.uint8).to(device)


def _decode_lossless(
    head: PageHead, plane: Plane, view: memoryview, stored: Tensor, into: Tensor
) -> None:
    stop = plane.offset + plane.nbytes
    if plane.codec == Codec.RAW:
        into.copy_(stored[plane.offset : stop].view(into.dtype).view(into.shape))
    elif plane.form == PACKED:
        made = bytearray(raw_plane_bytes(head.geometry))
        lossless.decode(lossless.ZSTD, view[plane.offset : stop], memoryview(made))
        into.copy_(_to(memoryview(made), into.device).view(into.dtype).view(into.shape))
    else:
        decode_xs(stored[plane.offset : stop], into)


def _decode_group(
    head: PageHead,
    codec: Codec,
    side: int,
    layers: list[int],
    view: memoryview,
    stored: Tensor,
    page: Tensor,
) -> None:
    """Decode the planes of one side that have the same codec, in one launch."""
    shape = head.geometry
    first, stop = head.exact_first, shape.tokens - head.exact_last
    layout = plane_layout(
        codec, SIDES[side], stop - first, shape.heads, shape.dim, DTYPE_BYTES[shape.dtype]
    )
    rows: list[Tensor] = []
    for layer in layers:
        plane = head.plane(layer, SIDES[side])
        at, end = plane.offset + head.exact_bytes(plane), plane.offset + plane.nbytes
        if plane.form == PACKED:
            row = bytearray(layout.nbytes)
            entropy.unpack(view[at:end], layout, memoryview(row))
            rows.append(_to(memoryview(row), page.device))
        else:
            rows.append(stored[at:end])
        _copy_exact(head, stored[plane.offset : at], page[layer, side])
    sizes = (len(layers), stop - first, shape.heads, shape.dim)
    planes = torch.empty(sizes, dtype=page.dtype, device=page.device)
    page[layers, side, first:stop] = decode_planes(
        codec, torch.stack(rows), side=SIDES[side], out=planes
    )


def _copy_exact(head: PageHead, kept: Tensor, into: Tensor) -> None:
    """Copy the tokens of a plane that its codec left alone."""
    count = head.exact_first + head.exact_last
    if not count:
        return
    token_bytes = raw_plane_bytes(head.geometry) // head.geometry.tokens
    if kept.numel() < count * token_bytes or kept.storage_offset() % ALIGN_BYTES:
        raise PageCorrupt(f"{count} exact tokens do not fit {kept.numel()} bytes")
    exact = kept[: count * token_bytes].view(into.dtype).view(count, *into.shape[1:])
    into[: head.exact_first] = exact[: head.exact_first]
    into[into.shape[0] - head.exact_last :] = exact[head.exact_first :]
