"""Which run of a server used a directory last: in each tier's directory, in the file ``run``.

What was deleted or overwritten while a directory was left out, no log in it knows. So each run draws
a mark, the time of its start and some random bytes, and puts it into every directory that it uses.
When a start finds different marks, what is in the directories that missed the last run may be old.
As after a crash, only pages whose keys name their content are kept of that: they have only ever had
one value.

The mark is put when all tiers have started and before a client is served. A start that fails
leaves the marks as they were, so a directory that could not be mounted is no reason to forget.
"""

import logging
import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anyio

from respkv.errors import TierError
from respkv.tiers.format import hash64

if TYPE_CHECKING:
    from respkv.engine.copies import Copies
    from respkv.tiers.file_tier import FileTier

logger = logging.getLogger(__name__)

FILE_NAME = "run"
_WORDS = ("respkv", "run")
_BYTES_MAX = 200
FORGET_S, LOOK_S = 30.0, 0.01


class Mark(NamedTuple):
    """A run.

    started_ms: by the wall clock, but later than those of the marks that it found.
    name:       tells it apart.
    """

    started_ms: int
    name: str


UNMARKED = Mark(0, "")  # an empty directory, or one that no such server used


def encode(mark: Mark) -> bytes:
    """Return the text of a file."""
    text = " ".join((*_WORDS, str(mark.started_ms), mark.name))
    return f"{text} {hash64(text.encode()):016x}\n".encode()


def decode(data: bytes) -> Mark | None:
    """Return the mark; None when these are not the bytes that were written."""
    try:
        _, _, started_ms, name, _ = data[:_BYTES_MAX].decode().split()
        mark = Mark(int(started_ms), name)
    except ValueError:
        return None
    return mark if encode(mark) == data else None


def read_marks(places: Sequence[tuple[str, str]]) -> list[Mark | None]:
    """Return the mark in each directory, given as (name of the tier, path); None: it cannot be read.

    Blocks.
    """
    found: list[Mark | None] = []
    for tier, path in places:
        try:
            mark = decode((Path(path) / FILE_NAME).read_bytes())
            if mark is None:
                logger.error("tier %s: the file %s in %s is damaged", tier, FILE_NAME, path)
        except (FileNotFoundError, NotADirectoryError):
            mark = UNMARKED
        except OSError:
            mark = None  # the tier meets the same when it starts, and says so
        found.append(mark)
    return found


def stale(marks: Sequence[Mark | None]) -> set[int]:
    """Return the numbers of the tiers that missed the last run, or may have missed it."""
    last = max((mark for mark in marks if mark is not None), default=None)
    return {number for number, mark in enumerate(marks) if mark is None or mark != last}


def next_mark(marks: Sequence[Mark | None], wall_ms: int) -> Mark:
    """Return the mark of a run that finds these."""
    last_ms = max((mark.started_ms for mark in marks if mark is not None), default=0)
    return Mark(max(wall_ms, last_ms + 1), os.urandom(8).hex())


async def put_mark(
    copies: "Copies", tiers: "Sequence[FileTier]", stale: Container[int], mark: Mark
) -> None:
    """Put a mark into the directories of tiers, durably.

    stale: numbers of tiers that missed the last run. They get it when their logs know what was
           dropped of them, else a crash would bring that back.
    One that does not get it is used all the same; what may be old is dropped at the next start too.
    """
    with anyio.move_on_after(FORGET_S):
        while copies.leaving:  # noqa: ASYNC110 (each burial ends for itself; none is the last)
            await anyio.sleep(LOOK_S)
    for number, tier in enumerate(tiers):
        try:
            if number in stale and (copies.leaving or copies.unburied):
                raise TierError(f"tier {tier.name} could not forget what may be old")
            await tier.save(FILE_NAME, encode(mark))
        except TierError as error:
            logger.warning("%s: the next start will take it for one that was left out", error)
