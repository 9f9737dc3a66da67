"""Prompts of namespaces: kept, and never those of another schema."""

import hashlib
from dataclasses import replace
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.chain import ALGORITHMS, NO_EXTRAS, Chain, Extras, pack_tokens
from respkv.engine.namespaces import Namespaces, Schema
from respkv.engine.prompts import RECENT_BYTES, Prompts
from respkv.errors import SchemaMismatch
from respkv.page import Geometry

SHAPE: Final = Geometry(1, 1, 8, 4, "uint8")
SCHEMA: Final = Schema(b"ns", SHAPE)
SCHEMAS: Final = [
    SCHEMA,
    replace(SCHEMA, fingerprint=b"other weights"),  # ids are the same, pages are not
    replace(SCHEMA, seed=b"seed"),
    replace(SCHEMA, geometry=replace(SHAPE, tokens=2)),
    replace(SCHEMA, geometry=replace(SHAPE, dim=16)),
    *(replace(SCHEMA, hash_algorithm=each.encode()) for each in ALGORITHMS[1:]),
]
schemas = st.sampled_from([*SCHEMAS, *(replace(each, namespace=b"other") for each in SCHEMAS)])
names = st.sampled_from([b"ns", b"other"])
tokens = st.lists(st.sampled_from([0, 1]), max_size=12).map(pack_tokens)
extras = st.sampled_from([NO_EXTRAS, Extras(salt=b"pepper"), Extras(lora=b"sql")])
ask = st.tuples(names, tokens, extras)


@settings(deadline=None)
@given(steps=st.lists(st.one_of(schemas, names, st.just(None), ask, ask, ask), max_size=25))
def test_a_prompt_is_that_of_the_schema_there_is_now(
    steps: "list[Schema | bytes | tuple[bytes, bytes, Extras] | None]",
) -> None:
    namespaces = Namespaces()
    prompts = Prompts(namespaces)
    for step in steps:
        match step:
            case Schema():
                namespaces.drop(step.namespace)
                namespaces.put(step)
            case bytes():
                namespaces.drop(step)
            case None:
                namespaces.clear()
            case (name, data, words):
                schema = namespaces.find(name)
                if schema is None:
                    with pytest.raises(SchemaMismatch):
                        prompts.prompt(name, data, words)
                    continue
                algorithm = schema.hash_algorithm.decode()
                chain = Chain(algorithm, schema.seed, schema.geometry.tokens)
                anew = chain.prompt(name, data, words, schema.tag)
                prompt = prompts.prompt(name, data, words)
                assert (prompt.namespace, prompt.tag) == (name, schema.tag)
                assert prompt.keys(0, prompt.num_pages) == anew.keys(0, anew.num_pages)
                assert prompt.branch(0) == anew.branch(0)


def test_a_prompt_is_hashed_once_until_a_schema_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    namespaces = Namespaces()
    schema = replace(SCHEMA, hash_algorithm=b"sha256")
    namespaces.put(schema)
    prompts = Prompts(namespaces)
    data, hashed = pack_tokens(range(40)), list[bytes]()

    def hash_noted(data: bytes) -> "hashlib._Hash":
        hashed.append(data)
        return hashlib.sha256(data)

    scheme = prompts.prompt(b"ns", data, NO_EXTRAS).chain.scheme
    monkeypatch.setattr(scheme, "_hash", hash_noted)
    for _ in range(3):
        prompts.prompt(b"ns", data, NO_EXTRAS).ids(10)
        namespaces.put(schema)  # as each worker does that connects
    assert len(hashed) == 10
    namespaces.put(replace(schema, ttl_ms=5))
    prompts.prompt(b"ns", data, NO_EXTRAS).ids(10)
    assert len(hashed) == 20
    namespaces.drop(b"ns")
    namespaces.put(schema)
    prompts.prompt(b"ns", data, NO_EXTRAS).ids(10)
    assert len(hashed) == 30


def test_what_is_kept_is_bounded() -> None:
    namespaces = Namespaces()
    namespaces.put(SCHEMA)
    prompts = Prompts(namespaces)
    for number in range(60):
        prompts.prompt(b"ns", pack_tokens([number] * 20_000), NO_EXTRAS)
    kept = prompts.recent
    assert RECENT_BYTES / 2 < kept.num_bytes <= RECENT_BYTES
    assert len(kept) < 30
