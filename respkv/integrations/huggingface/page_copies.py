"""Copy pages from where they lie into a worker's keys and values, in as few copies as there can be.

A call of torch costs as much as copying some 50 KB, and a page of a small model is not much more.
So the keys and values of all layers are seen as one tensor, where they lie so that they can be, and
pages that lie one behind the other in the server's memory as one piece.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy
import torch
from torch import Tensor

from respkv.page import Geometry

KVPair: TypeAlias = tuple[Tensor, Tensor]


@dataclass(slots=True)
class Stored:
    """Tokens of a prompt as they are stored, a page or a tail, ``[L, 2, count, H, D]``.

    first: its first token. address, nbytes: where it is; someone else holds it there.
    """

    first: int
    count: int
    address: int
    nbytes: int


def address_of(memory: memoryview) -> int:
    """Return where memory begins."""
    address: int = numpy.frombuffer(memory, numpy.uint8).__array_interface__["data"][0]
    return address


class Target:
    """A worker's keys and values: where tokens from ``first`` on go.

    into: K and V of every layer, each ``[n, H, D]``, any strides; row 0 is the token ``first``.
    Raises ValueError when they do not fit the geometry.
    """

    def __init__(self, into: Sequence[KVPair], geometry: Geometry, first: int) -> None:
        self.geometry = geometry
        self.first = first
        self._into = into
        self._dtype: torch.dtype = getattr(torch, geometry.dtype)
        self.room = _check(into, geometry, self._dtype)
        self._whole = as_one(into)
        self.device = into[0][0].device

    def copy(self, pages: Sequence[Stored], stop: int) -> None:
        """Copy what of some pages is from ``first`` up to ``stop``."""
        for run in _runs(pages, self.first, stop):
            source = self._source(run)
            begin, end = max(run[0].first, self.first), min(run[-1].first + run[-1].count, stop)
            if len(run) == 1:
                self.copy_page(source[0], run[0].first, stop)
            else:
                self._copy_many(source, begin, end)

    def copy_page(self, page: Tensor, first: int, stop: int) -> None:
        """Copy what of a page is from ``self.first`` up to ``stop``.

        page: ``[L, 2, T, H, D]``, whose first token is ``first``; best on the device of the target.
        """
        begin, end = max(first, self.first), min(first + page.shape[2], stop)
        self._copy_one(page[:, :, begin - first : end - first], begin, end)

    def copy_layer(self, layer: int, plane: Tensor, begin: int) -> None:
        """Copy one layer of tokens from ``begin`` on, ``[2, count, H, D]``."""
        row = begin - self.first
        for side, tensor in enumerate(self._into[layer]):
            tensor[row : row + plane.shape[1]].copy_(plane[side], non_blocking=True)

    def layer_tensor(self, view: memoryview, count: int) -> Tensor:
        """Return the bytes of one layer as ``[2, count, H, D]``."""
        shape = (2, count, self.geometry.heads, self.geometry.dim)
        return torch.frombuffer(view, dtype=self._dtype).reshape(shape)

    def _source(self, run: Sequence[Stored]) -> Tensor:
        """Return pages at equal distances as ``[P, L, 2, T, H, D]``."""
        page = self.geometry
        step = run[1].address - run[0].address if len(run) > 1 else run[0].nbytes
        span = step * (len(run) - 1) + run[-1].nbytes
        memory = (ctypes.c_ubyte * span).from_address(run[0].address)
        flat = torch.frombuffer(memory, dtype=self._dtype)
        shape = (len(run), page.layers, 2, run[0].count, page.heads, page.dim)
        strides = [1]
        for size in reversed(shape[2:]):
            strides.insert(0, strides[0] * size)
        return flat.as_strided(shape, [step // self._dtype.itemsize, *strides])

    def _copy_one(self, source: Tensor, begin: int, end: int) -> None:
        rows = slice(begin - self.first, end - self.first)
        if self._whole is not None:
            self._whole[:, :, rows].copy_(source, non_blocking=True)
            return
        for layer, pair in enumerate(self._into):
            for side, tensor in enumerate(pair):
                tensor[rows].copy_(source[layer, side], non_blocking=True)

    def _copy_many(self, source: Tensor, begin: int, end: int) -> None:
        rows, sizes = slice(begin - self.first, end - self.first), (len(source), source.shape[3])
        if self._whole is not None:
            window = torch.unflatten(self._whole[:, :, rows], 2, sizes)
            window.copy_(source.permute(1, 2, 0, 3, 4, 5), non_blocking=True)
            return
        for layer, pair in enumerate(self._into):
            for side, tensor in enumerate(pair):
                torch.unflatten(tensor[rows], 0, sizes).copy_(
                    source[:, layer, side], non_blocking=True
                )


def _check(into: Sequence[KVPair], geometry: Geometry, dtype: torch.dtype) -> int:
    """Return how many tokens there is room for. Raises ValueError."""
    if len(into) != geometry.layers:
        raise ValueError(f"into has {len(into)} layers, pages have {geometry.layers}")
    room = into[0][0].shape[0]
    for layer, pair in enumerate(into):
        for tensor in pair:
            if tuple(tensor.shape) != (room, geometry.heads, geometry.dim) or tensor.dtype != dtype:
                raise ValueError(
                    f"into[{layer}] has {list(tensor.shape)} of {tensor.dtype}; expected are"
                    f" [{room}, {geometry.heads}, {geometry.dim}] of {dtype}"
                )
    return room


def as_one(into: Sequence[KVPair]) -> Tensor | None:
    """Return all layers as ``[L, 2, n, H, D]`` without a copy; None where they do not lie so."""
    first = into[0][0]
    places = [tensor for pair in into for tensor in pair]
    memory = first.untyped_storage().data_ptr()
    size = first.element_size()
    for tensor in places:
        if tensor.stride() != first.stride() or tensor.untyped_storage().data_ptr() != memory:
            return None
    offsets = [tensor.storage_offset() for tensor in places]
    side = offsets[1] - offsets[0]
    layer = offsets[2] - offsets[0] if len(into) > 1 else 2 * side
    if side < 0 or layer < 0 or size < 1:
        return None
    if offsets != [offsets[0] + n // 2 * layer + n % 2 * side for n in range(len(places))]:
        return None
    shape = (len(into), 2, *first.shape)
    return first.as_strided(shape, (layer, side, *first.stride()), offsets[0])


def _runs(pages: Sequence[Stored], first: int, stop: int) -> Iterator[list[Stored]]:
    """Cut pages into runs that are one copy each: whole ones at equal distances in memory."""
    run: list[Stored] = []
    step = 0
    for page in pages:
        if page.first >= stop or page.first + page.count <= first:
            continue
        if run:
            distance = page.address - run[-1].address
            is_whole = run[0].first >= first and page.first + page.count <= stop
            fits = page.count == run[0].count and distance > 0 and distance % 64 == 0
            if is_whole and fits and (len(run) == 1 or distance == step):
                step = distance
                run.append(page)
                continue
            yield run
        run = [page]
    if run:
        yield run
