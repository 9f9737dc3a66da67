"""Notes on their way into the log, and the values that they speak of.

Whoever asks for a note gets a ticket, and may wait for it later or never. A note may overtake the
value that it speaks of, when that is still being encoded or has to be tried again: so values that
are on their way are known here by their key, and are changed or made void at once.
"""

import anyio
from anyio import Future

from respkv.errors import TierError
from respkv.tiers.batch import Bury, Change, Note
from respkv.tiers.log import Logged
from respkv.tiers.meta import KEY_BYTES_MAX
from respkv.tiers.parts import Parts
from respkv.tiers.pending import Pending
from respkv.tiers.record import Level, Meta

_FORGET_S = 1.0


class Tickets:
    """The notes of one tier."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._notes: dict[int, Pending] = {}
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

    def clear(self) -> None:
        """Forget all notes: what they speak of is gone."""
        self._notes.clear()
        self._latest.clear()

    def bury(self, key: bytes, generation: int) -> int:
        """Do what FileTier.bury says."""
        for pending in self._values.get(key, ()):
            assert pending.value is not None
            pending.is_void |= pending.value.meta.generation <= generation
        return self._note(Bury(key, generation), key)

    def change(self, meta: Meta) -> int:
        """Do what FileTier.change says."""
        values: list[Pending] = []
        for pending in self._values.get(meta.key, ()):
            if pending.value is not None and pending.value.meta.generation == meta.generation:
                pending.value = pending.value._replace(meta=meta)
                values.append(pending)
        ticket = self._note(Change(meta), meta.key)
        self._latest[meta.generation] = ticket
        self._notes[ticket].values = values
        return ticket

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
        pending = self._notes.get(ticket)
        if level == Level.MEMORY or pending is None:
            return
        for value in pending.values:
            await value.done.wait()
        await pending.done.wait()
        logged = pending.logged
        assert logged is not None
        if pending.done.exception is not None:
            raise TierError(str(pending.done.exception))
        if not logged.sequence:  # it was left out
            latest = self._latest.get(pending.generation, ticket)
            if latest > ticket:  # because a later change says more
                await self.settle(latest, level)
        elif level == Level.DURABLE and isinstance(logged.note, Change):
            await self._parts.syncer.cover_all()  # wherever the value is
        elif level == Level.DURABLE:
            await self._parts.syncer.cover(logged.segment, logged.sequence)

    async def run(self) -> None:
        """Forget the notes that a checkpoint covers, until cancelled."""
        stats = self._parts.log.stats
        count, before = stats.checkpoints, self._last
        while True:
            await anyio.sleep(_FORGET_S)
            if stats.checkpoints < count + 2:  # one of them began after the note was written
                continue
            self._notes = {
                ticket: each
                for ticket, each in self._notes.items()
                if ticket > before or each.done.status is Future.Status.PENDING
            }
            self._latest = {key: each for key, each in self._latest.items() if each in self._notes}
            count, before = stats.checkpoints, self._last

    def _note(self, note: Note, key: bytes) -> int:
        log = self._parts.log
        self._last += 1
        logged = Logged(note)
        pending = Pending(Level.WRITTEN, log.epoch, logged=logged)
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
