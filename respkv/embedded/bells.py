"""What wakes the one who waits for an answer: a bell for a thread, and one for a task."""

import threading
from contextlib import suppress
from typing import Protocol

import anyio
import anyio.lowlevel


class Bell(Protocol):
    """It stays rung until it has been heard once."""

    def ring(self) -> None:
        """Wake who waits, or who waits next."""


class ThreadBell:
    """A bell for a thread; any thread may ring it."""

    def __init__(self) -> None:
        # A lock with which nothing is locked: released is rung. An Event would make a lock a wait.
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        """Wake who waits, or who waits next."""
        with suppress(RuntimeError):  # it was rung before
            self._silence.release()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is rung. Returns False when the time has passed."""
        return self._silence.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX))


class TaskBell:
    """A bell for a task; it is rung in the same event loop."""

    def __init__(self) -> None:
        self._is_rung = False
        self._event: anyio.Event | None = None

    def ring(self) -> None:
        """Wake who waits, or who waits next."""
        self._is_rung = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        """Wait until it is rung; let others have a turn even if it is. Cancelled: it is as it was."""
        if self._is_rung:
            await anyio.lowlevel.checkpoint()
        else:
            self._event = anyio.Event()
            try:
                await self._event.wait()
            finally:
                self._event = None
        self._is_rung = False
