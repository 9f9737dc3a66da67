"""Encode pages straight out of a worker's paged KV cache, and decode them straight into it.

One launch per side serves all layers of many pages, whatever the cache's layout, and nothing is
gathered into a buffer in between. Tensors in memory take the plain torch reference: gather, then
kernels/ladder.py.
"""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from respkv.kernels import ladder
from respkv.kernels.layout import Codec, Side, plane_layout
from respkv.kernels.paged import (
    SIDES,
    VECTOR_BYTES,
    PagedBuffer,
    blocks_of,
    check_slots,
    copy_tokens,
    read_tokens,
    write_tokens,
)


def encode_paged(
    codec_k: Codec,
    codec_v: Codec,
    buffer: PagedBuffer,
    slots: Tensor,
    *,
    page_tokens: int,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode pages of all layers out of a worker's cache.

    codec_k, codec_v: of the keys and of the values; any but ``XS``, whose size is not fixed.
    slots:            [P * T] int64 on the buffer's device: block * block_tokens + offset of each
                      token, page after page; a negative one reads as zeros. On a GPU the caller
                      answers for slots being within the cache.
    out:              where to: [P, L, bytes of a plane] uint8 of keys and of values, the last
                      dimension contiguous, planes at multiples of 16 bytes; made when not given.
    Returns:          encoded keys and values (out), and [P, L, 2] bool: whether a plane fits its
                      codec. The bytes of one that does not are of no use: it must go as it is.
    Raises ValueError when shapes, dtypes or slots do not fit.
    """
    num_pages = check_slots(buffer, slots, page_tokens)
    if out is None:
        out = (
            _new_encoded(codec_k, "key", buffer, num_pages, page_tokens),
            _new_encoded(codec_v, "value", buffer, num_pages, page_tokens),
        )
    fits = torch.ones((num_pages, buffer.num_layers, 2), dtype=torch.bool, device=buffer.device)
    for index, (codec, side) in enumerate(zip((codec_k, codec_v), SIDES, strict=True)):
        check_encoded(codec, side, buffer, num_pages, page_tokens, out[index])
        _encode_side(codec, side, buffer, slots, page_tokens, out[index], fits[:, :, index])
    return out[0], out[1], fits


def decode_paged(
    codec_k: Codec,
    codec_v: Codec,
    buffer: PagedBuffer,
    slots: Tensor,
    encoded_k: Tensor,
    encoded_v: Tensor,
    *,
    page_tokens: int,
) -> None:
    """Decode pages of all layers into a worker's cache; arguments as of ``encode_paged``.

    A token whose slot is negative is written nowhere; two tokens with one slot leave either.
    Raises ValueError when shapes, dtypes or slots do not fit.
    """
    num_pages = check_slots(buffer, slots, page_tokens)
    sides = zip((codec_k, codec_v), SIDES, (encoded_k, encoded_v), strict=True)
    for codec, side, encoded in sides:
        check_encoded(codec, side, buffer, num_pages, page_tokens, encoded)
        _decode_side(codec, side, buffer, slots, page_tokens, encoded)


def encode_planes_on_device(
    codec: Codec, planes: Tensor, *, side: Side, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Encode planes [N, T, H, D] of one side where they are, on a GPU.

    planes:  any strides; copied first when the numbers of a head are not side by side.
    out:     [N, bytes of a plane] uint8 as of ``encode_paged``; made when not given.
    Returns: out, and [N] bool: which planes fit.
    """
    buffer = PagedBuffer.from_planes(planes if planes.stride(3) == 1 else planes.contiguous())
    count, tokens = planes.shape[:2]
    if out is None:
        out = _new_encoded(codec, side, buffer, count, tokens)[:, 0]
    fits = torch.ones(count, dtype=torch.bool, device=planes.device)
    check_encoded(codec, side, buffer, count, tokens, out[:, None])
    _encode_side(codec, side, buffer, None, tokens, out[:, None], fits[:, None])
    return out, fits


def decode_planes_on_device(codec: Codec, encoded: Tensor, *, side: Side, out: Tensor) -> None:
    """Decode [N, bytes of a plane] uint8 of one side into planes [N, T, H, D], any strides."""
    planes = (
        out if out.stride(3) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    buffer = PagedBuffer.from_planes(planes)
    count, tokens = out.shape[:2]
    check_encoded(codec, side, buffer, count, tokens, encoded[:, None])
    _decode_side(codec, side, buffer, None, tokens, encoded[:, None])
    if planes is not out:
        out.copy_(planes)


def check_encoded(
    codec: Codec, side: Side, buffer: PagedBuffer, num_pages: int, page_tokens: int, encoded: Tensor
) -> None:
    """Raise ValueError unless this can be the encoded planes of one side, [P, L, bytes] uint8."""
    nbytes = _plane_bytes(codec, side, buffer, page_tokens)
    shape = (num_pages, buffer.num_layers, nbytes)
    if encoded.shape != shape or encoded.dtype != torch.uint8:
        raise ValueError(
            f"encoded {side}s must be {list(shape)} uint8,"
            f" not {list(encoded.shape)} {encoded.dtype}"
        )
    if encoded.device != buffer.device:
        raise ValueError(f"encoded {side}s are on {encoded.device}, the cache on {buffer.device}")
    places = [encoded.data_ptr(), *(encoded.stride(i) for i in (0, 1) if encoded.shape[i] > 1)]
    if encoded.stride(2) != 1 or any(place % VECTOR_BYTES for place in places):
        raise ValueError(
            f"encoded {side}s must be contiguous planes at multiples of {VECTOR_BYTES} bytes,"
            f" not of strides {encoded.stride()} at {encoded.data_ptr():#x}"
        )


def _encode_side(
    codec: Codec,
    side: Side,
    buffer: PagedBuffer,
    slots: Tensor | None,
    page_tokens: int,
    out: Tensor,
    fits: Tensor,
) -> None:
    _zero_padding(codec, side, buffer, page_tokens, out)
    if codec == Codec.RAW:
        tokens = out.shape[0] * page_tokens
        target = _raw_planes(buffer, page_tokens, out)
        copy_tokens(buffer, slots, target, None, tokens=tokens, sides=(side,))
    elif buffer.device.type != "cpu":
        _kernels_of(codec).encode(codec, side, buffer, slots, page_tokens, out, fits)
    else:
        where = blocks_of(buffer, slots, out.shape[0] * page_tokens)
        for layer, plane in enumerate(buffer.planes(side)):
            planes = torch.unflatten(read_tokens(plane, where), 0, (-1, page_tokens))
            encoded, fit = ladder.encode_planes(codec, planes, side=side)
            out[:, layer] = encoded
            fits[:, layer] = fit


def _decode_side(
    codec: Codec,
    side: Side,
    buffer: PagedBuffer,
    slots: Tensor | None,
    page_tokens: int,
    encoded: Tensor,
) -> None:
    tokens = encoded.shape[0] * page_tokens
    if codec == Codec.RAW:
        source = _raw_planes(buffer, page_tokens, encoded)
        copy_tokens(source, None, buffer, slots, tokens=tokens, sides=(side,))
    elif buffer.device.type != "cpu":
        _kernels_of(codec).decode(codec, side, buffer, slots, page_tokens, encoded)
    else:
        where = blocks_of(buffer, slots, tokens)
        planes = torch.empty((encoded.shape[0], page_tokens, *buffer.shape[2:]), dtype=buffer.dtype)
        for layer, plane in enumerate(buffer.planes(side)):
            ladder.decode_planes(codec, encoded[:, layer], side=side, out=planes)
            write_tokens(plane, where, planes.flatten(0, 1))


def _kernels_of(codec: Codec) -> Any:
    # Both modules import triton, which a machine without a GPU need not have.
    if codec.is_rotated:
        return importlib.import_module("respkv.kernels.rotate_triton")
    return importlib.import_module("respkv.kernels.quantize_triton")


def _raw_planes(buffer: PagedBuffer, page_tokens: int, encoded: Tensor) -> PagedBuffer:
    shape = (page_tokens, *buffer.shape[2:])
    nbytes = math.prod(shape) * buffer.dtype.itemsize
    planes = torch.unflatten(encoded[..., :nbytes].view(buffer.dtype), 2, shape).unbind(1)
    return PagedBuffer(planes, planes)


def _plane_bytes(codec: Codec, side: Side, buffer: PagedBuffer, page_tokens: int) -> int:
    if codec == Codec.XS:
        raise ValueError("planes of xs have no size before they are encoded")
    heads, dim = buffer.shape[2:]
    return plane_layout(codec, side, page_tokens, heads, dim, buffer.dtype.itemsize).nbytes


def _new_encoded(
    codec: Codec, side: Side, buffer: PagedBuffer, num_pages: int, page_tokens: int
) -> Tensor:
    nbytes = _plane_bytes(codec, side, buffer, page_tokens)
    shape = (num_pages, buffer.num_layers, nbytes)
    return torch.empty(shape, dtype=torch.uint8, device=buffer.device)


def _zero_padding(
    codec: Codec, side: Side, buffer: PagedBuffer, page_tokens: int, out: Tensor
) -> None:
    # Equal pages are equal bytes. Shapes of models leave no room between sections.
    heads, dim = buffer.shape[2:]
    layout = plane_layout(codec, side, page_tokens, heads, dim, buffer.dtype.itemsize)
    ends = [*(section.offset for section in layout.sections[1:]), layout.nbytes]
    for section, end in zip(layout.sections, ends, strict=True):
        if section.offset + section.nbytes < end:
            out[..., section.offset + section.nbytes : end].zero_()
