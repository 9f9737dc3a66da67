"""Rectangles of pages: what is cut out and put together again is the page, bit by bit."""

import itertools

import numpy
import pytest

from respkv.page import Geometry, Latents
from respkv.tiers.rectangles import STEP_BYTES, Rectangle, all_cells, cut_heads, write_steps

SHAPES = [
    Geometry(layers=1, heads=1, dim=1, tokens=1, dtype="int8"),
    Geometry(layers=4, heads=8, dim=16, tokens=5, dtype="bfloat16"),
    Geometry(layers=3, heads=2, dim=7, tokens=16, dtype="float32"),
    Latents(layers=3, heads=1, dim=9, tokens=4, dtype="float16"),
]


def cut(size: int, parts: int) -> list[tuple[int, int]]:
    """Return ranges that together are all of ``size``."""
    borders = [size * part // parts for part in range(parts + 1)]
    return [(first, stop - first) for first, stop in itertools.pairwise(borders) if stop > first]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_rectangles_of_a_page_make_it(shape: Geometry, parts: int) -> None:
    random = numpy.random.default_rng(parts)
    page = random.integers(0, 256, shape.page_bytes, dtype=numpy.uint8)
    rows = page.reshape(shape.layers, shape.planes * shape.tokens, shape.heads, -1)
    made, cells = bytearray(b"\xaa" * shape.page_bytes), 0
    for layers, heads in itertools.product(cut(shape.layers, parts), cut(shape.heads, parts)):
        rectangle = Rectangle.of(shape, layers, heads)
        part = rows[layers[0] : sum(layers), :, heads[0] : sum(heads)].tobytes()
        assert len(part) == rectangle.shape(shape).page_bytes
        assert not cells & rectangle.cells(shape)
        cells |= rectangle.cells(shape)
        copied = sum(write_steps(memoryview(made), shape, rectangle, memoryview(part)))
        assert copied == len(part)
    assert made == page.tobytes()
    assert cells == all_cells(shape)


def test_heads_are_cut_out_of_some_tokens() -> None:
    shape = SHAPES[1]
    tokens = numpy.random.default_rng(0).integers(0, 1 << 16, (3, 8, 16), dtype=numpy.uint16)
    for heads in itertools.chain(cut(8, 3), cut(8, 8)):
        rectangle = Rectangle.of(shape, None, heads)
        got = cut_heads(memoryview(tokens.tobytes()), shape, rectangle)
        assert got == tokens[:, heads[0] : sum(heads)].tobytes()


def test_a_large_rectangle_is_copied_in_steps() -> None:
    shape = Geometry(layers=16, heads=4, dim=128, tokens=256, dtype="float16")
    rectangle = Rectangle.of(shape, (1, 15), (1, 2))
    part = memoryview(bytes(rectangle.shape(shape).page_bytes))
    steps = list(write_steps(memoryview(bytearray(shape.page_bytes)), shape, rectangle, part))
    assert len(steps) > 1
    assert max(steps) <= STEP_BYTES
    assert sum(steps) == len(part)


@pytest.mark.parametrize(
    ("layers", "heads", "message"),
    [
        ((0, 5), None, "layers 0 to 4 are not within 0 to 3"),
        ((4, 1), None, "layers 4 to 4"),
        (None, (7, 2), "heads 7 to 8 are not within 0 to 7"),
        (None, (0, 0), "heads 0 to -1"),
    ],
)
def test_what_leaves_the_page_is_refused_by_name(
    layers: tuple[int, int] | None, heads: tuple[int, int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Rectangle.of(SHAPES[1], layers, heads)


def test_a_rectangle_knows_what_it_is() -> None:
    shape = SHAPES[1]
    assert Rectangle.of(shape, None, None).is_whole(shape)
    assert Rectangle.of(shape, (1, 2), None).has_all_heads(shape)
    assert not Rectangle.of(shape, (1, 2), None).is_whole(shape)
    assert not Rectangle.of(shape, None, (0, 7)).has_all_heads(shape)


def test_the_cells_of_many_layers_are_those_of_each() -> None:
    for layers in range(1, 40):
        shape = Geometry(layers=layers + 3, heads=5, dim=1, tokens=1, dtype="int8")
        each = [Rectangle.of(shape, (2 + layer, 1), (1, 3)) for layer in range(layers)]
        together = Rectangle.of(shape, (2, layers), (1, 3)).cells(shape)
        assert together == sum(rectangle.cells(shape) for rectangle in each)
    shape = Geometry(layers=1 << 22, heads=1, dim=1, tokens=1, dtype="int8")
    assert Rectangle.of(shape, None, None).cells(shape) == all_cells(shape)  # and soon
