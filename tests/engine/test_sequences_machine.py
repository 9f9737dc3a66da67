"""Random trees of prompts, held against a look at everything that is resident."""

from contextlib import suppress
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from respkv.engine.entry import Entry, Put
from respkv.engine.eviction import POLICIES
from respkv.engine.namespaces import Schema
from respkv.errors import OutOfMemory
from tests.engine.sequence_world import Context, World, schema_of
from tests.fakes import make_cache

ARENA_BYTES = 8 * (64 << 10)

namespaces = st.sampled_from([b"a", b"b", b"a:b"])
tokens = st.lists(st.sampled_from([1, 2, 1, 100, 101]), max_size=11).map(tuple)
numbers = st.integers(0, 99)
salts = st.sampled_from([b"", b"", b"", b"salt"])
tenants = st.sampled_from([b"", b"", b"acme"])
loras = st.sampled_from([b"", b"", b"sql"])
ttls_ms = st.sampled_from([0, 0, 0, 2000, 5000])
PAGE_TOKENS = {b"a": 3, b"b": 2, b"a:b": 4}
ALGORITHM = {b"a": "blake3", b"b": "sha256_cbor", b"a:b": "sha256"}


class SequencesMachine(RuleBasedStateMachine):
    """Prompts come, go and are matched, in memory alone."""

    policy: ClassVar[str] = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.clock = make_cache(ARENA_BYTES, policy=self.policy)
        self.world = World(self.cache)
        self.schemas: dict[bytes, Schema] = {}
        self.asked: list[tuple[bytes, tuple[int, ...]]] = []
        for namespace, size in PAGE_TOKENS.items():
            self.use(schema_of(namespace, size, algorithm=ALGORITHM[namespace]))

    def use(self, schema: Schema) -> None:
        self.cache.namespaces.drop(schema.namespace)
        self.cache.namespaces.put(schema)
        self.schemas[schema.namespace] = schema

    def context(self, namespace: bytes, salt: bytes, tenant: bytes, lora: bytes) -> Context:
        return Context(self.schemas[namespace], salt, tenant, lora)

    @rule(
        namespace=namespaces, tokens=tokens, salt=salts, tenant=tenants, lora=loras, ttl_ms=ttls_ms,
        priority=st.sampled_from([0, 0, 1]), parts=st.booleans(), start=st.integers(0, 3),
    )  # fmt: skip
    def put(
        self, namespace: bytes, tokens: tuple[int, ...], salt: bytes, tenant: bytes, lora: bytes,
        ttl_ms: int, priority: int, parts: bool, start: int,
    ) -> None:  # fmt: skip
        first = start * PAGE_TOKENS[namespace]
        if first > len(tokens):
            first = 0
        expires_ms = self.clock.wall_ms + ttl_ms if ttl_ms else 0
        self.world.put(
            self.context(namespace, salt, tenant, lora),
            tokens,
            Put(expires_ms=expires_ms, priority=priority, tenant=tenant),
            first=first,
            parts=parts,
        )

    @rule(namespace=namespaces, tokens=tokens, salt=salts, tenant=tenants, lora=loras)
    def match(
        self, namespace: bytes, tokens: tuple[int, ...], salt: bytes, tenant: bytes, lora: bytes
    ) -> None:
        context = self.context(namespace, salt, tenant, lora)
        found = self.world.match(context, tokens)
        self.world.check_bytes(found, context, tokens, self.get)

    @rule(which=numbers, more=st.sampled_from([(), (1,), (100, 2)]))
    def match_what_was_put(self, which: int, more: tuple[int, ...]) -> None:
        held = list(self.world.held.values())
        if not held:
            return
        one = held[which % len(held)]
        tokens = one.tokens + more
        if one.context.schema != self.schemas[one.context.schema.namespace]:
            return
        found = self.world.match(one.context, tokens)
        self.world.check_bytes(found, one.context, tokens, self.get)

    @rule(which=numbers)
    def delete(self, which: int) -> None:
        if self.cache.entries:
            key = sorted(self.cache.entries)[which % len(self.cache.entries)]
            self.cache.delete(self.cache.entries[key])

    @rule(which=numbers, nbytes=st.sampled_from([8, 5000]))
    def overwrite_with_a_string(self, which: int, nbytes: int) -> None:
        if self.cache.entries:
            key = sorted(self.cache.entries)[which % len(self.cache.entries)]
            with suppress(OutOfMemory):  # all may be promised
                self.cache.put(key, bytes(nbytes))

    @rule(seconds=st.sampled_from([0.5, 1.5, 3.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def expire(self) -> None:
        self.cache.expire_due(2)

    @rule(nbytes=st.sampled_from([1000, 20_000, 60_000]), count=st.integers(1, 8))
    def press(self, nbytes: int, count: int) -> None:
        """Others need the room."""
        orphans = self.world.orphans()
        self.clock.advance(1.5)  # nobody was promised anything
        for number in range(count):
            self.cache.put(b"other:%d" % number, bytes(nbytes))
        assert self.world.orphans() <= orphans, "eviction made a hole in a chain"

    @rule(namespace=namespaces, version=st.integers(0, 1), size=st.sampled_from([0, 0, 1]))
    def change_schema(self, namespace: bytes, version: int, size: int) -> None:
        self.use(
            schema_of(
                namespace,
                PAGE_TOKENS[namespace],
                version=version + 2 * size,
                algorithm=ALGORITHM[namespace],
            )
        )

    @rule()
    def clear(self) -> None:
        self.cache.flush()

    @rule()
    def tidy(self) -> None:
        self.world.check_no_idle_tails()

    @invariant()
    def agrees(self) -> None:
        self.world.check()

    def get(self, entry: Entry) -> bytes | None:
        return self.cache.copy(entry)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_match_is_what_a_look_at_everything_finds(policy: str) -> None:
    machine = type("Machine", (SequencesMachine,), {"policy": policy})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=20, stateful_step_count=40, deadline=None)
    )
