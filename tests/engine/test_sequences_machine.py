"""Random trees of prompts, held against a look at everything that is resident."""

from contextlib import suppress
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from respkv.engine.eviction import POLICIES
from respkv.errors import OutOfMemory
from tests.engine.sequence_rules import PromptRules, numbers
from tests.engine.sequence_world import World
from tests.fakes import make_cache

ARENA_BYTES = 6 * (64 << 10)


class SequencesMachine(PromptRules):
    """In memory alone."""

    policy: ClassVar[str] = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.clock = make_cache(ARENA_BYTES, policy=self.policy)
        self.world = World(self.cache)
        self.world.held = self.held
        for schema in list(self.schemas.values()):
            self.use(schema)

    @rule(which=numbers, nbytes=st.sampled_from([8, 5000]))
    def overwrite_with_a_string(self, which: int, nbytes: int) -> None:
        if self.cache.entries:
            key = sorted(self.cache.entries)[which % len(self.cache.entries)]
            with suppress(OutOfMemory):  # all may be promised
                self.cache.put(key, bytes(nbytes))

    @rule()
    def expire(self) -> None:
        self.cache.expire_due(2)

    @rule(nbytes=st.sampled_from([1000, 20_000, 60_000]), count=st.integers(1, 6))
    def press(self, nbytes: int, count: int) -> None:
        """Others need the room."""
        self.clock.advance(1.5)  # nobody was promised anything
        orphans = self.world.orphans()
        for number in range(count):
            self.cache.put(b"other:%d" % number, bytes(nbytes))
        assert self.world.orphans() <= orphans, "eviction made a hole in a chain"

    @rule()
    def clear(self) -> None:
        self.cache.flush()

    @rule()
    def tidy(self) -> None:
        self.world.check_no_idle_tails()

    @invariant()
    def agrees(self) -> None:
        self.world.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_match_is_what_a_look_at_everything_finds(policy: str) -> None:
    machine = type("Machine", (SequencesMachine,), {"policy": policy})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None)
    )
