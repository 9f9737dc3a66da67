"""One thing that waits to be in the log: a value, a note, or a record on its way elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass, field

from anyio import Future

from respkv.errors import TierError
from respkv.tiers.batch import Change
from respkv.tiers.format import HEADER_BYTES
from respkv.tiers.log import Log, Logged
from respkv.tiers.record import Level, Meta, Record, Value
from respkv.tiers.sizes import round_up

_ITEM_BYTES = 256  # at most, of the head, for one item without its keys


def _keys(meta: Meta) -> int:
    return _ITEM_BYTES + len(meta.key) + len(meta.parent)


def _future() -> "Future[Record | None]":
    return Future()


@dataclass(eq=False, slots=True)
class Pending:
    """A value or a note, and whoever waits for it.

    value, logged: exactly one of the two is there.
    source:   the live record whose bytes these are, when reclaim copies it; it is moved.
    payload, image, codec: as they will be stored.
    level:    ``done`` is set when this holds.
    epoch:    of the log, when it was asked.
    is_void:  nobody wants it any more; it is left out if it is not on its way yet.
    tries:    how often writing it failed.
    values:   of a note: what it speaks of and is on its way itself.
    told:     called once, when ``done`` is set.
    done:     the record (None when there is none); for a note None, or a TierError.
    """

    level: Level
    epoch: int
    value: Value | None = None
    logged: Logged | None = None
    source: Record | None = None
    payload: memoryview = field(default_factory=lambda: memoryview(b""))
    image: memoryview | None = None
    codec: int = 0
    is_encoded: bool = False
    is_void: bool = False
    tries: int = 0
    values: list["Pending"] = field(default_factory=list["Pending"])
    told: Callable[[], None] | None = None
    done: "Future[Record | None]" = field(default_factory=_future)

    @property
    def nbytes(self) -> int:
        """About what it takes in a batch."""
        if self.value is not None:
            unit = 64 if self.image is None else 4096
            return round_up(HEADER_BYTES + self.payload.nbytes, unit) + _keys(self.value.meta)
        assert self.logged is not None
        note = self.logged.note
        return 2 * (_keys(note.meta) if isinstance(note, Change) else _ITEM_BYTES + len(note.key))

    @property
    def generation(self) -> int:
        """The generation that a change speaks of, else 0."""
        note = None if self.logged is None else self.logged.note
        return note.meta.generation if isinstance(note, Change) else 0

    def meta(self, log: Log) -> Meta:
        """Return how the value is described at this moment."""
        assert self.value is not None
        return self.value.meta if self.source is None else log.describe(self.source)

    def is_wanted(self, log: Log) -> bool:
        """Say whether it should still be written.

        What was buried or forgotten meanwhile must not come behind its own burial into the log.
        """
        if self.is_void or self.epoch != log.epoch or self.done.status is not Future.Status.PENDING:
            return False
        if self.source is not None:
            return log.is_live(self.source)
        return self.logged is None or not log.is_superseded(self.logged.note)

    def answer(self, record: Record | None) -> None:
        """It is in the log, or not wanted there, and its level holds."""
        if self.done.status is Future.Status.PENDING:
            self.done.return_value = record
            if self.told is not None:
                self.told()

    def fail(self, why: str) -> None:
        """It could not be written."""
        if self.done.status is not Future.Status.PENDING:
            return
        if self.logged is None:
            self.done.return_value = None
        else:
            self.done.exception = TierError(why)
        if self.told is not None:
            self.told()
