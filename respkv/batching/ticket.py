"""A request's tokens on their way from the thread of the model to whoever asked.

The model never waits for a reader: at most ``max_new_tokens`` events can pile up. A reader in a thread
waits for a condition; one in an event loop for an eventfd, which the loop polls as any socket. That
needs no worker thread per reader, of which an event loop has few, and works with every event loop.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

import anyio

from respkv.batching.request import FinishReason, Generation, GenerationFailed, Timings, TokenEvent


class Ticket:
    """What ``submit`` returns: iterate over its TokenEvents, or take the whole Generation.

    Both in a thread (``for``, ``result``) and in an event loop (``async for``, ``wait``). It has one
    reader at a time. An event is read once; ``result`` and ``wait`` tell all tokens, read or not.
    As a context manager, of either kind, it cancels the request at the end of the block.
    Raises GenerationFailed, while reading, when the request failed; tokens before that are read first.
    """

    def __init__(self, cancel: Callable[["Ticket"], None]) -> None:
        self._cancel = cancel
        self._condition = threading.Condition()
        self._events: deque[TokenEvent] = deque()
        self._tokens: list[int] = []
        self._end: Generation | None = None
        self._failure: tuple[str, BaseException | None] | None = None
        self._wake: int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all that will ever come of the request has come."""
        return self._end is not None or self._failure is not None

    def cancel(self) -> None:
        """Ask for the request's end, from any thread; it soon ends as "cancelled" if it has not yet."""
        if not self.is_finished:
            self._cancel(self)

    def result(self, timeout_s: float | None = None) -> Generation:
        """Wait for the end, and return the whole answer.

        Raises GenerationFailed; TimeoutError, after which the request goes on and can be waited for.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self.is_finished, timeout_s):
                raise TimeoutError(f"the request has not finished in {timeout_s} s")
        return self._whole()

    async def wait(self) -> Generation:
        """Wait for the end, and return the whole answer.

        Raises GenerationFailed.
        Cancelled: the request goes on, unless the ticket's ``cancel`` is called.
        """
        while not self.is_finished:
            await self._wait(lambda: self.is_finished)
        return self._whole()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenEvent:
        with self._condition:
            self._condition.wait_for(self._has_news)
            event = self._take()
        if event is None:
            raise StopIteration
        return event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._has_news():
            await self._wait(self._has_news)
        event = self._take()
        if event is None:
            raise StopAsyncIteration
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.cancel()

    def push(self, token: int) -> None:
        """Tell a token; called by the model's thread."""
        with self._condition:
            self._events.append(TokenEvent(len(self._tokens), token))
            self._tokens.append(token)
            self._tell()

    def finish(self, token: int | None, reason: FinishReason, timings: Timings) -> None:
        """Tell the last token, or that none will come; called by the model's thread."""
        with self._condition:
            self._events.append(TokenEvent(len(self._tokens), token, reason, timings))
            if token is not None:
                self._tokens.append(token)
            self._end = Generation(tuple(self._tokens), reason, timings)
            self._tell()

    def fail(self, message: str, cause: BaseException | None = None) -> None:
        """Tell that no more tokens will come, and why; called by the model's thread."""
        with self._condition:
            self._failure = message, cause
            self._tell()

    def _tell(self) -> None:
        self._condition.notify_all()
        if self._wake is not None:
            os.eventfd_write(self._wake, 1)

    def _has_news(self) -> bool:
        return bool(self._events) or self.is_finished

    def _take(self) -> TokenEvent | None:
        """Return the next event; None after the last one."""
        if self._events:
            return self._events.popleft()
        if self._failure is not None:
            self._whole()
        return None

    def _whole(self) -> Generation:
        if self._failure is not None:
            message, cause = self._failure
            raise GenerationFailed(message) from cause
        assert self._end is not None
        return self._end

    async def _wait(self, is_over: Callable[[], bool]) -> None:
        """Wait until something is told."""
        wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with self._condition:
                if is_over():
                    return
                if self._wake is not None:
                    raise RuntimeError("this ticket has a reader already")
                self._wake = wake
            try:
                await anyio.wait_readable(wake)
            finally:
                with self._condition:
                    self._wake = None
        finally:
            os.close(wake)
