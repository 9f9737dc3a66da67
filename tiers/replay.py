"""What a log holds: the checkpoint, and the batches behind it in the order of their sequence.

Later batches say what holds: a greater generation of a key replaces a smaller one, of two copies of
one generation the one written last is kept (the other is where it was moved from), and what was
buried stays away whatever comes after. A value that is damaged is forgotten, and so is the older
one it had replaced: nobody would know that it is old.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from respkv.tiers.batch import Bury, Change, Note, ValueItem
from respkv.tiers.checkpoint import Found
from respkv.tiers.record import Meta, Record
from respkv.tiers.scan import Scan, ScannedBatch


@dataclass(slots=True)
class Replay:
    """The state of a log while batches are applied.

    live:     by key.
    sequence: of the checkpoint; older batches are in it.
    is_same_boot: the machine did not go down, so what was acknowledged must be there. After a power
        cut only what was synced must, and that nothing says: all that is not whole counts as torn.
    acked:    batches up to this sequence are known to have been acknowledged.
    lost_notes_below: notes of acknowledged batches below this sequence may be missing.
    copies:   the generations of values that reclaim had copied, by key.
    """

    live: dict[bytes, Found]
    sequence: int
    void_below: int
    is_same_boot: bool
    acked: int = 0
    lost_notes_below: int = 0
    next_sequence: int = 1
    next_generation: int = 1
    replayed: int = 0
    damaged: int = 0
    torn: int = 0
    copies: dict[bytes, int] = field(default_factory=dict[bytes, int])
    notes: list[tuple[int, int, Note]] = field(default_factory=list["tuple[int, int, Note]"])
    _floor: dict[bytes, int] = field(default_factory=dict[bytes, int])  # void up to, by key

    def apply(self, scans: Iterable[Scan]) -> None:
        """Apply all batches of all segments."""
        batches = [(batch, scan.segment.id) for scan in scans for batch in scan.batches]
        batches.sort(key=lambda pair: pair[0].head.sequence)
        heads = [batch.head for batch, _ in batches]
        self.acked = max([self.sequence, *(head.acked for head in heads if self.is_same_boot)])
        for batch, segment_id in batches:
            self._apply_batch(batch, segment_id)
        there = {head.sequence for head in heads}
        for head in heads:
            # A batch of the same segment had notes, was acknowledged and is not there.
            if self.sequence < head.noted <= self.acked and head.noted not in there:
                self.lost_notes_below = max(self.lost_notes_below, head.noted + 1)
        for scan in scans:
            self.torn += scan.is_torn

    def _apply_batch(self, batch: ScannedBatch, segment_id: int) -> None:
        head = batch.head
        self.next_sequence = max(self.next_sequence, head.sequence + 1)
        is_acked = head.sequence <= self.acked
        self._count(is_acked, len(batch.damaged))
        self._count(head.sequence - 1 <= self.acked, batch.after_hole)
        for index, item in enumerate(head.items):
            if isinstance(item, ValueItem):
                self._see(item.meta.generation)
                if head.sequence < self.void_below:
                    continue
                if index not in batch.damaged:
                    self._add(item, batch, segment_id)
                elif is_acked:
                    self._bury(item.meta.key, item.meta.generation - 1)
            else:
                self._apply_note(item, head.sequence, segment_id)

    def _apply_note(self, note: Note, sequence: int, segment_id: int) -> None:
        if isinstance(note, Bury):
            self._see(note.generation)
            self._bury(note.key, note.generation)
        elif isinstance(note, Change):
            self._change(note.meta)
        if sequence >= self.void_below:
            self.notes.append((segment_id, sequence, note))

    def _count(self, is_acked: bool, count: int) -> None:
        if is_acked:
            self.damaged += count
        else:
            self.torn += count

    def _see(self, generation: int) -> None:
        self.next_generation = max(self.next_generation, generation + 1)

    def may_be_superseded(self, meta: Meta, record: Record) -> bool:
        """Whether what is missing may have buried or replaced a value.

        A value was put when its batch was written, a copy long before that: while the newer value
        waits for its sync, the older one is kept, and copied behind it.
        """
        is_copy = self.copies.get(meta.key) == meta.generation
        return record.sequence < self.lost_notes_below or (self.lost_notes_below > 0 and is_copy)

    def _add(self, item: ValueItem, batch: ScannedBatch, segment_id: int) -> None:
        meta = item.meta
        there = self.live.get(meta.key)
        if meta.generation <= self._floor.get(meta.key, -1):
            return
        if there is not None and there[0].generation > meta.generation:
            return
        self.replayed += 1
        if item.is_copy:
            self.copies[meta.key] = meta.generation
        self.live[meta.key] = meta, _record(item, batch, segment_id)

    def _bury(self, key: bytes, generation: int) -> None:
        self._floor[key] = max(self._floor.get(key, -1), generation)
        there = self.live.get(key)
        if there is not None and there[0].generation <= generation:
            del self.live[key]

    def _change(self, meta: Meta) -> None:
        there = self.live.get(meta.key)
        if there is not None and there[0].generation == meta.generation:
            there[1].level = meta.level
            self.live[meta.key] = meta, there[1]


def _record(item: ValueItem, batch: ScannedBatch, segment_id: int) -> Record:
    meta = item.meta
    return Record(
        segment=segment_id,
        offset=batch.head.offset + item.offset,
        stored_bytes=item.stored_bytes,
        payload_bytes=meta.payload_bytes,
        codec=item.codec,
        generation=meta.generation,
        checksum=meta.checksum,
        sequence=batch.head.sequence,
        level=meta.level,
        owner=None,
    )
