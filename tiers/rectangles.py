"""Rectangles: some layers and some heads of pages, as one of several workers holds them.

With tensor parallelism each worker has a range of the heads, with pipeline parallelism a range of
the layers. What they store is put together to whole pages, ``[L, 2, T, H, D]``, and what they read is
cut out of these, so workers of any layout share pages. A range of layers is a range of bytes; heads
lie strided, and numpy copies them. It is imported when the first are: a server whose workers have
all heads is spared it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from respkv.page import DTYPE_BYTES, Geometry

STEP_BYTES = 1 << 20  # no more is copied at a time


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A range of layers, and of each of them a range of heads."""

    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int

    @classmethod
    def of(
        cls, shape: Geometry, layers: tuple[int, int] | None, heads: tuple[int, int] | None
    ) -> "Rectangle":
        """Return the rectangle of (first, count) ranges; None: all.

        Raises ValueError naming the range that leaves the page.
        """
        return cls(*_range("layers", layers, shape.layers), *_range("heads", heads, shape.heads))

    def has_all_heads(self, shape: Geometry) -> bool:
        """Whether it is a range of bytes."""
        return self.num_heads == shape.heads

    def is_whole(self, shape: Geometry) -> bool:
        """Whether it is all of a page."""
        return self.num_layers == shape.layers and self.has_all_heads(shape)

    def shape(self, shape: Geometry) -> Geometry:
        """Return the shape of what is cut out of a page."""
        return replace(shape, layers=self.num_layers, heads=self.num_heads)

    def cells(self, shape: Geometry) -> int:
        """Return a mask with a bit for each head of each layer."""
        row = ((1 << self.num_heads) - 1) << self.first_head
        mask, num_layers = 0, 0
        for digit in f"{self.num_layers:b}":  # by doubling: a layer at a time would be quadratic
            mask |= mask << (num_layers * shape.heads)
            num_layers *= 2
            if digit == "1":
                mask, num_layers = mask << shape.heads | row, num_layers + 1
        return mask << (self.first_layer * shape.heads)


def all_cells(shape: Geometry) -> int:
    """Return the mask of a whole page, see ``Rectangle.cells``."""
    return (1 << (shape.layers * shape.heads)) - 1


def write_steps(
    page: memoryview, shape: Geometry, rectangle: Rectangle, part: memoryview
) -> Iterator[int]:
    """Copy a rectangle into its page, some layers at a time; yield the bytes of each step.

    page:  the bytes of ``shape``. part: those of the rectangle, ``[L', 2, T, H', D]``.
    """
    layer_bytes = rectangle.shape(shape).layer_bytes
    step = max(1, STEP_BYTES // layer_bytes)
    for first in range(0, rectangle.num_layers, step):
        stop = min(first + step, rectangle.num_layers)
        _write(page, shape, rectangle, part, first, stop)
        yield (stop - first) * layer_bytes


def _write(
    page: memoryview,
    shape: Geometry,
    rectangle: Rectangle,
    part: memoryview,
    first: int,
    stop: int,
) -> None:
    layer_bytes = rectangle.shape(shape).layer_bytes
    source = part[first * layer_bytes : stop * layer_bytes]
    first, stop = first + rectangle.first_layer, stop + rectangle.first_layer
    target = page[first * shape.layer_bytes : stop * shape.layer_bytes]
    if rectangle.has_all_heads(shape):
        target[:] = source
        return
    import numpy as np

    rows, head_bytes = (
        (stop - first) * shape.planes * shape.tokens,
        shape.dim * DTYPE_BYTES[shape.dtype],
    )
    start = rectangle.first_head * head_bytes
    width = rectangle.num_heads * head_bytes
    strided = np.frombuffer(target, np.uint8).reshape(rows, shape.heads * head_bytes)
    strided[:, start : start + width] = np.frombuffer(source, np.uint8).reshape(rows, width)


def cut_heads(tokens: memoryview, shape: Geometry, rectangle: Rectangle) -> bytes:
    """Return the heads of a rectangle, ``[t, H', D]``, of ``[t, H, D]``: K or V of some tokens."""
    import numpy as np

    head_bytes = shape.dim * DTYPE_BYTES[shape.dtype]
    start = rectangle.first_head * head_bytes
    stop = start + rectangle.num_heads * head_bytes
    strided = np.frombuffer(tokens, np.uint8).reshape(-1, shape.heads * head_bytes)
    return strided[:, start:stop].tobytes()


def _range(what: str, given: tuple[int, int] | None, whole: int) -> tuple[int, int]:
    first, count = (0, whole) if given is None else given
    if first < 0 or count < 1 or first + count > whole:
        raise ValueError(f"{what} {first} to {first + count - 1} are not within 0 to {whole - 1}")
    return first, count
