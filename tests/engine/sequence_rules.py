"""What happens to prompts, for the machines that hold a cache against ``World``.

Rules go on from what was put before: only prompts that are nearly the same can be confused.
"""

from collections.abc import Callable
from typing import TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from respkv.engine.entry import Entry, Put
from respkv.engine.namespaces import Schema
from respkv.tiers.record import Level
from tests.engine.sequence_world import Context, Held, Tokens, World, schema_of
from tests.fakes import ManualClock

T = TypeVar("T")

PAGE_TOKENS = {b"a": 3, b"b": 2, b"a:b": 4}
ALGORITHM = {b"a": "blake3", b"b": "sha256_cbor", b"a:b": "sha256"}
# namespace, salt, tenant, LoRA: most of what happens is in one of them
NAMES = [
    *[(b"a", b"", b"", b"")] * 6,
    (b"a", b"salt", b"", b""),
    (b"a", b"", b"acme", b""),
    (b"a", b"", b"", b"sql"),
    (b"b", b"", b"", b""),
    (b"a:b", b"", b"", b""),
]

numbers = st.integers(0, 99)
contexts = st.sampled_from(NAMES)
few = st.sampled_from([1, 1, 2, 100, 101])
tokens = st.lists(few, max_size=11).map(tuple)
more = st.lists(few, max_size=3).map(tuple)
cuts = st.sampled_from([0, 0, 0, 1, 2, 4])
ttls_ms = st.sampled_from([0, 0, 2000, 2000, 5000])
Names = tuple[bytes, bytes, bytes, bytes]


class PromptRules(RuleBasedStateMachine):
    """Prompts come, go and are matched. ``world`` is made by whoever has a cache for it."""

    levels: tuple[Level | None, ...] = (None,)
    world: World
    clock: ManualClock

    def __init__(self) -> None:
        super().__init__()
        self.schemas: dict[bytes, Schema] = {}
        self.held: dict[bytes, Held] = {}
        for namespace, size in PAGE_TOKENS.items():
            self.schemas[namespace] = schema_of(namespace, size, algorithm=ALGORITHM[namespace])

    def call(self, function: Callable[[], T]) -> T:
        """Call where the cache lives."""
        return function()

    def get(self, entry: Entry) -> bytes | None:
        """Read an entry; None when it cannot be had now."""
        return self.world.cache.copy(entry)

    def context(self, names: Names) -> Context:
        namespace, salt, tenant, lora = names
        return Context(self.schemas[namespace], salt, tenant, lora)

    def old(self, which: int, cut: int, then: Tokens) -> tuple[Context, Tokens]:
        """Something like what was put before, under the schemas of now."""
        held = list(self.held.values())
        if not held:
            return self.context(NAMES[0]), then
        one = held[-1 - which % len(held)]
        schema = self.schemas[one.context.schema.namespace]
        context = Context(schema, one.context.salt, one.context.tenant, one.context.lora)
        return context, one.tokens[: len(one.tokens) - cut] + then

    def do_put(
        self, context: Context, tokens: Tokens, ttl_ms: int, priority: int, which: int, first: int
    ) -> None:
        expires_ms = self.clock.wall_ms + ttl_ms if ttl_ms else 0
        level = self.levels[which % len(self.levels)]
        how = Put(expires_ms=expires_ms, priority=priority, tenant=context.tenant, level=level)
        first *= context.schema.geometry.tokens
        parts, first = not which % 3, first if first <= len(tokens) else 0
        self.call(lambda: self.world.put(context, tokens, how, first=first, parts=parts))

    def do_match(self, context: Context, tokens: Tokens) -> None:
        found = self.call(lambda: self.world.match(context, tokens))
        self.world.check_bytes(found, context, tokens, self.get)

    @rule(names=contexts, tokens=tokens, ttl_ms=ttls_ms, which=numbers)
    def put(self, names: Names, tokens: Tokens, ttl_ms: int, which: int) -> None:
        self.do_put(self.context(names), tokens, ttl_ms, 0, which, 0)

    @rule(
        which=numbers, cut=cuts, then=more, ttl_ms=ttls_ms, first=st.sampled_from([0, 0, 1, 2]),
        priority=st.sampled_from([0, 0, 0, 1]),
    )  # fmt: skip
    def put_what_is_similar(
        self, which: int, cut: int, then: Tokens, ttl_ms: int, first: int, priority: int
    ) -> None:
        self.do_put(*self.old(which, cut, then), ttl_ms, priority, which, first)

    @rule(which=numbers, cut=cuts)
    def match_when_its_time_may_be_over(self, which: int, cut: int) -> None:
        self.call(lambda: self.clock.advance(2.5))
        self.do_match(*self.old(which, cut, ()))

    @rule(which=numbers, cut=cuts, then=more)
    def match_what_is_similar(self, which: int, cut: int, then: Tokens) -> None:
        self.do_match(*self.old(which, cut, then))

    @rule(which=numbers, names=contexts, then=more)
    def match_it_elsewhere(self, which: int, names: Names, then: Tokens) -> None:
        self.do_match(self.context(names), self.old(which, 0, then)[1])

    @rule(which=numbers, names=contexts)
    def put_it_elsewhere(self, which: int, names: Names) -> None:
        self.do_put(self.context(names), self.old(which, 0, ())[1], 0, 0, which, 0)

    @rule(which=numbers, then=more)
    def match_with_other_images(self, which: int, then: Tokens) -> None:
        context, tokens = self.old(which, 0, then)
        self.do_match(context, tuple({100: 101, 101: 100}.get(each, each) for each in tokens))

    @rule(which=numbers)
    def delete(self, which: int) -> None:
        def delete() -> None:
            entries = self.world.cache.entries
            if entries:
                self.world.cache.delete(entries[sorted(entries)[which % len(entries)]])

        self.call(delete)

    @rule(seconds=st.sampled_from([0.5, 1.5, 3.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.call(lambda: self.clock.advance(seconds))

    @rule(names=contexts, version=st.integers(0, 1))
    def change_schema(self, names: Names, version: int) -> None:
        """To one whose ids are the same."""
        namespace = names[0]
        schema = schema_of(
            namespace, PAGE_TOKENS[namespace], version=version, algorithm=ALGORITHM[namespace]
        )
        self.call(lambda: self.use(schema))

    def use(self, schema: Schema) -> None:
        self.world.cache.namespaces.drop(schema.namespace)
        self.world.cache.namespaces.put(schema)
        self.schemas[schema.namespace] = schema
