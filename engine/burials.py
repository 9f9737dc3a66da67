"""What logs are told about values that have ended or changed, and who waits for that.

A file keeps what it was told. So when a value ends that a restart would bring back (one of level
``written`` or ``durable``, or a page whose key names its content), the log is told to bury it, and
the reply waits until it knows. Until then the key is in ``leaving``: whoever puts it anew, at
whatever level, waits as well, or a crash in between would bring back the value before. What could
not be buried is tried again, at the latest when its key is put or deleted again.
"""

from collections.abc import Callable, Container
from functools import partial
from itertools import islice
from typing import NamedTuple

from respkv.engine.clock import Clock
from respkv.engine.entry import Entry
from respkv.engine.lineage import pack_lineage
from respkv.engine.notes import Note, Notes, Settle
from respkv.engine.tier import Tier
from respkv.errors import TierError
from respkv.tiers.meta import is_content_addressed
from respkv.tiers.record import Level, Meta, Record

RETRIES_MAX = 256  # burials that are tried again at a time


class Unburied(NamedTuple):
    """A value that logs may bring back: up to which generation, by tier."""

    generations: dict[int, int]
    level: Level

    def merged(self, other: "Unburied") -> "Unburied":
        """Return what covers another one as well."""
        generations = dict(self.generations)
        for tier, generation in other.generations.items():
            generations[tier] = max(generation, generations.get(tier, 0))
        return Unburied(generations, max(self.level, other.level))


class Burials(Notes):
    """The values that logs have to forget.

    settles: what the mover has to wait for, so that notes can end.
    on_work: called when the mover should look.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.tiers: tuple[Tier, ...] = ()
        self.leaving: dict[bytes, Note] = {}
        self.unburied: dict[bytes, Unburied] = {}
        self.settles: list[Settle] = []
        self.on_work: Callable[[], None] = lambda: None

    def bury(
        self, key: bytes, tiers: set[int], generation: int, level: Level, *, waits: bool
    ) -> Note:
        """Tell logs that they may bring back no value of a key up to this generation."""
        what = Unburied(dict.fromkeys(tiers, generation), max(level, Level.WRITTEN))
        if (left := self.unburied.get(key)) is not None:
            what = what.merged(left)
        note, before = Note(len(what.generations)), self.leaving.get(key)
        if before is not None:
            note.todo += 1
            before.waiters.append(lambda: note.end(before.error))
        self.leaving[key] = note
        note.waiters.append(partial(self._left, key, note, what))
        if waits:
            self.add(note)
        for tier, last in what.generations.items():
            try:
                ticket = self.tiers[tier].bury(key, last)
            except TierError as error:
                note.end(str(error))
            else:
                self.settles.append(Settle(tier, ticket, what.level, note))
        self.on_work()
        return note

    def suspect(self, key: bytes, what: Unburied) -> None:
        """Note that logs may bring back a value of a key that they ought not to."""
        left = self.unburied.get(key)
        self.unburied[key] = what if left is None else what.merged(left)

    def absolve(self, key: bytes, generations: dict[int, int]) -> None:
        """Note up to which generations logs bring back no value of a key."""
        left = self.unburied.get(key)
        if left is None:
            return
        rest = {
            tier: generation
            for tier, generation in left.generations.items()
            if generation > generations.get(tier, -1)
        }
        if rest:
            self.unburied[key] = Unburied(rest, left.level)
        else:
            del self.unburied[key]

    def emptied(self, tier: int, generation: int) -> None:
        """Note that a log brings back nothing up to this generation."""
        for key in list(self.unburied):
            self.absolve(key, {tier: generation})

    def bury_again(self, present: Container[bytes]) -> None:
        """Try again to bury some of what could not be, unless the key has a value by now.

        That one may be of the same generation, and it is buried anyway when the value ends.
        """
        able = {number for number, tier in enumerate(self.tiers) if tier.health.state == "ok"}
        for key in list(islice(self.unburied, RETRIES_MAX)):
            left = self.unburied[key] = self.unburied.pop(key)  # the others have their turn
            if able.issuperset(left.generations) and not (key in present or key in self.leaving):
                self.bury(key, set(), 0, left.level, waits=False)

    def _left(self, key: bytes, note: Note, what: Unburied) -> None:
        if self.leaving.get(key) is note:
            del self.leaving[key]
        if note.error:
            self.suspect(key, what)
        else:
            self.absolve(key, what.generations)

    def wait_for_burial(self, entry: Entry) -> None:
        key = entry.key
        if is_content_addressed(key, entry.kind):
            return  # whatever comes back is what is here now
        if key in self.leaving:
            self.add(self.leaving[key])
        elif key in self.unburied:
            self.bury(key, set(), 0, self.unburied[key].level, waits=True)

    def change(self, meta: Meta, tier: int, level: Level, note: Note) -> None:
        """Tell a log that what it has described is different now."""
        try:
            ticket = self.tiers[tier].change(meta)
        except TierError as error:
            note.end(str(error))
        else:
            self.settles.append(Settle(tier, ticket, level, note))

    def meta(self, entry: Entry, record: Record) -> Meta:
        """Describe an entry's value as a record has it."""
        meta = self.describe(entry, record.checksum, record.generation, record.level)
        return meta._replace(payload_bytes=record.payload_bytes)

    def describe(self, entry: Entry, checksum: int, generation: int, level: Level) -> Meta:
        """Describe an entry's value."""
        now, wall_ms = self._clock.now, self._clock.wall_ms
        pinned_s = entry.pinned_until - now
        return Meta(
            key=entry.key,
            kind=entry.kind,
            payload_bytes=entry.nbytes,
            checksum=checksum,
            generation=generation,
            level=level,
            expires_ms=entry.expires_ms,
            pinned_ms=wall_ms + int(pinned_s * 1000) if pinned_s > 0 else 0,
            touched_ms=max(0, wall_ms - int((now - entry.touched) * 1000)),
            priority=entry.priority,
            tokens=entry.tokens,
            hits=entry.hits,
            parent=entry.parent_key,
            more=pack_lineage(entry),
        )
