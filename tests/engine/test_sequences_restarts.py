"""Random trees of prompts over file tiers, restarted now and then, held against a look at all."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.mover import Mover
from respkv.engine.namespaces import Schema
from respkv.errors import OutOfMemory
from respkv.tiers.record import Level
from tests.engine.fake_tier import FakeLog, FakeTier
from tests.engine.files import clean, get, make_cold, opened
from tests.engine.sequence_world import Context, Held, World, schema_of
from tests.fakes import ManualClock, make_cache

ARENA_BYTES = 6 * (64 << 10)
PAGE_TOKENS = {b"a": 3, b"b": 2}
T = TypeVar("T")

namespaces = st.sampled_from(sorted(PAGE_TOKENS))
tokens = st.lists(st.sampled_from([1, 2, 1, 100, 101]), max_size=9).map(tuple)
numbers = st.integers(0, 99)
salts = st.sampled_from([b"", b"", b"salt"])
tenants = st.sampled_from([b"", b"acme"])
levels = st.sampled_from([None, None, Level.WRITTEN, Level.DURABLE])


class Crash(Exception):
    """The process went away."""


class RestartMachine(RuleBasedStateMachine):
    """Prompts that go to files and are found again by the next process."""

    def __init__(self) -> None:
        super().__init__()
        self._portals = start_blocking_portal()
        self.portal: BlockingPortal = self._portals.__enter__()
        self.logs = [FakeLog(), FakeLog()]
        self.schemas: dict[bytes, Schema] = {}
        for namespace, size in PAGE_TOKENS.items():
            self.schemas[namespace] = schema_of(namespace, size)
        self.now = 1000.0
        self.held: dict[bytes, Held] = {}
        self.start(late=False)

    def start(self, *, late: bool) -> None:
        """Begin another life. late: the sequences are made when the files have been read."""
        cache, clock = make_cache(ARENA_BYTES)
        self.cache: Cache = cache
        self.clock: ManualClock = clock
        clock.set(self.now)
        for schema in self.schemas.values():
            cache.namespaces.put(schema)
        if not late:
            self.world = World(cache)
        tiers = [FakeTier(self.logs[0], name="nvme"), FakeTier(self.logs[1], name="disk")]
        files: AbstractContextManager[Mover] = self.portal.wrap_async_context_manager(
            opened(cache, *tiers)
        )
        self.files = files
        self.mover = files.__enter__()
        if late:
            self.world = World(cache)
        self.world.held = self.held

    def teardown(self) -> None:
        self.files.__exit__(None, None, None)
        self._portals.__exit__(None, None, None)

    def call(self, function: Callable[[], T]) -> T:
        return self.portal.call(function)

    def context(self, namespace: bytes, salt: bytes, tenant: bytes) -> Context:
        return Context(self.schemas[namespace], salt, tenant)

    def answers(self) -> dict[tuple[Context, tuple[int, ...]], int]:
        """What is found of all that was ever put."""
        return {
            (each.context, each.tokens): self.world.sequences.find(
                self.world.prompt(each.context, each.tokens)
            ).tokens
            for each in self.held.values()
            if each.context.schema == self.schemas[each.context.schema.namespace]
        }

    @rule(
        namespace=namespaces, tokens=tokens, salt=salts, tenant=tenants, level=levels,
        ttl_ms=st.sampled_from([0, 0, 0, 4000]), parts=st.booleans(),
    )  # fmt: skip
    def put(
        self, namespace: bytes, tokens: tuple[int, ...], salt: bytes, tenant: bytes,
        level: Level | None, ttl_ms: int, parts: bool,
    ) -> None:  # fmt: skip
        def put() -> bool:
            expires_ms = self.clock.wall_ms + ttl_ms if ttl_ms else 0
            how = Put(expires_ms=expires_ms, level=level, tenant=tenant)
            context = self.context(namespace, salt, tenant)
            return self.world.put(context, tokens, how, parts=parts)

        self.call(put)

    @rule(namespace=namespaces, tokens=tokens, salt=salts, tenant=tenants)
    def match(self, namespace: bytes, tokens: tuple[int, ...], salt: bytes, tenant: bytes) -> None:
        context = self.context(namespace, salt, tenant)
        found = self.call(lambda: self.world.match(context, tokens))
        self.world.check_bytes(found, context, tokens, self.get)

    @rule(which=numbers, more=st.sampled_from([(), (1,), (100, 2)]))
    def match_what_was_put(self, which: int, more: tuple[int, ...]) -> None:
        held = list(self.held.values())
        if not held:
            return
        one = held[which % len(held)]
        tokens = one.tokens + more
        if one.context.schema != self.schemas[one.context.schema.namespace]:
            return
        found = self.call(lambda: self.world.match(one.context, tokens))
        self.world.check_bytes(found, one.context, tokens, self.get)

    @rule(which=numbers)
    def delete(self, which: int) -> None:
        if self.cache.entries:
            key = sorted(self.cache.entries)[which % len(self.cache.entries)]
            self.call(lambda: self.cache.delete(self.cache.entries[key]))

    @rule(seconds=st.sampled_from([0.5, 1.5, 3.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.call(lambda: self.clock.advance(seconds))

    @rule()
    def write(self) -> None:
        self.portal.call(clean, self.cache, self.mover)

    @rule()
    def cool_down(self) -> None:
        self.portal.call(make_cold, self.cache, self.mover)

    @rule(namespace=namespaces, version=st.integers(0, 1))
    def change_schema(self, namespace: bytes, version: int) -> None:
        schema = schema_of(namespace, PAGE_TOKENS[namespace], version=version)

        def change() -> None:
            self.cache.namespaces.drop(namespace)
            self.cache.namespaces.put(schema)

        self.call(change)
        self.schemas[namespace] = schema

    @rule(late=st.booleans())
    def restart(self, late: bool) -> None:
        """After a clean stop all is as it was."""
        self.call(self.world.sequences.tidy)
        self.now = self.clock.now
        keys, answers = set(self.call(self.world.live)), self.call(self.answers)
        self.files.__exit__(None, None, None)
        self.start(late=late)
        assert set(self.call(self.world.live)) == keys
        assert self.call(self.answers) == answers

    @rule(late=st.booleans())
    def crash(self, late: bool) -> None:
        """What was written is there, and what is there is found."""
        self.now = self.clock.now
        error = Crash()
        try:
            self.files.__exit__(Crash, error, None)
        except* Crash:
            pass
        self.start(late=late)

    @invariant()
    def agrees(self) -> None:
        self.call(self.world.check)

    def get(self, entry: Entry) -> bytes | None:
        try:
            return self.portal.call(get, self.cache, self.mover, entry.key)
        except OutOfMemory:
            return None  # all is promised, so nothing can be loaded


def test_a_match_after_a_restart_is_what_a_look_at_everything_finds() -> None:
    run_state_machine_as_test(
        RestartMachine, settings=settings(max_examples=25, stateful_step_count=30, deadline=None)
    )
