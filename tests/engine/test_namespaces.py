"""Namespaces: what two workers must agree on, and which pages fit."""

from dataclasses import replace

import pytest

from respkv.engine.namespaces import Namespaces, Schema, check_payload
from respkv.errors import SchemaMismatch
from respkv.page import Geometry

SCHEMA = Schema(b"ns", Geometry(2, 8, 64, 16, "bfloat16"), b"model-1", b"sha256", b"seed")


def test_the_same_schema_may_be_set_again_and_change_its_policies() -> None:
    namespaces = Namespaces()
    namespaces.put(SCHEMA)
    namespaces.put(replace(SCHEMA, ttl_ms=5000, codecs=((b"cpu", b"raw"),)))
    found = namespaces.find(b"ns")
    assert found is not None
    assert found.ttl_ms == 5000
    assert len(namespaces) == 1


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"geometry": Geometry(2, 8, 64, 32, "bfloat16")}, "tokens 32"),
        ({"geometry": Geometry(2, 8, 64, 16, "float16")}, "dtype float16"),
        ({"fingerprint": b"model-2"}, "'model-2'"),
        ({"hash_algorithm": b"xxh3"}, "'xxh3'"),
        ({"seed": b""}, "seed ''"),
    ],
)
def test_another_identity_is_refused_with_both_named(change: dict[str, object], shown: str) -> None:
    namespaces = Namespaces()
    namespaces.put(SCHEMA)
    other = replace(SCHEMA, **change)  # type: ignore[arg-type]
    with pytest.raises(SchemaMismatch, match=r"namespace 'ns' has .*'model-1'") as error:
        namespaces.put(other)
    assert shown in str(error.value)
    assert namespaces.find(b"ns") is SCHEMA
    assert other.fingerprint_hash != SCHEMA.fingerprint_hash


def test_the_fingerprint_of_a_page_names_its_namespace_and_not_its_policies() -> None:
    assert replace(SCHEMA, ttl_ms=5).fingerprint_hash == SCHEMA.fingerprint_hash
    assert replace(SCHEMA, namespace=b"other").fingerprint_hash != SCHEMA.fingerprint_hash


def test_a_key_falls_under_what_stands_before_its_last_colon() -> None:
    namespaces = Namespaces()
    assert namespaces.of_key(b"ns:page") is None
    namespaces.put(SCHEMA)
    namespaces.put(replace(SCHEMA, namespace=b"a:b"))
    assert namespaces.of_key(b"ns:page") is SCHEMA
    assert namespaces.of_key(b"a:b:page") is namespaces.find(b"a:b")
    assert namespaces.of_key(b"ns") is None
    assert namespaces.of_key(b"ns:a:page") is None


def test_a_schema_that_is_dropped_may_come_back_as_another() -> None:
    namespaces = Namespaces()
    namespaces.put(SCHEMA)
    assert namespaces.drop(b"ns")
    assert not namespaces.drop(b"ns")
    namespaces.put(replace(SCHEMA, fingerprint=b"model-2"))
    namespaces.put(replace(SCHEMA, namespace=b"a"))
    assert namespaces.names() == [b"a", b"ns"]
    namespaces.clear()
    assert namespaces.names() == []


def test_a_payload_of_another_size_is_refused_with_both_sizes() -> None:
    expected = 2 * 2 * 16 * 8 * 64 * 2
    check_payload(SCHEMA, expected)
    with pytest.raises(SchemaMismatch, match=f"has {expected} bytes, this payload has 7"):
        check_payload(SCHEMA, 7)
