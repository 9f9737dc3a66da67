"""Event loops on which hours pass in no time and every run of a seed is the same."""

import asyncio
import random
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import trio.testing
from trio._core import _run as trio_run

START_S = 1000.0


class JumpingSelector(selectors.SelectSelector):
    """A selector that does not wait: what it was to wait passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; when nothing is, let ``timeout`` pass."""
        ready = super().select(0)
        if not ready and timeout is None:
            raise AssertionError("every task waits for another one")
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop on virtual time. Its order of callbacks is first in, first out."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Return virtual seconds."""
        return self._jumping.now


def run(work: Callable[[], Awaitable[Any]], *, backend: str, seed: int) -> Any:
    """Run an async function to its end on virtual time.

    seed: of the order in which trio runs tasks that are ready together.
    """
    if backend == "asyncio":
        return anyio.run(work, backend_options={"loop_factory": VirtualLoop})
    trio_run._r = random.Random(seed)
    clock = trio.testing.MockClock(autojump_threshold=0)
    return anyio.run(work, backend="trio", backend_options={"clock": clock})
