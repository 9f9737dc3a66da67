"""What logs are told about values that have ended or changed, and who waits for that.

A file keeps what it was told. So when a value ends that a restart would bring back (one of level
``written`` or ``durable``, or a page whose key names its content), the log is told to bury it, and
the reply waits until it knows. Until then the key is in ``leaving``: whoever puts it anew, at
whatever level, waits as well, or a crash in between would bring back the value before. What could
not be buried is tried again when its key is put again.
"""

from collections.abc import Callable
from functools import partial

from respkv.engine.clock import Clock
from respkv.engine.entry import Entry
from respkv.engine.notes import Note, Notes, Settle
from respkv.engine.tier import Tier
from respkv.errors import TierError
from respkv.tiers.meta import is_content_addressed
from respkv.tiers.record import Level, Meta, Record


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
        self.unburied: dict[bytes, tuple[set[int], int, Level]] = {}
        self.settles: list[Settle] = []
        self.on_work: Callable[[], None] = lambda: None

    def bury(
        self, key: bytes, tiers: set[int], generation: int, level: Level, *, waits: bool
    ) -> None:
        """Tell logs that they may bring back no value of a key up to this generation."""
        note, level = Note(len(tiers)), max(level, Level.WRITTEN)
        before = self.leaving.get(key)
        if before is not None:
            note.todo += 1
            before.waiters.append(lambda: note.end(before.error))
        self.leaving[key] = note
        note.waiters.append(partial(self._left, key, note, (tiers, generation, level)))
        if waits:
            self.add(note)
        for tier in tiers:
            try:
                ticket = self.tiers[tier].bury(key, generation)
            except TierError as error:
                note.end(str(error))
            else:
                self.settles.append(Settle(tier, ticket, level, note))
        self.on_work()

    def _left(self, key: bytes, note: Note, what: tuple[set[int], int, Level]) -> None:
        if self.leaving.get(key) is note:
            del self.leaving[key]
        if note.error:
            self.unburied[key] = what
        else:
            self.unburied.pop(key, None)

    def wait_for_burial(self, entry: Entry) -> None:
        key = entry.key
        if is_content_addressed(key, entry.kind):
            return  # whatever comes back is what is here now
        if key in self.leaving:
            self.add(self.leaving[key])
        elif key in self.unburied:
            tiers, generation, level = self.unburied[key]
            self.bury(key, tiers, generation, level, waits=True)

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
        )
