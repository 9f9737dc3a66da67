"""Whole pages to and from their form on a device, in a few launches for all layers.

Everything happens on the device and the stream that are current, and nothing waits for it: whether
a page fits its codecs is a tensor as well. Temporary memory is about one page.
"""

import torch
from torch import Tensor

from respkv.kernels.ladder import decode_planes, encode_planes
from respkv.kernels.layout import Codec, Side
from respkv.kernels.page_form import PageForm


def as_page(stored: Tensor, form: PageForm) -> Tensor:
    """View the bytes of a raw page as the page, without a copy.

    stored:  [page_bytes] uint8, contiguous, aligned for the dtype.
    Returns: [L, 2, T, H, D].
    """
    shape = form.geometry
    dtype: torch.dtype = getattr(torch, shape.dtype)
    sizes = (shape.layers, 2, shape.tokens, shape.heads, shape.dim)
    return stored.view(dtype).view(sizes)


def encode_page(page: Tensor, form: PageForm, *, out: Tensor) -> Tensor:
    """Write a page in an encoded form.

    page:    [L, 2, T, H, D], any strides.
    out:     [form.nbytes] uint8, contiguous.
    Returns: [] bool: whether every plane fits; if not, ``out`` is not the page.
    """
    assert not form.is_lossless
    first, stop = form.exact_first, form.geometry.tokens - form.exact_last
    if form.num_exact:
        exact = torch.cat([page[:, :, :first], page[:, :, stop:]], dim=2)
        _exact_part(out, form).copy_(exact)
    keys, values = page[:, 0, first:stop], page[:, 1, first:stop]
    key_fits = _encode(form.key, keys, "key", _keys_part(out, form))
    value_fits = _encode(form.value, values, "value", _values_part(out, form))
    return torch.logical_and(key_fits, value_fits)


def decode_page(stored: Tensor, form: PageForm, *, out: Tensor) -> Tensor:
    """Read a page in an encoded form.

    stored:  [form.nbytes] uint8, contiguous.
    out:     [L, 2, T, H, D] of the page's dtype, any strides.
    Returns: out.
    """
    assert not form.is_lossless
    first, stop = form.exact_first, form.geometry.tokens - form.exact_last
    if form.num_exact:
        exact = _exact_part(stored, form)
        out[:, :, :first].copy_(exact[:, :, :first])
        out[:, :, stop:].copy_(exact[:, :, first:])
    keys, values = out[:, 0, first:stop], out[:, 1, first:stop]
    _decode(form.key, _keys_part(stored, form), "key", keys)
    _decode(form.value, _values_part(stored, form), "value", values)
    return out


def _encode(codec: Codec, planes: Tensor, side: Side, out: Tensor) -> Tensor:
    """Encode planes [L, T, H, D] into [L, plane_bytes]; return whether all of them fit."""
    if codec is Codec.RAW:
        _numbers(out, planes).copy_(planes)
        return torch.ones((), dtype=torch.bool, device=out.device)
    return encode_planes(codec, planes, side=side, out=out)[1].all()


def _decode(codec: Codec, stored: Tensor, side: Side, out: Tensor) -> None:
    if codec is Codec.RAW:
        out.copy_(_numbers(stored, out))
    else:
        decode_planes(codec, stored, side=side, out=out)


def _numbers(stored: Tensor, like: Tensor) -> Tensor:
    """View raw planes [L, plane_bytes] as what they are, of shape and dtype of ``like``."""
    layers, *plane = like.shape
    nbytes = like[0].numel() * like.element_size()
    return stored[:, :nbytes].view(like.dtype).view(layers, *plane)


def _exact_part(stored: Tensor, form: PageForm) -> Tensor:
    shape = form.geometry
    dtype: torch.dtype = getattr(torch, shape.dtype)
    sizes = (shape.layers, 2, form.num_exact, shape.heads, shape.dim)
    return stored[: form.exact_bytes].view(dtype).view(sizes)


def _keys_part(stored: Tensor, form: PageForm) -> Tensor:
    start, plane_bytes = form.keys_offset, form.plane_bytes("key")
    layers = form.geometry.layers
    return stored[start : start + layers * plane_bytes].view(layers, plane_bytes)


def _values_part(stored: Tensor, form: PageForm) -> Tensor:
    start, plane_bytes = form.values_offset, form.plane_bytes("value")
    layers = form.geometry.layers
    return stored[start : start + layers * plane_bytes].view(layers, plane_bytes)
