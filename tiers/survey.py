"""The first look at a directory: the heads of its segments, and its newest whole checkpoint."""

import errno
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import anyio

from respkv.errors import PageCorrupt
from respkv.tiers.batch import NONCE_BYTES
from respkv.tiers.batch_reader import peek
from respkv.tiers.checkpoint import (
    BLOCK_BYTES,
    CHECKPOINT_NAMES,
    Checkpoint,
    CheckpointHead,
    CheckpointReader,
)
from respkv.tiers.device import Device
from respkv.tiers.segment_head import (
    SEGMENT_HEAD_BYTES,
    SegmentHead,
    decode_segment_head,
    segment_id_of,
    segment_name,
)

UNIT_BYTES = 4096
HEADS_MAX = 32  # heads of segments that are read at a time
_START_BYTES = SEGMENT_HEAD_BYTES + UNIT_BYTES  # of a segment: its head, and that of a batch
_READ_BYTES = 1 << 20
# Errors of a medium, and of a file that is shorter than it was. All others (no memory, no
# descriptor, no permission) say nothing about what is stored: then nothing may be given up.
DAMAGE = frozenset({errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN, errno.ENOENT})


@dataclass(slots=True)
class SegmentFile:
    """A segment's file.

    head: None when it is damaged, or was never written (``is_blank``).
    is_head_missing: it is blank or that of an earlier use, and the batch behind it of a later one.
    """

    id: int
    nbytes: int = 0
    head: SegmentHead | None = None
    is_blank: bool = False
    is_head_missing: bool = False
    is_readable: bool = True


class Survey:
    """Reads what is small. What it finds damaged is said in ``messages``; OSError is raised for
    what the system cannot do now and may do later.

    files:              of the segments, with what their heads say.
    broken_checkpoints: that are there and are not whole.
    """

    def __init__(self, device: Device, names: set[str], alignment: int) -> None:
        self.device = device
        self.names = names
        self.alignment = alignment
        self.files: list[SegmentFile] = []
        self.broken_checkpoints = 0
        self.messages: list[str] = []
        self._refusal: OSError | None = None

    async def read_segments(self) -> None:
        """Open every segment's file and read its head."""
        ids = sorted(found for name in self.names if (found := segment_id_of(name)) is not None)
        limiter = anyio.Semaphore(HEADS_MAX)
        self.files = [SegmentFile(segment_id) for segment_id in ids]
        memory = memoryview(mmap.mmap(-1, HEADS_MAX * _START_BYTES))
        places = [memory[at : at + _START_BYTES] for at in range(0, memory.nbytes, _START_BYTES)]

        async def read(file: SegmentFile) -> None:
            async with limiter:
                place = places.pop()
                await self._read_segment_head(file, place)
                places.append(place)

        async with anyio.create_task_group() as group:
            for file in self.files:
                group.start_soon(read, file)
        if self._refusal is not None:
            raise self._refusal

    async def _read_segment_head(self, file: SegmentFile, place: memoryview) -> None:
        name = segment_name(file.id)
        try:
            file.nbytes = await self.device.open(name)
            if file.nbytes < SEGMENT_HEAD_BYTES:
                file.is_blank = True
                return
            place = place[: file.nbytes // UNIT_BYTES * UNIT_BYTES]
            await self.device.read(name, 0, place)
        except OSError as error:
            if error.errno not in DAMAGE:
                self._refusal = error
            file.is_readable = False
            self.messages.append(f"{name} cannot be read: {error}")
            return
        try:
            file.head = decode_segment_head(place, alignment=self.alignment)
            if file.head.id != file.id:
                raise PageCorrupt(f"it is segment {file.head.id}")
        except PageCorrupt as error:
            file.head = None
            file.is_blank = not any(place[:SEGMENT_HEAD_BYTES])
            if not file.is_blank:
                self.messages.append(f"{name} is damaged: {error}")
                return
        file.is_head_missing = _is_of_later_use(place[SEGMENT_HEAD_BYTES:], file.head)

    async def read_checkpoints(self) -> tuple[str | None, Checkpoint | None]:
        """Return the newest checkpoint that is whole, and its name."""
        readers: list[tuple[int, str]] = []
        for name in CHECKPOINT_NAMES:
            if name in self.names:
                first = await self._read_checkpoint(name, only_head=True)
                if isinstance(first, CheckpointHead):
                    readers.append((first.sequence, name))
        for _, name in sorted(readers, reverse=True):
            whole = await self._read_checkpoint(name, only_head=False)
            if isinstance(whole, Checkpoint):
                return name, whole
        return None, None

    async def _read_checkpoint(
        self, name: str, *, only_head: bool
    ) -> Checkpoint | CheckpointHead | None:
        reader = CheckpointReader()
        memory = memoryview(mmap.mmap(-1, BLOCK_BYTES if only_head else _READ_BYTES))
        try:
            nbytes = await self.device.open(name) // UNIT_BYTES * UNIT_BYTES
            for at in range(0, nbytes, memory.nbytes):
                part = memory[: min(memory.nbytes, nbytes - at)]
                await self.device.read(name, at, part)
                for block in _blocks(part):
                    reader.feed(block)
                    if only_head:
                        return reader.head
                    if reader.is_done:
                        return reader.checkpoint()
            raise PageCorrupt("it is cut short")
        except (OSError, PageCorrupt) as error:
            if isinstance(error, OSError) and error.errno not in DAMAGE:
                raise
            self.broken_checkpoints += 1
            self.messages.append(f"{name} is damaged and not used: {error}")
        return None


def _is_of_later_use(place: memoryview, head: SegmentHead | None) -> bool:
    """Whether a batch stands behind a head that was written before that batch's segment was opened."""
    found = peek(place)
    if found is None:
        return False
    nonce, sequence = found
    if head is None:
        return True
    # Nonces are drawn: those of two uses differ nearly everywhere, a damaged one does in a byte.
    differing = sum(a != b for a, b in zip(nonce, head.nonce, strict=True))
    return sequence >= head.sequence and 2 * differing > NONCE_BYTES


def _blocks(part: memoryview) -> Iterator[memoryview]:
    for at in range(0, part.nbytes, BLOCK_BYTES):
        yield part[at : at + BLOCK_BYTES]
