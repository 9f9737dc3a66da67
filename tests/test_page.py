"""Pages: sizes, layer ranges, ids and keys."""

import pytest

from respkv.page import (
    DTYPE_BYTES,
    KEY_BYTES_MAX,
    Geometry,
    namespace_of,
    page_key,
    page_keys,
)

SHAPE = Geometry(layers=4, heads=2, dim=8, tokens=16, dtype="float16")


def test_a_page_is_k_and_v_of_every_layer_token_and_head() -> None:
    assert SHAPE.layer_bytes == 2 * 16 * 2 * 8 * 2
    assert SHAPE.page_bytes == 4 * SHAPE.layer_bytes
    sizes = {name: Geometry(1, 1, 1, 1, name).page_bytes // 2 for name in DTYPE_BYTES}
    assert sizes == DTYPE_BYTES


def test_a_range_of_layers_is_a_range_of_bytes() -> None:
    one = SHAPE.layer_bytes
    assert SHAPE.layer_range(0, 4) == (0, SHAPE.page_bytes)
    assert SHAPE.layer_range(1, 2) == (one, 3 * one)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0), (0, 5), (3, 2), (4, 1)])
def test_layers_that_a_page_does_not_have_are_named(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="not within 0 to 3"):
        SHAPE.layer_range(first, count)


@pytest.mark.parametrize("name", ["layers", "heads", "dim", "tokens"])
def test_a_geometry_without_something_is_refused_by_name(name: str) -> None:
    values = {"layers": 1, "heads": 1, "dim": 1, "tokens": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        Geometry(**values, dtype="int8")


def test_a_dtype_that_pages_do_not_have_is_refused_with_those_they_have() -> None:
    with pytest.raises(ValueError, match=r"bfloat16, .*not 'float64'"):
        Geometry(1, 1, 1, 1, "float64")


def test_a_key_is_the_namespace_and_the_id_in_hex() -> None:
    ids = [bytes(range(32)), bytes(32)]
    assert page_key("ns", ids[0]) == b"ns:" + ids[0].hex().encode()
    assert page_keys(b"a:b", ids) == [page_key("a:b", each) for each in ids]
    assert namespace_of(page_key("a:b", ids[0])) == b"a:b"
    assert namespace_of(b"plain") == b""


def test_a_key_has_at_most_512_bytes() -> None:
    longest = "n" * (KEY_BYTES_MAX - 65)
    assert len(page_key(longest, bytes(32))) == KEY_BYTES_MAX
    with pytest.raises(ValueError, match="at most 512 bytes, not 513"):
        page_key(longest + "n", bytes(32))
