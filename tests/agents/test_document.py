"""A session as bytes: what is written is read, and nothing else is taken for a session."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.agents import document
from respkv.errors import PageCorrupt

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)


@given(st.dictionaries(NAMES, values, max_size=4))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(kept: dict[str, Any]) -> None:
    assert document.decode(document.encode(kept, "a", "s"), "a", "s") == kept


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_damage_ends_in_anything_but_a_named_error(data: st.DataObject) -> None:
    raw = bytearray(document.encode({"a": [1, b"x", {"k": None}], "b": "text"}, "a", "s"))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        document.decode(bytes(raw[: data.draw(st.integers(0, len(raw)))]), "a", "s")
    except PageCorrupt:
        return


def test_another_sessions_value_is_not_believed() -> None:
    raw = document.encode({}, "a", "s")
    for agent, session in (("b", "s"), ("a", "t"), ("as", ""), ("", "as")):
        with pytest.raises(PageCorrupt, match="another session's"):
            document.decode(raw, agent, session)


@given(first=st.tuples(NAMES, NAMES), second=st.tuples(NAMES, NAMES))
@settings(max_examples=60, deadline=None)
def test_different_names_have_different_keys(
    first: tuple[str, str], second: tuple[str, str]
) -> None:
    keys = [document.key_of("n", *pair) for pair in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)


@given(
    items=st.lists(st.binary(max_size=60), max_size=30),
    added=st.lists(st.binary(max_size=30), min_size=1, max_size=3),
    most=st.integers(20, 600),
)
@settings(max_examples=60, deadline=None)
def test_a_list_keeps_its_end_and_as_much_of_it_as_fits(
    items: list[bytes], added: list[bytes], most: int
) -> None:
    kept: dict[str, Any] = {"l": list(items)}

    def nbytes(values: dict[str, Any]) -> int:
        return len(document.encode(values, "a", "s"))

    document.append(kept, "l", list(added), 20)
    whole = (items + added)[-20:]
    try:
        document.fit(kept, "l", len(added), most, nbytes)
    except ValueError:
        assert nbytes({"l": added}) > most
        return
    assert nbytes(kept) <= most
    assert kept["l"] == whole[len(whole) - len(kept["l"]) :]
    if len(kept["l"]) < len(whole):  # one more would not have fitted, but for a few bytes of heads
        more = whole[len(whole) - len(kept["l"]) - 1 :]
        assert nbytes({"l": more}) > most - 4
