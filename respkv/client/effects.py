"""What an operation waits for.

Everything the client does (connect, shake hands, send, receive, retry, lease) is written once, as
generators that do their own non-blocking socket calls and yield only when they cannot go on. What
they yield is one of the five effects below; a face (``sync``, ``aio``) waits in its own way and
sends the answer back. So a face holds no protocol and there is no second copy of anything. Two
other ways were left: async code unwrapped by a synchronous runner types every call as a coroutine,
and code generated from one face to the other needs a build step.

Every effect carries the moment (``time.monotonic``) when waiting must end; it is answered with
False, or None for Resolve, when that comes first. Whatever a face raises while it waits, a
cancellation above all, is thrown into the operation, which closes its connection and lets it pass.
"""

import socket
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

AddressInfo: TypeAlias = tuple[int, int, int, str, tuple[Any, ...]]


class Event(IntFlag):
    """What a socket must be ready for."""

    READ = 1
    WRITE = 2
    BOTH = 3


@dataclass(slots=True)
class Wait:
    """Wait until the socket is ready for any of ``events``."""

    sock: socket.socket
    events: Event
    deadline: float


@dataclass(slots=True)
class Heed:
    """Wait until a stream without a socket, which its own process answers, rings its bell.

    bell: of the kind that the face waits for: ``wait(timeout_s) -> bool`` for the blocking one,
          ``async wait()`` for the other. It may ring when there is nothing new.
    """

    bell: Any
    deadline: float


@dataclass(slots=True)
class Seat:
    """Wait for one of the pool's ``pool_max`` seats; the operation gives it back."""

    deadline: float


@dataclass(slots=True)
class Sleep:
    """Wait, but no longer than the deadline."""

    seconds: float
    deadline: float


@dataclass(slots=True)
class Resolve:
    """Find the addresses of a host: what ``socket.getaddrinfo`` returns, or its OSError."""

    host: str
    port: int
    deadline: float


Effect: TypeAlias = Wait | Heed | Seat | Sleep | Resolve
Operation: TypeAlias = Generator[Effect, Any, T]
