"""Which copies values have beyond memory, which have none yet, and what the logs must be told.

An entry is dirty (in memory alone), clean (in memory and in files) or cold (in files alone). Dirty
ones wait here in the order in which they became so; the mover writes them, oldest first, before
memory is short. What a client wants to survive is urgent and goes first.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from respkv.engine.backlog import Backlog
from respkv.engine.burials import Unburied
from respkv.engine.clock import Clock
from respkv.engine.entry import ENTRY_BYTES, Entry
from respkv.engine.history import Reason
from respkv.engine.journeys import End, Move, Writing, ghost_of
from respkv.engine.notes import Note
from respkv.tiers.meta import is_content_addressed
from respkv.tiers.record import Level, Record

RECORD_BYTES = 360  # what a record costs on the heap, its place in the tier's tables included


class Copies(Backlog):
    """The dirty, the clean and the cold.

    lose:    removes an entry that has no copy left.
    requeue: told of an entry in memory that became clean.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.num_cold = self.cold_bytes = self.num_records = 0
        self.cold_max = 2_000_000  # the mover knows better when it runs
        self.moving: dict[Entry, list[Move]] = {}  # copies on their way from tier to tier
        self.owed: dict[Entry, End] = {}  # to be buried when the value after it is written
        self.ghosts: set[Entry] = set()  # which have their copies until then
        self.urgent: OrderedDict[Entry, list[Note]] = OrderedDict()
        self.kept: set[Entry] = set()  # small values that a load brought and somebody waits for
        self.lose: Callable[[Entry, Reason], None] = lambda entry, reason: None
        self.requeue: Callable[[Entry], None] = lambda entry: None

    # -- told by the cache --------------------------------------------------------------------

    def stored(self, entry: Entry, level: Level) -> None:
        """Note that an entry has a new value, of which there is no copy yet."""
        if entry not in (self.dirty_small if entry.slot is None else self.dirty_large):
            self.queue(entry)
        if level:
            self.want(entry, level)
        elif entry in self.urgent:
            _end_all(self.urgent.pop(entry))
        if self.leaving or self.unburied:
            self.wait_for_burial(entry)

    def is_awaited(self, entry: Entry) -> bool:
        """Whether a value is being written, or is to be, before a reply."""
        return entry in self.urgent or entry in self.writing

    def want(self, entry: Entry, level: Level) -> None:
        """Have a value written at a level before the reply."""
        note = Note()
        entry.level = level
        self.urgent.setdefault(entry, []).append(note)
        self.add(note)
        self.on_work()

    def replaced(self, entry: Entry, level: Level, *, by_string: bool) -> None:
        """Note that an entry is about to get another value, which is to be written at ``level``.

        A value that is to survive is buried when the new one, if that is to survive as well, is
        written: a crash in between leaves one of the two.
        """
        is_named = is_content_addressed(entry.key, entry.kind)
        end = self._end(entry)
        if end.tiers and end.level and level >= end.level and not is_named:
            self.owed[entry] = self._keep(entry, end)
            return
        entry.level = Level.MEMORY
        self._free(end)
        if end.tiers and (end.level or is_named):
            waits = by_string if is_named else True
            self.bury(entry.key, end.tiers, end.generation, end.level, waits=waits)

    def removed(self, entry: Entry, reason: Reason) -> None:
        """Note that an entry has left the index, or is about to."""
        is_named = is_content_addressed(entry.key, entry.kind)
        writing, end = self.writing.get(entry), self._end(entry)
        self._free(end)
        self.kept.discard(entry)
        is_meant = reason in ("deleted", "flushed", "expired", "schema")
        error = "" if is_meant else f"the value is gone: {reason}"
        if writing is not None and error:
            notes, writing.notes = writing.notes, []
            _end_all(notes, error)
        if entry in self.urgent:
            _end_all(self.urgent.pop(entry), error)
        waits = reason == "deleted" and not is_named
        if reason != "deleted" and is_named:
            return
        if end.tiers and (end.level or is_named):
            self.bury(entry.key, end.tiers, end.generation, end.level, waits=waits)
        elif waits and (self.leaving or self.unburied):
            self.wait_for_burial(entry)

    def flushed(self, entries: Iterable[Entry]) -> None:
        """Note that the index is empty. The tiers are cleared as a whole, or free each record."""
        for entry in entries:
            entry.records, entry.level = (), Level.MEMORY
        for ghost in self.ghosts:
            ghost.records = ()
        for writing in self.writing.values():
            writing.is_void = True
        for notes in self.urgent.values():
            _end_all(notes)
        for queue in (self.dirty_large, self.dirty_small, self.writing, self.urgent):
            queue.clear()
        for each in (self.given_up, self.moving, self.owed, self.kept, self.ghosts):
            each.clear()
        self.admission.clear()
        self.queued_bytes = self.queued_small_bytes = self.writing_bytes = self.hurried_bytes = 0
        self.num_cold = self.cold_bytes = self.num_records = 0

    def changed(self, entry: Entry) -> None:
        """Note that an entry's TTL, pin or priority changed."""
        if not entry.level:
            return
        journeys: list[Writing | Move] = [*self.moving.get(entry, ())]
        if (writing := self.writing.get(entry)) is not None:
            journeys.append(writing)
        note = Note(len(entry.records) + len(journeys))
        if not note.todo:
            return  # it is still to be written, and will be as it is then
        for journey in journeys:
            journey.changes.append(note)
        for record in entry.records:
            self.change(self.meta(entry, record), record.tier, entry.level, note)
        self.add(note)
        self.on_work()

    def demoted(self, entry: Entry) -> None:
        """Note that an entry has become cold."""
        self.num_cold += 1
        self.cold_bytes += ENTRY_BYTES + len(entry.key)

    def raised(self, entry: Entry) -> None:
        """Note that an entry is not cold any more: it is in memory, gets another value, or goes."""
        self.num_cold -= 1
        self.cold_bytes -= ENTRY_BYTES + len(entry.key)

    # -- told by the mover --------------------------------------------------------------------

    def begin_write(self, entry: Entry, tier: int, level: Level, generation: int) -> Writing:
        """Take an entry out of its queues: its value, of this generation, is being written."""
        dirt = self.take_out(entry)
        notes = self.urgent.pop(entry, [])
        entry.generation = generation
        writing = Writing(entry, tier, level, generation, dirt, notes)
        self.writing[entry] = writing
        self.writing_bytes += 0 if dirt is None else dirt.nbytes
        return writing

    def end_write(self, writing: Writing, record: Record | None) -> None:
        """Attach the record of a written value, or free it if that is not the value any more."""
        entry = writing.entry
        self.forget_write(writing)
        if record is not None:
            record.tier = writing.tier
            burial: Note | None = None
            if not writing.is_void:
                self.attach(entry, record)
                self.catch_up(record, writing)
                burial = self._pay(entry, {writing.tier})
            elif self.let_go(writing.ghost, record):
                self.catch_up(record, writing)  # what is owed is paid when the value after it is in
            self._promise(writing, burial)
        elif not writing.is_void and not entry.is_cold and not entry.records:
            self.queue(entry)
        _end_all(writing.changes)

    def fail(self, writing: Writing, reason: str) -> None:
        """Tell those who wait that a value will not be written at its level."""
        assert not writing.is_void
        self.doubt(writing)
        self._lower(writing.entry)
        self._pay(writing.entry, set())
        _end_all(writing.notes, reason)
        writing.notes = []

    def doubt(self, writing: Writing) -> None:
        """Note that a write failed, and that its log may have the value all the same."""
        entry, level = writing.entry, writing.level
        if level and not is_content_addressed(entry.key, entry.kind):
            self.suspect(entry.key, Unburied({writing.tier: writing.generation}, level))
            if not entry.records:
                entry.generation = 0  # it may be buried up to that one

    def hand_on(self, writing: Writing) -> None:
        """Let those who wait for a value that was overwritten wait for the one after it."""
        entry, notes = writing.entry, writing.notes
        writing.notes = []
        if entry in self.urgent:
            self.urgent[entry].extend(notes)
        elif entry in self.writing and self.writing[entry].level:
            self.writing[entry].notes.extend(notes)
        else:
            _end_all(notes)

    def refuse(self, entry: Entry, reason: str) -> None:
        """Tell those who wait for an urgent value that no tier takes it."""
        self._lower(entry)
        self._pay(entry, set())
        _end_all(self.urgent.pop(entry), reason)

    def catch_up(self, record: Record, journey: Writing | Move) -> None:
        """Tell the log that has a copy now what has changed while it was on its way."""
        changes, journey.changes = journey.changes, []
        entry: Entry = record.owner
        for note in changes:
            self.change(self.meta(entry, record), record.tier, entry.level, note)

    def end_move(self, entry: Entry, move: Move) -> None:
        """Note that a copy is not on its way to another tier any more."""
        changes, move.changes = move.changes, []
        _end_all(changes)
        moves = self.moving.get(entry)
        if moves is not None and move in moves:
            moves.remove(move)
            if not moves:
                del self.moving[entry]

    def attach(self, entry: Entry, record: Record) -> None:
        """Give an entry one more copy; copies of older values, and one in the same tier, go."""
        kept = [
            each
            for each in entry.records
            if each.generation == record.generation and each.tier != record.tier
        ]
        for each in entry.records:
            if each not in kept:
                self.tiers[each.tier].free(each)
                if each.generation < record.generation:
                    self.bury_copy(entry, each)
        self.num_records += 1 + len(kept) - len(entry.records)
        entry.generation = max(entry.generation, record.generation)
        entry.records = tuple(sorted([*kept, record], key=_tier_of))
        if not entry.is_cold:
            self.take_out(entry)
            self.requeue(entry)

    def let_go(self, ghost: Entry | None, record: Record) -> bool:
        """Take a copy that has come too late; it is kept as long as the ghost of its value.

        Returns whether it is.
        """
        is_kept = ghost is not None and ghost in self.ghosts
        if ghost is not None and is_kept:
            record.owner = ghost
            ghost.records = (*ghost.records, record)
        else:
            self.tiers[record.tier].free(record)
        return is_kept

    def bury_copy(self, entry: Entry, record: Record) -> None:
        """Have a log forget one copy of a value, in the turn in which that is freed or gone."""
        if record.level and not is_content_addressed(entry.key, entry.kind):
            self.bury(entry.key, {record.tier}, record.generation, record.level, waits=False)

    def detach(self, record: Record, reason: Reason) -> None:
        """Note that a copy is gone; an entry without any other copy goes too."""
        entry: Entry = record.owner
        if entry is None or record not in entry.records:
            return
        entry.records = tuple(each for each in entry.records if each is not record)
        self.bury_copy(entry, record)
        if entry in self.ghosts:
            return
        self.num_records -= 1
        if reason == "evicted":
            self.admission.dropped(entry)
        if record.level:
            entry.generation = 0  # the log forgets it, so it is written under another one
        if entry.records:
            return
        if entry.is_cold:
            self.raised(entry)
            self.lost_from = record.tier
            self.lose(entry, reason)
        elif entry in self.writing:
            pass  # there will be another copy
        elif reason == "evicted" and entry not in self.urgent:
            # Writing it again would push out the next one. It has time until memory gives it up.
            entry.level = Level.MEMORY
            self.given_up[entry] = None
        else:
            self.queue(entry)
            if entry.level:
                self.urgent.setdefault(entry, [])
                self.on_work()

    def forget(self, tier: int, entries: Iterable[Entry]) -> None:
        """Forget all copies in a tier."""
        for entry in list(entries):
            for record in entry.records:
                if record.tier == tier:
                    self.detach(record, "lost")

    # -- inside -------------------------------------------------------------------------------

    def _end(self, entry: Entry) -> End:
        """Let go of all copies of a value, those on their way too, and say which logs know it."""
        records, entry.records = entry.records, ()
        owed = self.owed.pop(entry, End(set(), 0, Level.MEMORY))
        generation, level = owed.generation, owed.level
        tiers = self._tiers_of(owed) | {record.tier for record in records}
        generation = max([generation, entry.generation, *(each.generation for each in records)])
        level = max([level, *(record.level for record in records)])
        writing = self.writing.get(entry)
        if writing is not None:
            writing.is_void = True
            self.forget_write(writing)
            tiers.add(writing.tier)
            level = max(level, writing.level)
        for move in self.moving.pop(entry, ()):
            tiers.add(move.tier)
            generation, level = max(generation, move.generation), max(level, move.level)
        self.take_out(entry)
        if entry.is_cold and records:
            self.raised(entry)
        self.num_records -= len(records)
        return End(tiers, generation, level, owed.ghosts, records, writing)

    def _keep(self, entry: Entry, end: End) -> End:
        """Keep the copies of a value that is being replaced until it may be buried."""
        ghost = ghost_of(entry, end.records)
        self.ghosts.add(ghost)
        if end.writing is not None:
            end.writing.ghost = ghost
        entry.level = Level.MEMORY
        return end._replace(ghosts=(*end.ghosts, ghost), records=(), writing=None)

    def _free(self, end: End) -> None:
        """Free the copies of a value, in the turn in which its burial is asked for."""
        for record in end.records:
            self.tiers[record.tier].free(record)
        for ghost in end.ghosts:
            records, ghost.records = ghost.records, ()
            self.ghosts.discard(ghost)
            for record in records:
                self.tiers[record.tier].free(record)

    def _tiers_of(self, end: End) -> set[int]:
        """Return the tiers whose logs know a value, those included to which it moved since."""
        tiers = set(end.tiers)
        for ghost in end.ghosts:
            tiers.update(record.tier for record in ghost.records)
            tiers.update(move.tier for move in self.moving.pop(ghost, ()))
        return tiers

    def _pay(self, entry: Entry, but: set[int]) -> Note | None:
        """Bury what was before the value that has been written now, or will not be.

        but: tiers whose logs know the newer one, which is as good.
        Returns the burial that was asked for.
        """
        end = self.owed.pop(entry, None)
        if end is None:
            return None
        tiers = self._tiers_of(end) - but
        self._free(end)
        if not tiers:
            return None
        return self.bury(entry.key, tiers, end.generation, end.level, waits=False)

    @staticmethod
    def _promise(writing: Writing, burial: Note | None) -> None:
        """Tell those who wait for a value that it is written.

        burial: of the one before in other logs. The new one keeps it away while it is there; but
                when that ends, its log may know so before the others do. So they wait for it too,
                however it ends: what failed is remembered.
        """
        notes, writing.notes = writing.notes, []
        if burial is None or not burial.todo:
            _end_all(notes)
        else:
            burial.waiters.append(lambda: _end_all(notes))

    @staticmethod
    def _lower(entry: Entry) -> None:
        entry.level = max((record.level for record in entry.records), default=Level.MEMORY)


def _end_all(notes: Iterable[Note], error: str = "") -> None:
    for note in notes:
        note.end(error)


def _tier_of(record: Record) -> int:
    return record.tier
