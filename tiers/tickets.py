"""Notes on their way into the log, and the values that they speak of.

Whoever asks for a note gets a ticket, and may wait for it later or never. A note may overtake the
value that it speaks of, when that is still being encoded or has to be tried again: so values that
are on their way are known here by their key, and are changed or made void at once.

Tickets are many: of a note that is in the log only its place is kept, until checkpoints cover it.
"""

from functools import partial

import anyio
from anyio import Future
from anyio.lowlevel import checkpoint

from respkv.errors import TierError
from respkv.tiers.batch import Bury, Change, Note
from respkv.tiers.log import Logged
from respkv.tiers.meta import KEY_BYTES_MAX
from respkv.tiers.parts import Parts
from respkv.tiers.pending import Pending
from respkv.tiers.record import Level, Meta

_FORGET_S = 1.0
_FAILED_MAX = 20_000
_STEP = 2048  # notes at a time, before others have their turn


class Tickets:
    """The notes of one tier.

    _notes:    those on their way, and changes of values that are.
    _answered: the places of those that are in the log; _before: of those that were there when the
               last but one checkpoint began.
    _failed:   why some could not be written. _doubtful: all tickets up to this one whose fate is
               not known any more count as failed.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._notes: dict[int, Pending] = {}
        self._answered: dict[int, Logged] = {}
        self._before: dict[int, Logged] = {}
        self._failed: dict[int, str] = {}
        self._doubtful = 0
        self._values: dict[bytes, list[Pending]] = {}
        self._latest: dict[int, int] = {}  # by generation: the ticket of its last change
        self._last = 0
        parts.log.bury = self.bury
        parts.log.unwritten = self.unwritten

    def value_asked(self, pending: Pending) -> None:
        """A value is on its way until ``value_ended``."""
        assert pending.value is not None
        self._values.setdefault(pending.value.meta.key, []).append(pending)

    def value_ended(self, pending: Pending) -> None:
        assert pending.value is not None
        key = pending.value.meta.key
        self._values[key].remove(pending)
        if not self._values[key]:
            del self._values[key]

    def abandon(self, why: str) -> None:
        """Nobody writes any more: answer all that are on their way."""
        values = [each for some in self._values.values() for each in some]
        for pending in [*values, *self._notes.values()]:
            pending.fail(why)

    def clear(self) -> None:
        """Forget all notes: what they speak of is gone."""
        self._notes.clear()
        self._answered.clear()
        self._before.clear()
        self._failed.clear()
        self._latest.clear()
        self._doubtful = 0

    def bury(self, key: bytes, generation: int) -> int:
        """Do what FileTier.bury says."""
        for pending in self._values.get(key, ()):
            assert pending.value is not None
            pending.is_void |= pending.value.meta.generation <= generation
        return self._note(Bury(key, generation), key, [])

    def change(self, meta: Meta) -> int:
        """Do what FileTier.change says."""
        values: list[Pending] = []
        for pending in self._values.get(meta.key, ()):
            if pending.value is not None and pending.value.meta.generation == meta.generation:
                pending.value = pending.value._replace(meta=meta)
                values.append(pending)
        self._latest[meta.generation] = self._last + 1
        return self._note(Change(meta), meta.key, values)

    def unwritten(self) -> list[Bury]:
        """Return the burials that may not be in the log yet."""
        return [
            each.logged.note
            for each in self._notes.values()
            if each.done.status is Future.Status.PENDING
            and each.logged is not None
            and isinstance(each.logged.note, Bury)
        ]

    async def settle(self, ticket: int, level: Level) -> None:
        """Do what FileTier.settle says. A ticket that is not known holds."""
        if level == Level.MEMORY:
            return
        if (pending := self._notes.get(ticket)) is not None:
            for value in pending.values:
                await value.done.wait()
            await pending.done.wait()
            if pending.done.exception is not None:
                raise TierError(str(pending.done.exception))
            assert pending.logged is not None
            await self._cover(ticket, pending.logged, level)
        elif (why := self._failed.get(ticket)) is not None:
            raise TierError(why)
        elif logged := self._answered.get(ticket) or self._before.get(ticket):
            await self._cover(ticket, logged, level)
        elif ticket <= self._doubtful:
            raise TierError("too many notes have failed since to know of this one")

    async def _cover(self, ticket: int, logged: Logged, level: Level) -> None:
        """Return when ``level`` holds for a note that was answered."""
        note = logged.note
        if not logged.sequence:  # it was left out
            latest = self._latest.get(note.meta.generation, 0) if isinstance(note, Change) else 0
            if latest > ticket:  # because a later change says more
                await self.settle(latest, level)
        elif level == Level.DURABLE and isinstance(note, Change):
            await self._parts.syncer.cover_all()  # wherever the value is
        elif level == Level.DURABLE:
            await self._parts.syncer.cover(logged.segment, logged.sequence)

    async def run(self) -> None:
        """Forget the notes that a checkpoint covers, until cancelled."""
        stats = self._parts.log.stats
        count = stats.checkpoints
        while True:
            await anyio.sleep(_FORGET_S)
            if stats.checkpoints < count + 2:  # one of them began after they were answered
                continue
            await self._forget()
            count = stats.checkpoints

    async def _forget(self) -> None:
        for ticket, pending in list(self._notes.items()):
            if pending.done.status is not Future.Status.PENDING:
                self._told(ticket, pending)
        old, self._before, self._answered = self._before, self._answered, {}
        while old:
            for _ in range(min(len(old), _STEP)):
                ticket, logged = old.popitem()
                note = logged.note
                if isinstance(note, Change) and self._latest.get(note.meta.generation) == ticket:
                    del self._latest[note.meta.generation]
            await checkpoint()

    def _note(self, note: Note, key: bytes, values: list[Pending]) -> int:
        log = self._parts.log
        self._last += 1
        logged = Logged(note)
        pending = Pending(Level.WRITTEN, log.epoch, logged=logged, values=values)
        pending.told = partial(self._told, self._last, pending)
        self._notes[self._last] = pending
        is_needless = log.health.state == "off" and log.is_void
        if is_needless or len(key) > KEY_BYTES_MAX:  # nothing in the log has this key
            pending.answer(None)
        elif not log.health.can_write:
            pending.fail(f"tier {log.name} is {log.health.state}: {log.health.reason}")
        else:
            log.remember_change(logged)
            self._parts.writer.submit([pending])
        return self._last

    def _told(self, ticket: int, pending: Pending) -> None:
        """A note has been answered: what is left of it is small."""
        if self._notes.get(ticket) is not pending:
            return  # it was forgotten meanwhile
        if any(value.done.status is Future.Status.PENDING for value in pending.values):
            return  # whoever waits for it waits for them
        del self._notes[ticket]
        logged = pending.logged
        assert logged is not None
        if pending.done.exception is not None:
            self._fail(ticket, str(pending.done.exception))
        elif logged.sequence or isinstance(logged.note, Change):
            self._answered[ticket] = logged

    def _fail(self, ticket: int, why: str) -> None:
        self._failed[ticket] = why
        if len(self._failed) > _FAILED_MAX:
            oldest = next(iter(self._failed))
            del self._failed[oldest]
            self._doubtful = max(self._doubtful, oldest)
