"""Move KV between a worker's per-layer tensors and pages: the plain torch reference.

A worker keeps K and V per layer as ``[1, H, tokens, D]``; a page is ``[L, 2, T, H, D]`` contiguous,
so that a range of layers is a range of its bytes. Moving is one strided copy per layer and side,
straight into the memory that the caller names: a reserved slot on the way out, the worker's cache
on the way in. Nothing is staged in between.

A range of layers needs no functions of its own: the tensors of layers a to b make and take exactly
the bytes of layers a to b of a page. ``gather_layer`` and ``scatter_layer`` are the step for one
layer, for a worker that streams layer by layer while it computes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

KEY, VALUE = 0, 1


def gather_layer(
    key: Tensor,
    value: Tensor,
    *,
    first_token: int,
    num_pages: int,
    page_tokens: int,
    out: Tensor | None = None,
) -> Tensor:
    """Copy the tokens of one layer into pages.

    key, value: [1, H, tokens, D], any strides, same dtype.
    out:        [P, 2, T, H, D], any strides, e.g. ``pages[:, layer]``; made when not given.
    Returns:    out.
    Raises ValueError when shapes do not fit or the tokens asked for are not there.
    """
    _check_worker_shapes(key, value)
    _, heads, tokens, dim = key.shape
    stop = first_token + num_pages * page_tokens
    if min(first_token, num_pages) < 0 or page_tokens < 1 or stop > tokens:
        raise ValueError(f"tokens {first_token} to {stop} are not within 0 to {tokens}")
    shape = (num_pages, 2, page_tokens, heads, dim)
    if out is None:
        out = key.new_empty(shape)
    _check_target(out, shape, key.dtype)
    for side, tensor in ((KEY, key), (VALUE, value)):
        window = torch.unflatten(tensor[0, :, first_token:stop], 1, (num_pages, page_tokens))
        out[:, side].copy_(window.permute(1, 2, 0, 3))  # [H, P, T, D] -> [P, T, H, D]
    return out


def scatter_layer(pages: Tensor, key: Tensor, value: Tensor, *, first_token: int = 0) -> None:
    """Copy one layer of pages into a worker's tensors; tokens outside the pages are left alone.

    pages:      [P, 2, T, H, D], any strides, e.g. ``pages[:, layer]``.
    key, value: [1, H, tokens, D], any strides, written from ``first_token`` on.
    Raises ValueError when shapes or dtypes do not fit.
    """
    _check_worker_shapes(key, value)
    if pages.dim() != 5:
        raise ValueError(f"pages of a layer must be [P, 2, T, H, D], not {list(pages.shape)}")
    _, heads, tokens, dim = key.shape
    num_pages, page_tokens = pages.shape[0], pages.shape[2]
    stop = first_token + num_pages * page_tokens
    if first_token < 0 or stop > tokens:
        raise ValueError(f"tokens {first_token} to {stop} are not within 0 to {tokens}")
    _check_target(pages, (num_pages, 2, page_tokens, heads, dim), key.dtype)
    for side, tensor in ((KEY, key), (VALUE, value)):
        window = torch.unflatten(tensor[0, :, first_token:stop], 1, (num_pages, page_tokens))
        window.copy_(pages[:, side].permute(2, 0, 1, 3))  # [P, T, H, D] -> [H, P, T, D]


def gather_pages(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    first_token: int,
    num_pages: int,
    page_tokens: int,
    out: Tensor | None = None,
) -> Tensor:
    """Copy a worker's KV of all layers, or of a range of them, into pages.

    keys, values: one [1, H, tokens, D] per layer, any strides, same shape and dtype.
    out:          [P, L, 2, T, H, D] over L layers given here; made when not given.
    Returns:      out.
    Raises ValueError when shapes do not fit or the tokens asked for are not there.
    """
    _check_layers(keys, values)
    _, heads, _, dim = keys[0].shape
    shape = (num_pages, len(keys), 2, page_tokens, heads, dim)
    if out is None:
        out = keys[0].new_empty(shape)
    _check_target(out, shape, keys[0].dtype)
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        gather_layer(
            key,
            value,
            first_token=first_token,
            num_pages=num_pages,
            page_tokens=page_tokens,
            out=out[:, layer],
        )
    return out


def scatter_pages(
    pages: Tensor,
    *,
    keys: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
    first_token: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Copy pages, or a range of their layers, into a worker's per-layer KV.

    pages:        [P, L, 2, T, H, D], any strides.
    keys, values: one [1, H, tokens, D] per layer, written from ``first_token`` on; made with
                  exactly the tokens needed when not given.
    Returns:      keys and values.
    Raises ValueError when shapes or dtypes do not fit.
    """
    if pages.dim() != 6 or pages.shape[2] != 2:
        raise ValueError(f"pages must be [P, L, 2, T, H, D], not {list(pages.shape)}")
    num_pages, layers, _, page_tokens, heads, dim = pages.shape
    if keys is None or values is None:
        if first_token:
            raise ValueError(f"first_token {first_token} needs keys and values to write into")
        shape = (1, heads, num_pages * page_tokens, dim)
        keys = [pages.new_empty(shape) for _ in range(layers)]
        values = [pages.new_empty(shape) for _ in range(layers)]
    _check_layers(keys, values)
    if len(keys) != layers:
        raise ValueError(f"pages of {layers} layers do not fit {len(keys)} layers")
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        scatter_layer(pages[:, layer], key, value, first_token=first_token)
    return list(keys), list(values)


def _check_layers(keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if not keys or len(keys) != len(values):
        raise ValueError(f"{len(keys)} layers of keys and {len(values)} of values do not pair")
    _check_worker_shapes(keys[0], values[0])


def _check_worker_shapes(key: Tensor, value: Tensor) -> None:
    if key.dim() != 4 or key.shape[0] != 1:
        raise ValueError(f"keys must be [1, H, tokens, D], not {list(key.shape)}")
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(
            f"values {list(value.shape)} {value.dtype} do not match"
            f" keys {list(key.shape)} {key.dtype}"
        )


def _check_target(pages: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # copy_ would broadcast a wrong shape and convert a wrong dtype without a word.
    if tuple(pages.shape) != shape or pages.dtype != dtype:
        raise ValueError(
            f"pages must be {list(shape)} {dtype}, not {list(pages.shape)} {pages.dtype}"
        )
