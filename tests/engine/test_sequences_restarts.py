"""Random trees of prompts over file tiers, restarted now and then, held against a look at all."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from respkv.engine.entry import Entry
from respkv.engine.mover import Mover
from respkv.errors import OutOfMemory
from respkv.tiers.record import Level
from tests.engine.fake_tier import FakeLog, FakeTier
from tests.engine.files import clean, get, make_cold, opened
from tests.engine.sequence_rules import PromptRules
from tests.engine.sequence_world import Context, Tokens, World
from tests.fakes import make_cache

ARENA_BYTES = 6 * (64 << 10)
T = TypeVar("T")


class Crash(Exception):
    """The process went away."""


class RestartMachine(PromptRules):
    """Prompts that go to files and are found again by the next process."""

    levels = (None, None, Level.WRITTEN, Level.DURABLE)

    def __init__(self) -> None:
        super().__init__()
        self._portals = start_blocking_portal()
        self.portal: BlockingPortal = self._portals.__enter__()
        self.logs = [FakeLog(), FakeLog()]
        self.now = 1000.0
        self.start(late=False)

    def start(self, *, late: bool) -> None:
        """Begin another life. late: the sequences are made when the files have been read."""
        self.cache, self.clock = make_cache(ARENA_BYTES)
        self.clock.set(self.now)
        for schema in self.schemas.values():
            self.cache.namespaces.put(schema)
        if not late:
            self.world = World(self.cache)
        tiers = [
            FakeTier(log, name=name) for log, name in zip(self.logs, ("nvme", "disk"), strict=True)
        ]
        files: AbstractContextManager[Mover] = self.portal.wrap_async_context_manager(
            opened(self.cache, *tiers)
        )
        self.files = files
        self.mover = files.__enter__()
        if late:
            self.world = World(self.cache)
        self.world.held = self.held

    def teardown(self) -> None:
        self.files.__exit__(None, None, None)
        self._portals.__exit__(None, None, None)

    def call(self, function: Callable[[], T]) -> T:
        return self.portal.call(function)

    def answers(self) -> dict[tuple[Context, Tokens], int]:
        """What is found of all that was ever put."""
        return {
            (each.context, each.tokens): self.world.sequences.find(
                self.world.prompt(each.context, each.tokens)
            ).tokens
            for each in self.held.values()
            if each.context.schema == self.schemas[each.context.schema.namespace]
        }

    @rule()
    def write(self) -> None:
        self.portal.call(clean, self.cache, self.mover)

    @rule()
    def cool_down(self) -> None:
        self.portal.call(make_cold, self.cache, self.mover)

    @rule(late=st.booleans())
    def restart(self, late: bool) -> None:
        """After a clean stop all is as it was."""
        self.call(self.world.sequences.tidy)
        self.now = self.clock.now
        keys, answers = set(self.call(self.world.live)), self.call(self.answers)
        self.files.__exit__(None, None, None)
        self.start(late=late)
        left = set(self.call(self.world.live))
        assert left == keys, [self.held[key] for key in left ^ keys]
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
        RestartMachine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None)
    )
