"""What the core of the semantic cache asks of a face.

The core is written once, as operations that yield effects, so that the blocking and the
asynchronous face differ only in how they send a few commands and read a few messages. Between two
effects an operation runs alone. While an ``Ask`` is out that says so, others may run.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from respkv.client import PageEvent
from respkv.client.requests import Arg

T = TypeVar("T")


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
