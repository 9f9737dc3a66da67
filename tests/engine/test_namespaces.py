"""Namespaces: what two workers must agree on, and which pages fit."""

from dataclasses import replace

import pytest

from respkv.engine.namespaces import (
    Group,
    Kind,
    Namespaces,
    Schema,
    check_part,
    check_payload,
    shape_of,
)
from respkv.errors import SchemaMismatch
from respkv.page import Geometry, Latents

SCHEMA = Schema(b"ns", Geometry(2, 8, 64, 16, "bfloat16"), b"model-1", b"sha256", b"seed")

KEY = b"ns:" + b"0" * 64
FULL = Group(b"full", Kind.FULL, Geometry(1, 4, 32, 16, "uint8"))
LOCAL = Group(b"local", Kind.SLIDING, Geometry(3, 2, 64, 16, "bfloat16"), window=1024)
MAMBA = Group(b"mamba", Kind.STATE, nbytes=5000)
INDEX = Group(b"index", Kind.MLA, Latents(2, 1, 128, 16, "bfloat16"))
HYBRID = replace(SCHEMA, groups=(FULL, INDEX, LOCAL, MAMBA))


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
        ({"geometry": Latents(2, 1, 64, 16, "bfloat16")}, "mla, layers 2, dim 64"),
        ({"groups": (MAMBA,)}, "group 'mamba' state of 5000 bytes"),
        ({"groups": (LOCAL,)}, "group 'local' sliding 1024 (layers 3, heads 2, dim 64, dtype"),
        ({"groups": (INDEX,)}, "group 'index' mla (layers 2, dim 128, dtype bfloat16)"),
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


def test_other_weights_are_said_to_be_that_and_hashes_are_shown_as_digits() -> None:
    namespaces = Namespaces()
    old, new = bytes(range(200, 216)), bytes(range(120, 136))
    namespaces.put(replace(SCHEMA, fingerprint=old, seed=old))
    with pytest.raises(SchemaMismatch) as error:
        namespaces.put(replace(SCHEMA, fingerprint=new, seed=new))
    text = str(error.value)
    assert f"fingerprint {old.hex()}, " in text
    assert f"fingerprint {new.hex()}, " in text
    assert ": the same shape, of other weights; use another namespace" in text
    for change in ({"seed": b"else"}, {"groups": (MAMBA,), "fingerprint": new}):
        namespaces = Namespaces()
        namespaces.put(SCHEMA)
        with pytest.raises(SchemaMismatch) as error:
            namespaces.put(replace(SCHEMA, **change))
        assert "other weights" not in str(error.value)


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


def test_groups_are_part_of_what_workers_must_agree_on() -> None:
    namespaces = Namespaces()
    namespaces.put(HYBRID)
    namespaces.put(replace(HYBRID, ttl_ms=5))
    wider = replace(LOCAL, window=1025)
    for groups in ((), (FULL,), (FULL, INDEX, wider, MAMBA)):
        other = replace(HYBRID, groups=groups)
        assert other.fingerprint_hash != HYBRID.fingerprint_hash
        with pytest.raises(SchemaMismatch, match="sliding 1024"):
            namespaces.put(other)


def test_pages_of_former_versions_have_the_same_fingerprint() -> None:
    assert SCHEMA.fingerprint_hash == 1646652435876073789


def test_a_group_is_found_by_its_name_and_the_own_geometry_is_one() -> None:
    assert HYBRID.group(b"mamba") is MAMBA
    assert HYBRID.group(b"") == Group(b"", Kind.FULL, SCHEMA.geometry)
    latents = replace(SCHEMA, geometry=Latents(2, 1, 64, 16, "bfloat16"))
    assert latents.group(b"").kind is Kind.MLA
    with pytest.raises(
        SchemaMismatch, match="no group 'x'; it has 'full', 'index', 'local', 'mamba'"
    ):
        HYBRID.group(b"x")
    with pytest.raises(SchemaMismatch, match="no group 'x'; it has none"):
        SCHEMA.group(b"x")
    assert HYBRID.piece_sizes == [65536, 4096, 8192, 24576, 5000]


@pytest.mark.parametrize(
    ("suffix", "nbytes", "tokens", "expected"),
    [
        (b"", 65536, 16, SCHEMA.geometry),
        (b"", 65536, 0, SCHEMA.geometry),
        (b"", 4096, 1, Geometry(2, 8, 64, 1, "bfloat16")),
        (b"", 4096, 16, None),  # so many tokens have other bytes
        (b"", 4096, 0, None),
        (b"", 65536 + 4096, 17, None),
        (b".g.full", 4096, 16, FULL.geometry),
        (b".g.full", 1280, 5, Geometry(1, 4, 32, 5, "uint8")),
        (b".g.full", 65536, 16, None),
        (b".g.local", 24576, 16, LOCAL.geometry),
        (b".g.index", 2560, 5, Latents(2, 1, 128, 5, "bfloat16")),
        (b".g.absent", 65536, 16, None),
        (b".s.mamba", 5000, 16, None),
        (b".logits", 65536, 16, None),
        (b".hidden", 4096, 1, None),
    ],
)
def test_tails_and_pages_of_groups_have_shapes_of_their_own(
    suffix: bytes, nbytes: int, tokens: int, expected: Geometry | None
) -> None:
    assert shape_of(HYBRID, KEY + suffix, nbytes, tokens) == expected


def test_parts_that_are_put_by_key_have_the_size_of_their_group() -> None:
    check_part(HYBRID, KEY + b".g.full", 4096)
    check_part(HYBRID, KEY + b".s.mamba", 5000)
    check_part(HYBRID, KEY + b".logits", 7)
    for suffix in (b".g.full", b".s.mamba", b".g.absent"):
        with pytest.raises(SchemaMismatch):
            check_part(HYBRID, KEY + suffix, 7)


def test_latents_are_one_plane_and_as_long_as_two_of_half_the_dim() -> None:
    latents = Latents(3, 1, 10, 7, "float16")
    assert (latents.planes, latents.layer_bytes, latents.page_bytes) == (1, 140, 420)
    assert latents.layer_range(1, 2) == (140, 420)
    assert latents != Geometry(3, 1, 10, 7, "float16")
    assert replace(latents, tokens=2) == Latents(3, 1, 10, 2, "float16")
    halves = latents.halves
    assert halves == Geometry(3, 1, 5, 7, "float16")
    assert halves is not None
    assert halves.page_bytes == latents.page_bytes
    assert replace(latents, dim=9).halves is None
    with pytest.raises(ValueError, match="heads is 1, not 2"):
        Latents(3, 2, 10, 7, "float16")
    with pytest.raises(ValueError, match="layers must be at least 1"):
        Latents(0, 1, 10, 7, "float16")
