"""What the core of the semantic cache asks of a face, and what a face asks of a cache.

The core is written once, as operations that yield effects, so that the blocking and the
asynchronous face differ only in how they send a few commands and read a few messages. Between two
effects an operation runs alone. While an ``Ask`` is out that says so, others may run.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from respkv.client import PageEvent
from respkv.client.replies import Reply
from respkv.client.requests import Arg

T = TypeVar("T")

Key: TypeAlias = "str | bytes"


@dataclass(frozen=True, slots=True)
class Ask:
    """Send commands together; the answer is their replies, errors among them.

    lets_others: other operations may run until they are in.
    """

    commands: Sequence[Sequence[Arg]]
    lets_others: bool = False


@dataclass(frozen=True, slots=True)
class Hear:
    """Listen to a namespace; the answer is what was heard since the last time (Heard)."""

    namespace: str


@dataclass(frozen=True, slots=True)
class Heard:
    """What became of entries.

    is_new: listening has begun just now: what was before is not known.
    """

    events: Sequence[PageEvent]
    is_new: bool


Effect: TypeAlias = Ask | Hear
Steps: TypeAlias = Generator[Effect, Any, T]


class Commands(Protocol):
    """A pipeline of a blocking cache."""

    def command(self, *args: Arg) -> Any:
        """Add a command."""
        ...

    def execute(self, *, raise_on_error: bool = True) -> list[Reply]:
        """Send what was collected."""
        ...


class Events(Protocol):
    """Listening of a blocking cache."""

    def next(self, timeout_s: float | None = None) -> PageEvent | None:
        """Return what comes next, or None when nothing has come in time."""
        ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> Literal[None] | bool: ...


class Cache(Protocol):
    """A ``respkv.client.Client``, or an engine opened by ``respkv.open_sync``."""

    def pipeline(self) -> Commands:
        """Collect commands to send together."""
        ...

    def events(self, *namespaces: Key) -> Events:
        """Follow what becomes of the pages of namespaces."""
        ...


class AsyncCommands(Protocol):
    """A pipeline of an asynchronous cache."""

    def command(self, *args: Arg) -> Any:
        """Add a command."""
        ...

    async def execute(self, *, raise_on_error: bool = True) -> list[Reply]:
        """Send what was collected."""
        ...


class AsyncEvents(Protocol):
    """Listening of an asynchronous cache."""

    async def next(self, timeout_s: float | None = None) -> PageEvent | None:
        """Return what comes next, or None when nothing has come in time."""
        ...

    async def __aenter__(self) -> Any: ...

    async def __aexit__(self, *_: object) -> Literal[None] | bool: ...


class AsyncCache(Protocol):
    """A ``respkv.client.AsyncClient``, or an engine opened by ``respkv.open``."""

    def pipeline(self) -> AsyncCommands:
        """Collect commands to send together."""
        ...

    def events(self, *namespaces: Key) -> AsyncEvents:
        """Follow what becomes of the pages of namespaces."""
        ...
