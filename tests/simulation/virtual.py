"""Event loops on which hours pass in no time and every run of a seed is the same."""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import anyio
import trio.abc
from trio._core import _run as trio_run

START_S = 1000.0

Jump = Callable[[float], None]


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

    def jump(self, seconds: float) -> None:
        """Let time pass while a task runs."""
        self._jumping.now += seconds


class VirtualClock(trio.abc.Clock):
    """trio's idea of time: what it is to wait when no task can run passes at once.

    Time also creeps at each look: trio orders what is due in the same instant by address, and here
    no two moments are the same.
    """

    def __init__(self) -> None:
        self.now = START_S

    def start_clock(self) -> None:
        """Do nothing: there is nothing to wind up."""

    def current_time(self) -> float:
        """Return virtual seconds."""
        self.jump(1e-9)
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Let the time until ``deadline`` pass; called when every task waits."""
        if deadline == inf:
            return deadline
        self.now = max(self.now, deadline)
        return 0.0

    def jump(self, seconds: float) -> None:
        """Let time pass while a task runs."""
        self.now += seconds


def run(work: Callable[[Jump], Awaitable[Any]], *, backend: str, seed: int) -> Any:
    """Run an async function to its end on virtual time.

    work: is given a function that lets time pass while a task runs.
    seed: of the order in which trio runs tasks that are ready together.
    """
    if backend == "asyncio":
        loop = VirtualLoop()
        return anyio.run(work, loop.jump, backend_options={"loop_factory": lambda: loop})
    trio_run._r.seed(seed)
    clock = VirtualClock()
    return anyio.run(work, clock.jump, backend=backend, backend_options={"clock": clock})
