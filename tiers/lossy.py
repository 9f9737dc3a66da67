"""Lossy codecs: the planes of a page that go through torch, and there and back the tokens that do not.

torch is imported when the first page needs it. It would share each pass over a page among all
processors; here a page is worked on by the thread that has it and no other: as many pages are on
their way at once as there are threads for it, and a shared pass would only wait for the others.
torch keeps this number for each thread, and takes the last one given for threads that are new to
it; those of a model in the same process that were in use before are not slowed down.
"""

import importlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from respkv.errors import TierError
from respkv.kernels.container import PACKED, PLAIN, SIDES, PageHead, exact_bytes, raw_plane_bytes
from respkv.kernels.layout import Codec, PlaneLayout, plane_layout
from respkv.page import DTYPE_BYTES, Geometry
from respkv.tiers.format import Buffer

if TYPE_CHECKING:
    from torch import Tensor

NEEDS_TORCH = "needs torch: install respkv[torch]"


class _Thread(threading.local):
    """Whether torch was told about this thread."""

    is_single = False


_thread = _Thread()


def _torch() -> Any:
    """Import torch, and have it work in this thread alone. Raises TierError when it is not there."""
    try:
        import torch
    except ImportError as error:
        raise TierError(f"the page has a codec that {NEEDS_TORCH}") from error
    if not _thread.is_single:
        torch.set_num_threads(1)
        _thread.is_single = True
    return torch


def _tensor(payload: memoryview, shape: Geometry) -> "Tensor":
    """View a page as [L, 2, T, H, D]."""
    torch = _torch()
    if payload.readonly:  # torch would warn of what nobody does
        payload = memoryview(bytearray(payload))
    sizes = (shape.layers, 2, shape.tokens, shape.heads, shape.dim)
    page: Tensor = torch.frombuffer(payload, dtype=getattr(torch, shape.dtype)).view(sizes)
    return page


def load() -> None:
    """Import what these codecs take, which takes seconds. Raises TierError when it is not there."""
    _torch()
    importlib.import_module("respkv.kernels.ladder")


class PlaneGroup(NamedTuple):
    """The planes of a page that have the same codec and are of the same side, 0 or 1.

    layers: of them, in order. first, last: tokens at the ends of each that the codec leaves alone.
    """

    shape: Geometry
    codec: Codec
    side: int
    layers: list[int]
    first: int
    last: int

    @property
    def layout(self) -> PlaneLayout:
        """What the codec makes of one of them."""
        shape, side = self.shape, SIDES[self.side]
        tokens = shape.tokens - self.first - self.last
        element_bytes = DTYPE_BYTES[shape.dtype]
        return plane_layout(self.codec, side, tokens, shape.heads, shape.dim, element_bytes)


def encode(payload: memoryview, group: PlaneGroup) -> list[tuple[int, list[Buffer]] | None]:
    """Encode a group of planes of a page.

    Returns: for each its form and its bytes, in pieces; None for one that does not fit the codec.
    Raises TierError when torch is not there.
    """
    page = _tensor(payload, group.shape)
    from respkv.kernels import ladder

    planes = _planes(page, group, group.layers)
    encoded, fits = ladder.encode_planes(group.codec, planes, side=SIDES[group.side])
    layout = group.layout
    rows = memoryview(encoded.numpy().data).cast("B")
    made: list[tuple[int, list[Buffer]] | None] = [None] * len(group.layers)
    for number, is_fitting in enumerate(fits.tolist()):
        if is_fitting:
            row = rows[number * layout.nbytes : (number + 1) * layout.nbytes]
            form, body = _packed(group.codec, row, layout)
            made[number] = form, [_exact(payload, group, group.layers[number]), body]
    return made


def decode(head: PageHead, group: PlaneGroup, stored: memoryview, into: memoryview) -> None:
    """Decode a group of planes of an encoded page into the page.

    Raises PageCorrupt when they are not what their codec makes, TierError when torch is not there.
    """
    page = _tensor(into, group.shape)
    import torch

    from respkv.kernels import ladder

    layout = group.layout
    plane_bytes = raw_plane_bytes(group.shape)
    token_bytes = plane_bytes // group.shape.tokens
    first_bytes, last_bytes = group.first * token_bytes, group.last * token_bytes
    rows = memoryview(bytearray(len(group.layers) * layout.nbytes))
    for number, layer in enumerate(group.layers):
        plane = head.plane(layer, SIDES[group.side])
        there = stored[plane.offset : plane.offset + plane.nbytes]
        row = rows[number * layout.nbytes : (number + 1) * layout.nbytes]
        _unpack(plane.form, there[head.exact_bytes(plane) :], layout, row)
        start = (2 * layer + group.side) * plane_bytes
        stop = start + plane_bytes
        into[start : start + first_bytes] = there[:first_bytes]
        into[stop - last_bytes : stop] = there[first_bytes : first_bytes + last_bytes]
    encoded = torch.frombuffer(rows, dtype=torch.uint8).view(len(group.layers), layout.nbytes)
    for at, count in _runs(group.layers):
        target = _planes(page, group, group.layers[at : at + count])
        some = encoded[at : at + count]
        ladder.decode_planes(group.codec, some, side=SIDES[group.side], out=target)


def _exact(payload: memoryview, group: PlaneGroup, layer: int) -> bytes:
    """Return the tokens of a plane that the codec leaves alone, padded."""
    plane_bytes = raw_plane_bytes(group.shape)
    token_bytes = plane_bytes // group.shape.tokens
    start = (2 * layer + group.side) * plane_bytes
    stop = start + plane_bytes
    kept = bytes(payload[start : start + group.first * token_bytes])
    kept += bytes(payload[stop - group.last * token_bytes : stop])
    return kept + bytes(exact_bytes(group.shape, group.codec, group.first, group.last) - len(kept))


def _runs(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut ascending numbers into runs of neighbours: where each starts, and how long it is."""
    start = 0
    for at in range(1, len(layers) + 1):
        if at == len(layers) or layers[at] != layers[at - 1] + 1:
            yield start, at - start
            start = at


def _planes(page: "Tensor", group: PlaneGroup, layers: list[int]) -> "Tensor":
    """Return the planes of some layers, [N, T, H, D] of the tokens that the codec sees.

    It is a view when the layers are neighbours, else a copy.
    """
    span = slice(group.first, group.shape.tokens - group.last)
    if layers[-1] - layers[0] == len(layers) - 1:
        return page[layers[0] : layers[-1] + 1, group.side, span]
    return page[layers, group.side, span]


def _packed(codec: Codec, plane: memoryview, layout: PlaneLayout) -> tuple[int, Buffer]:
    """Return a plane as files hold it: one of ``rhz`` through zstd, where that gains something."""
    if codec.is_entropy_coded:
        from respkv.kernels import entropy

        small = entropy.pack(plane, layout)
        if len(small) < plane.nbytes:
            return PACKED, small
    return PLAIN, plane


def _unpack(form: int, stored: memoryview, layout: PlaneLayout, into: memoryview) -> None:
    if form == PLAIN:
        into[:] = stored
        return
    from respkv.kernels import entropy

    entropy.unpack(stored, layout, into)
