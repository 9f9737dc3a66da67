"""Entries as bytes: what is written is read, and nothing else is taken for an entry."""

from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.errors import ConfigError, PageCorrupt
from respkv.semantic import records
from respkv.semantic.records import Names, Record

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
ANY_TEXT = st.text(st.characters(), max_size=40)  # lone surrogates too


@given(
    key=ANY_TEXT,
    payload=st.binary(max_size=100) | st.text(max_size=50),
    metadata=st.none() | st.dictionaries(st.text(max_size=5), json_values, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(key: str, payload: bytes | str, metadata: Any) -> None:
    vector = numpy.array([0.5, -3], "float32")
    tenant, entry = records.tenant_hash("t"), records.entry_hash(key)
    value = records.encode(tenant, Record(key, vector, payload, metadata, 1234))
    found = records.decode(value, tenant, entry, 2)
    assert (found.key, found.payload, found.metadata, found.created_ms) == (
        *(key, payload, metadata),
        1234,
    )
    assert found.embedding.tolist() == [0.5, -3]
    front = records.decode_front(value[: records.front_bytes(2)], tenant, entry, 2)
    assert (front.embedding.tolist(), front.created_ms) == ([0.5, -3], 1234)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_damage_ends_in_anything_but_a_named_error(data: st.DataObject) -> None:
    tenant, entry = records.tenant_hash("t"), records.entry_hash("k")
    record = Record("k", numpy.ones(2, "float32"), "text", {"a": 1}, 5)
    value = bytearray(records.encode(tenant, record))
    for _ in range(data.draw(st.integers(1, 3))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    short = bytes(value[: data.draw(st.integers(0, len(value)))])
    for read in (records.decode, records.decode_front):
        try:
            read(short, tenant, entry, 2)
        except PageCorrupt:
            continue


def test_another_tenants_or_keys_value_is_not_believed() -> None:
    tenant, entry = records.tenant_hash("t"), records.entry_hash("k")
    value = records.encode(tenant, Record("k", numpy.ones(2, "float32"), b"", None, 5))
    for owner, other, dim in (
        (records.tenant_hash("u"), entry, 2),
        (tenant, records.entry_hash("l"), 2),
        (tenant, entry, 1),
    ):
        with pytest.raises(PageCorrupt):
            records.decode(value, owner, other, dim)
        with pytest.raises(PageCorrupt):
            records.decode_front(value, owner, other, dim)


@given(first=st.tuples(ANY_TEXT, ANY_TEXT), second=st.tuples(ANY_TEXT, ANY_TEXT))
@settings(max_examples=100, deadline=None)
def test_different_names_have_different_keys(
    first: tuple[str, str], second: tuple[str, str]
) -> None:
    names = Names("n")

    def key(pair: tuple[str, str]) -> bytes:
        return names.key(records.tenant_hash(pair[0]), records.entry_hash(pair[1]))

    assert (key(first) == key(second)) == (first == second)
    found = names.parse(key(first))
    assert found == (records.tenant_hash(first[0]), records.entry_hash(first[1]))
    assert Names("m").parse(key(first)) is None


def test_separators_in_names_do_not_move_what_is_on_their_sides() -> None:
    names = Names("n")
    pairs = [
        ("a", "b-c"),
        ("a-b", "c"),
        ("a:b", "c"),
        ("a", "b:c"),
        ("", "a"),
        ("a", ""),
        ("*", "?"),
    ]
    keys = {names.key(records.tenant_hash(t), records.entry_hash(k)) for t, k in pairs}
    assert len(keys) == len(pairs)


@pytest.mark.parametrize("namespace", ["", "a:b", "a*", "a b", "ä", "a\n", "x" * 65, "[a]"])
def test_a_namespace_that_could_not_be_part_of_a_key_or_pattern_is_refused(namespace: str) -> None:
    with pytest.raises(ConfigError, match="accepted are 1 to 64 letters, digits and"):
        Names(namespace)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ([1], "a dict, not list"),
        ({"a": b"x"}, "what JSON can say"),
        ({"a": float("nan")}, "what JSON can say"),
        ({"a": "x" * 70_000}, "takes 70008 bytes as JSON, at most 65536"),
    ],
    ids=["list", "bytes", "nan", "large"],
)
def test_metadata_that_cannot_be_kept_is_an_error(metadata: Any, said: str) -> None:
    record = Record("k", numpy.ones(2, "float32"), b"", metadata, 5)
    with pytest.raises((TypeError, ValueError), match=said):
        records.encode(records.tenant_hash(""), record)


def test_names_are_text_and_not_too_long() -> None:
    with pytest.raises(TypeError, match="tenant is a str, not int"):
        records.tenant_hash(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="key has at most 1024 bytes, not 1025"):
        records.entry_hash("x" * 1025)


def test_metadata_nested_without_end_are_an_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    record = Record("k", numpy.ones(2, "float32"), b"", {"deep": deep}, 5)
    with pytest.raises(ValueError, match="what JSON can say"):
        records.encode(records.tenant_hash("t"), record)


def test_an_embedding_whose_squares_would_leave_float32_is_not_believed() -> None:
    tenant, entry = records.tenant_hash("t"), records.entry_hash("k")
    vector = numpy.array([1, 1e30], "float32")
    value = records.encode(tenant, Record("k", vector, b"", None, 5))
    for read in (records.decode, records.decode_front):
        with pytest.raises(PageCorrupt, match="too large to compare"):
            read(value, tenant, entry, 2)
