"""Reading the batches of one segment after a crash, over whatever is damaged in between.

Every value of a batch that counts is read and checked whole: nothing found here was ever read back
since it was written. Memory is one window, whatever the sizes of segments and values.
"""

import mmap
from dataclasses import dataclass, field

from respkv.errors import PageCorrupt
from respkv.tiers.batch import (
    HEAD_BYTES_MAX,
    HEAD_PREFIX_BYTES,
    MAGIC,
    TWIN_MAGIC,
    Head,
    ValueItem,
)
from respkv.tiers.batch_reader import check_image, decode_head, head_used_bytes
from respkv.tiers.device import Device
from respkv.tiers.format import HEADER_BYTES, Checksum
from respkv.tiers.segment_head import SEGMENT_HEAD_BYTES, SegmentHead, segment_name

UNIT_BYTES = 4096
WINDOW_BYTES = 2 * HEAD_BYTES_MAX
CHUNK_BYTES = 1 << 20  # hashed at a time
# How far the next batch is looked for behind one that cannot be read. A larger one that is damaged
# costs the rest of its segment; behind the end of the log, this much is read for nothing.
RESYNC_BYTES_MAX = 64 << 20


@dataclass(slots=True)
class ScannedBatch:
    """A batch that was found.

    damaged:    indices of its values that are not whole.
    after_hole: between it and the one before it there was something that could not be read.
    """

    head: Head
    damaged: set[int]
    after_hole: bool


@dataclass(slots=True)
class Scan:
    """What was found in a segment.

    end:     where its last batch ends.
    is_torn: behind that stands the start of another one.
    """

    segment: SegmentHead
    batches: list[ScannedBatch] = field(default_factory=list["ScannedBatch"])
    end: int = SEGMENT_HEAD_BYTES
    is_torn: bool = False


async def scan_segment(
    device: Device,
    segment: SegmentHead,
    *,
    start: int,
    file_bytes: int,
    after: int,
    alignment: int,
) -> Scan:
    """Read the batches of an open segment from ``start`` on, where one starts if there is one.

    after: batches up to this sequence are passed over. Raises OSError.
    """
    window = _Window(device, segment_name(segment.id), file_bytes // UNIT_BYTES * UNIT_BYTES)
    scan = Scan(segment, end=start)
    while scan.end + alignment <= window.stop:
        head = await _read_head(window, scan.end, segment.nonce)
        if head is None:
            head = await _find_head(window, scan.end, segment.nonce, alignment)
        if head is None:
            begin = await window.view(scan.end, 16)
            scan.is_torn = begin == MAGIC + segment.nonce
            break
        after_hole = head.offset > scan.end
        scan.end = head.offset + head.total_bytes
        if head.sequence > after:
            damaged = await _check_values(window, head)
            scan.batches.append(ScannedBatch(head, damaged, after_hole))
    return scan


class _Window:
    """A part of a file in memory that moves along as it is read."""

    def __init__(self, device: Device, name: str, stop: int) -> None:
        self.device = device
        self.name = name
        self.stop = stop
        self._map = mmap.mmap(-1, WINDOW_BYTES)  # O_DIRECT asks for memory at whole pages
        self._view = memoryview(self._map)
        self._from = self._to = 0

    async def view(self, offset: int, nbytes: int) -> memoryview:
        """Return what is at ``offset``, less than ``nbytes`` only where the file ends.

        It is overwritten by the next call.
        """
        assert nbytes <= WINDOW_BYTES - UNIT_BYTES
        stop = min(offset + nbytes, self.stop)
        if offset < self._from or stop > self._to:
            start = offset // UNIT_BYTES * UNIT_BYTES
            self._from = self._to = start
            to = min(start + WINDOW_BYTES, self.stop)
            if to > start:
                await self.device.read(self.name, start, self._view[: to - start])
            self._to = max(to, start)
        return self._view[offset - self._from : max(stop, offset) - self._from]

    async def find(self, needles: tuple[bytes, ...], offset: int, stop: int) -> int | None:
        """Return the first place of any of the needles from ``offset`` on, before ``stop``."""
        stop = min(stop, self.stop)
        while offset < stop:
            await self.view(offset, min(HEAD_BYTES_MAX, stop - offset))
            begin, end = offset - self._from, min(stop, self._to) - self._from
            places = [self._map.find(needle, begin, end) for needle in needles]
            found = min((place for place in places if place >= 0), default=None)
            if found is not None:
                return self._from + found
            # Needles start at multiples of 64, so none lies across the end of a window.
            offset = self._to
        return None


async def _read_head(window: _Window, at: int, nonce: bytes) -> Head | None:
    prefix = await window.view(at, HEAD_PREFIX_BYTES)
    used_bytes = head_used_bytes(prefix, nonce)
    if not used_bytes or prefix[:8] != MAGIC:
        return None
    try:
        head = decode_head(await window.view(at, used_bytes), offset=at, nonce=nonce)
    except PageCorrupt:
        return None
    return head if at + head.total_bytes <= window.stop else None


async def _read_twin(window: _Window, at: int, nonce: bytes) -> Head | None:
    used_bytes = head_used_bytes(await window.view(at, HEAD_PREFIX_BYTES), nonce)
    if not used_bytes:
        return None
    try:
        head = decode_head(await window.view(at, used_bytes), offset=None, nonce=nonce)
    except PageCorrupt:
        return None
    is_here = head.offset + head.head_bytes // 2 == at
    return head if is_here and head.offset + head.total_bytes <= window.stop else None


async def _find_head(window: _Window, start: int, nonce: bytes, alignment: int) -> Head | None:
    """Find the first batch from ``start`` on, by its head or by the twin of its head."""
    at, stop = start, start + RESYNC_BYTES_MAX
    while (found := await window.find((MAGIC + nonce, TWIN_MAGIC + nonce), at, stop)) is not None:
        at = found + 1
        head = None
        if found % alignment == 0:
            head = await _read_head(window, found, nonce)
        if head is None and found % 64 == 0:
            head = await _read_twin(window, found, nonce)
        if head is not None and head.offset >= start:
            return head
    return None


async def _check_values(window: _Window, head: Head) -> set[int]:
    damaged: set[int] = set()
    for index, item in enumerate(head.items):
        if isinstance(item, ValueItem) and not await _is_whole(window, head, item):
            damaged.add(index)
    return damaged


async def _is_whole(window: _Window, head: Head, item: ValueItem) -> bool:
    is_inside = head.head_bytes <= item.offset and (
        item.offset + item.stored_bytes <= head.total_bytes
    )
    if not is_inside or item.stored_bytes < HEADER_BYTES:
        return False
    at = head.offset + item.offset
    end = at + item.stored_bytes
    try:
        header = check_image(await window.view(at, HEADER_BYTES), item)
    except PageCorrupt:
        return False
    checksum = Checksum()
    at += HEADER_BYTES
    while at < end:
        chunk = await window.view(at, min(CHUNK_BYTES, end - at))
        checksum.update(chunk)
        at += chunk.nbytes
    return checksum.digest() == header.checksum
