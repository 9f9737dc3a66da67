"""Recovery: from the files of a directory to what a log holds, whatever happened to them.

After a clean stop the last checkpoint is the truth and nothing else is read but the head of each
segment. After any other stop the newest whole checkpoint is completed by the batches behind it
(scan.py reads them, replay.py applies them). What is damaged is counted and left out; only files
that are somebody else's are an error.

A cache may forget, but it may not lie. A key that names its content (a page) has only ever had one
value. Any other may have been overwritten in memory by a value that no file has, so of those only
what was promised is kept: DURABLE ones, and WRITTEN ones unless the machine itself went down. And
where notes were lost that would say which of them are old, the older ones go too.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio

from respkv.errors import PageCorrupt, TierError
from respkv.tiers.batch import Note
from respkv.tiers.checkpoint import CHECKPOINT_NAMES, Checkpoint, Found
from respkv.tiers.device import Device
from respkv.tiers.meta import is_content_addressed
from respkv.tiers.record import Level, Meta, Record
from respkv.tiers.replay import Replay
from respkv.tiers.scan import Scan, scan_segment
from respkv.tiers.segment_head import (
    SEGMENT_HEAD_BYTES,
    SegmentHead,
    segment_name,
)
from respkv.tiers.segments import STATES, Segment, SegmentRow, SegmentTable
from respkv.tiers.superblock import SUPERBLOCK_NAME, Superblock, decode_superblock
from respkv.tiers.survey import DAMAGE, UNIT_BYTES, SegmentFile, Survey

SCANS_MAX = 4  # segments that are read at a time, each through a window of 2 MiB
_EVERYTHING = 1 << 63
# After a crash numbers are left out that may have been given to what was never read again.
_GAP = 1 << 20


@dataclass(slots=True)
class RecoveryCounts:
    """What recovery found.

    records:         that are offered.
    replayed:        values taken from batches behind the checkpoint.
    damaged:         things that had been acknowledged and are not whole.
    torn:            things that had not been acknowledged and are not whole.
    stale:           records whose segment was used again.
    dropped_mutable: records that may be older than what was last seen under their key.
    lost:            records in segments that cannot be read or are not there.
    """

    records: int = 0
    replayed: int = 0
    damaged: int = 0
    torn: int = 0
    stale: int = 0
    dropped_mutable: int = 0
    lost: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Recovered:
    """What a log holds.

    is_new:     the directory was empty.
    superblock: as it was found; its segment size is the one that counts.
    found:      the newest of each key. What is not wanted is discarded from ``segments``.
    checkpoint: the file of the one that was used, and its sequence: write the other one next.
    notes:      (segment, sequence, note) of all notes behind that checkpoint.
    messages:   for the log.
    """

    is_new: bool
    superblock: Superblock | None
    segments: SegmentTable
    found: list[Found] = field(default_factory=list["tuple[Meta, Record]"])
    next_sequence: int = 1
    next_generation: int = 1
    void_below: int = 0
    checkpoint: str | None = None
    checkpoint_sequence: int = 0
    notes: list[tuple[int, int, Note]] = field(default_factory=list["tuple[int, int, Note]"])
    counts: RecoveryCounts = field(default_factory=RecoveryCounts)
    messages: list[str] = field(default_factory=list[str])


async def recover(
    device: Device,
    *,
    tier: str,
    alignment: int,
    segment_bytes: int,
    capacity_bytes: int,
    reserve_bytes: int,
    boot_id: str,
    now: float,
) -> Recovered:
    """Find out what a directory holds. Nothing is written; every segment's file is open after it.

    segment_bytes: of a new directory; an old one keeps its own.
    boot_id: of this run of the machine; now: seconds, as for SegmentTable.
    Raises TierError when the files are not this tier's or of a newer version, and when the
    directory cannot be read at all; OSError when the system cannot read something just now.
    """
    started = time.perf_counter()
    try:
        names = set(await device.names())
        data = await device.load(SUPERBLOCK_NAME)
    except OSError as error:
        raise TierError(f"{tier}: the directory cannot be read: {error}") from error
    superblock, is_damaged = None, False
    if data is not None:
        try:
            superblock = decode_superblock(data, tier=tier, alignment=alignment)
        except PageCorrupt:
            is_damaged = True
    survey = Survey(device, names, alignment)
    await survey.read_segments()
    if superblock is not None:
        segment_bytes = superblock.segment_bytes
    elif survey.files:
        segment_bytes = _guess_segment_bytes(survey.files, segment_bytes)
    table = SegmentTable(
        segment_bytes=segment_bytes, capacity_bytes=capacity_bytes, reserve_bytes=reserve_bytes
    )
    is_new = superblock is None and not is_damaged and not survey.files
    recovered = Recovered(is_new, superblock, table, messages=survey.messages)
    if not is_new:
        is_same_boot = superblock is not None and superblock.boot_id == boot_id != ""
        with _without_collector():
            await _Recovery(survey, recovered, is_same_boot).run(now)
    recovered.counts.records = len(recovered.found)
    recovered.counts.seconds = time.perf_counter() - started
    return recovered


@contextmanager
def _without_collector() -> Iterator[None]:
    # All that is made here stays, and looking at it again and again takes longer than making it.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _guess_segment_bytes(files: list[SegmentFile], segment_bytes: int) -> int:
    largest = max(file.nbytes for file in files) // UNIT_BYTES * UNIT_BYTES
    return largest if largest > SEGMENT_HEAD_BYTES else segment_bytes


class _Recovery:
    """The recovery of a directory that is not new; ``run`` fills in ``recovered``."""

    def __init__(self, survey: Survey, recovered: Recovered, is_same_boot: bool) -> None:
        self.survey = survey
        self.recovered = recovered
        self.superblock = recovered.superblock
        self.counts = recovered.counts
        self.messages = recovered.messages
        self.is_clean = False
        self._scans: dict[int, Scan] = {}
        void_below = 0 if self.superblock is None else self.superblock.void_below
        self._replay = Replay({}, 0, void_below, is_same_boot)

    async def run(self, now: float) -> None:
        """Read what is left to read, and decide."""
        recovered, replay = self.recovered, self._replay
        name, checkpoint = await self.survey.read_checkpoints()
        self.is_clean = self._was_left_clean(checkpoint)
        rows: dict[int, SegmentRow] = {}
        if checkpoint is not None:
            rows = {row.id: row for row in checkpoint.rows}
            recovered.checkpoint, recovered.checkpoint_sequence = name, checkpoint.head.sequence
            self._take_checkpoint(checkpoint)
        if not self.is_clean:
            await self._scan(rows)
            replay.apply(self._scans.values())
            self._notice_lost_ends()
            self._drop_mutable()
        self._forget_lost()
        self._make_table(rows, now)
        recovered.found = list(replay.live.values())
        recovered.segments.add_all(record for _, record in recovered.found)
        recovered.notes = replay.notes
        recovered.void_below = replay.void_below
        self.counts.replayed = replay.replayed
        self.counts.damaged += replay.damaged
        self.counts.torn += replay.torn
        self._number()

    # -- reading ------------------------------------------------------------------------------

    async def _scan(self, rows: dict[int, SegmentRow]) -> None:
        """Read every segment that may have batches behind the checkpoint."""
        replay = self._replay
        limiter = anyio.Semaphore(SCANS_MAX)
        refusals: list[OSError] = []

        async def scan(file: SegmentFile, head: SegmentHead, start: int) -> None:
            nbytes = min(file.nbytes, self.recovered.segments.segment_bytes)
            async with limiter:
                try:
                    self._scans[file.id] = await scan_segment(
                        self.survey.device,
                        head,
                        start=start,
                        file_bytes=nbytes,
                        after=replay.sequence,
                        alignment=self.survey.alignment,
                    )
                except OSError as error:
                    if error.errno not in DAMAGE:
                        refusals.append(error)
                    file.is_readable = False
                    replay.lost_notes_below = _EVERYTHING
                    self.messages.append(f"{segment_name(file.id)} cannot be read: {error}")

        async with anyio.create_task_group() as group:
            for file in self.survey.files:
                row = rows.get(file.id)
                if file.is_head_missing and replay.is_same_boot:
                    # Else the machine may have gone down before it was written.
                    replay.lost_notes_below = _EVERYTHING
                    replay.damaged += 1
                    self.messages.append(f"{segment_name(file.id)} has lost its head")
                if file.head is not None:
                    start = _scan_from(row, file.head)
                    if start is not None:
                        group.start_soon(scan, file, file.head, start)
                elif not file.is_blank:
                    # It may have had notes: torn writes leave a blank head or one of two copies.
                    replay.lost_notes_below = _EVERYTHING
                    replay.damaged += file.is_readable
        if refusals:
            raise refusals[0]

    def _notice_lost_ends(self) -> None:
        """Look for what each segment's head says of the end of the one before it.

        A write that the disk never carried out, or put elsewhere, leaves nothing that is damaged.
        """
        replay = self._replay
        heads = {file.id: file.head for file in self.survey.files if file.head is not None}
        there = {batch.head.sequence for scan in self._scans.values() for batch in scan.batches}
        for head in heads.values():
            noted = head.before_noted
            if not replay.sequence < noted <= replay.acked or noted in there:
                continue
            before = heads.get(head.before)
            # Used again since, or deleted, it had been emptied by reclaim.
            is_same_use = before is not None and before.nonce == head.before_nonce
            if before is not None and (is_same_use or before.sequence <= noted):
                replay.lost_notes_below = max(replay.lost_notes_below, noted + 1)

    # -- deciding -----------------------------------------------------------------------------

    def _was_left_clean(self, checkpoint: Checkpoint | None) -> bool:
        if self.superblock is None or not self.superblock.is_clean:
            return False
        is_final = (
            checkpoint is not None
            and checkpoint.head.is_clean
            and checkpoint.head.next_sequence == self.superblock.next_sequence
        )
        if not is_final:
            self.messages.append("the checkpoint of the last stop is damaged: reading the log")
        return is_final

    def _take_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Take the records whose segment is there and in the same use."""
        head, replay, counts = checkpoint.head, self._replay, self.counts
        replay.sequence = head.sequence
        replay.void_below = max(replay.void_below, head.void_below)
        replay.next_sequence = max(head.next_sequence, head.sequence + 1)
        replay.next_generation = head.next_generation
        nonces = {file.id: file.head.nonce for file in self.survey.files if file.head is not None}
        good = {row.id for row in checkpoint.rows if nonces.get(row.id) == row.nonce}
        void_below = replay.void_below
        for pair in checkpoint.found:
            record = pair[1]
            if record.segment not in good:
                counts.stale += record.segment in nonces
                counts.lost += record.segment not in nonces
            elif record.sequence >= void_below:
                replay.live[pair[0].key] = pair

    def _forget_lost(self) -> None:
        """Drop what lies in files that cannot be read, or behind the end of one that was cut."""
        ends: dict[int, int] = {}
        for file in self.survey.files:
            nbytes = file.nbytes if file.is_readable else 0
            if nbytes < self.recovered.segments.segment_bytes:
                ends[file.id] = nbytes
        if not ends:
            return
        live = self._replay.live
        lost = [
            key
            for key, (_, record) in live.items()
            if record.segment in ends and record.offset + record.stored_bytes > ends[record.segment]
        ]
        for key in lost:
            del live[key]
        self.counts.lost += len(lost)

    def _drop_mutable(self) -> None:
        replay = self._replay
        if self.superblock is None or self.survey.broken_checkpoints == len(CHECKPOINT_NAMES):
            replay.lost_notes_below = _EVERYTHING
            self.messages.append("what may have been overwritten since is dropped")
        kept_from = Level.WRITTEN if replay.is_same_boot else Level.DURABLE
        dropped = [
            key
            for key, (meta, record) in replay.live.items()
            if (meta.level < kept_from or replay.may_be_superseded(meta, record))
            and not is_content_addressed(key, meta.kind)
        ]
        for key in dropped:
            del replay.live[key]
        self.counts.dropped_mutable += len(dropped)
        if replay.lost_notes_below:
            self.messages.append("notes of overwritten keys may be lost")

    # -- the result ---------------------------------------------------------------------------

    def _make_table(self, rows: dict[int, SegmentRow], now: float) -> None:
        streams = 0
        for file in self.survey.files:
            segment = self._segment(file, rows.get(file.id))
            segment.written_s = now
            if segment.state == "open":
                segment.stream = streams
                streams += 1
            self.recovered.segments.adopt(segment)

    def _segment(self, file: SegmentFile, row: SegmentRow | None) -> Segment:
        if not file.is_readable:
            return Segment(file.id, "fenced")
        head = file.head
        if head is None:
            return Segment(file.id, "free")
        segment = Segment(file.id, "sealed", head.nonce, head.sequence)
        if row is not None and row.nonce == head.nonce:
            segment.state = STATES[row.state]
            segment.offset, segment.settled = row.offset, row.settled
            segment.max_sequence, segment.noted = row.max_sequence, row.noted
        if not self.is_clean and segment.state == "open":
            segment.state = "sealed"
        if (scan := self._scans.get(file.id)) is not None:
            segment.offset = max(segment.offset, scan.end)
            heads = [batch.head for batch in scan.batches]
            segment.max_sequence = max([segment.max_sequence, *(head.sequence for head in heads)])
            if heads:
                # Notes of the last batch count too, which its own head does not say.
                segment.noted = segment.max_sequence
        segment.offset = min(segment.offset, self.recovered.segments.segment_bytes)
        segment.settled = segment.offset
        return segment

    def _number(self) -> None:
        recovered, replay = self.recovered, self._replay
        gap = 0 if self.is_clean else _GAP
        starts = [file.head.sequence for file in self.survey.files if file.head is not None]
        superblock = self.superblock
        known = (1, 1) if superblock is None else superblock[-2:]
        recovered.next_sequence = max(replay.next_sequence, known[0], *starts, 1) + gap
        recovered.next_generation = max(replay.next_generation, known[1]) + gap


def _scan_from(row: SegmentRow | None, head: SegmentHead) -> int | None:
    """Return where batches behind the checkpoint may start in a segment; None: there are none."""
    if row is None or row.nonce != head.nonce:
        return SEGMENT_HEAD_BYTES
    state = STATES[row.state]
    if state == "free" or (state == "sealed" and row.settled == row.offset):
        return None
    return row.settled
