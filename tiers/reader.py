"""Reading a record back, and believing nothing that is not proven.

A large raw payload goes from the device straight to where it is wanted; everything else passes
through staging memory. Either way the header has to name this key and this put, and the checksums
of what is stored and of what comes out have to be right, before the reader is told that it has it.
What a lossy codec gives back has a checksum of its own, which the reader is told.
"""

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeVar, TypeVarTuple

import anyio

from respkv.errors import CacheError, PageCorrupt, TierError
from respkv.tiers.estimate import Estimate
from respkv.tiers.format import HEADER_BYTES, Header, hash64, read_header, write_header
from respkv.tiers.health import why
from respkv.tiers.log import Log
from respkv.tiers.record import Record
from respkv.tiers.segment_head import segment_name
from respkv.tiers.sizes import round_up
from respkv.tiers.staging import Staging
from respkv.tiers.writer import Codec

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LOOP_BYTES_MAX = 1 << 20  # more than that is hashed or copied in a thread
RAW = 0
# Errors that say nothing about what is stored.
_PASSING = frozenset(
    {errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.EBADF, errno.ETIMEDOUT, errno.ECANCELED}
)

logger = logging.getLogger(__name__)


class Spot(NamedTuple):
    """A place in a segment; the record that was there may be moved meanwhile."""

    segment: int
    offset: int


class Reader:
    """Read the records of one log."""

    def __init__(self, log: Log, staging: Staging, codec: Codec | None, estimate: Estimate) -> None:
        self._log = log
        self._staging = staging
        self._codec = codec
        self._estimate = estimate

    async def read(
        self, record: Record, key: bytes, into: memoryview, image: memoryview | None
    ) -> int:
        """Do what FileTier.read says."""
        assert into.nbytes == record.payload_bytes
        return await self._take(
            record, key, lambda spot: self._read(record, spot, key, into, image)
        )

    async def read_stored(self, record: Record, key: bytes) -> bytes:
        """Return the stored payload, which its header proves."""
        return await self._take(record, key, lambda spot: self._read_stored(record, spot, key))

    async def _take(self, record: Record, key: bytes, read: Callable[[Spot], Awaitable[T]]) -> T:
        """Read a record, wherever it is by then, and count that."""
        log = self._log
        while (found := await self._try(record, key, read)) is None:
            pass
        log.health.read_succeeded()
        record.touches += 1
        log.stats.reads += 1
        log.stats.read_bytes += record.payload_bytes
        return found

    async def _try(
        self, record: Record, key: bytes, read: Callable[[Spot], Awaitable[T]]
    ) -> T | None:
        """Read from where the record is now. None: that failed, but it has been copied meanwhile.

        The place cannot be used for anything else while it is pinned.
        """
        log = self._log
        if not log.health.can_read:
            raise TierError(f"tier {log.name} is off: {log.health.reason}")
        if not log.is_live(record):
            raise TierError(f"tier {log.name} has this copy no more")
        place = Spot(record.segment, record.offset)
        log.table.pin(place.segment)
        try:
            return await read(place)
        except (PageCorrupt, OSError) as error:
            if place != (record.segment, record.offset):
                return None
            raise self._drop(record, key, error) from error
        finally:
            log.table.unpin(place.segment)

    async def _read(
        self, record: Record, spot: Spot, key: bytes, into: memoryview, image: memoryview | None
    ) -> int:
        alignment = self._log.device.alignment
        nbytes = round_up(record.stored_bytes, alignment)
        is_direct = record.codec == RAW and not spot.offset % alignment
        if is_direct and image is not None and image.nbytes >= nbytes:
            await self._fetch(spot, image[:nbytes])
            await check_stored(record, key, image[: record.stored_bytes])
            return record.checksum
        async with self._fetched(record, spot, key) as stored:
            checksum = await self._unpack(record, stored, into)
        if image is not None:
            write_header(image, _header(record, key, checksum))
        return checksum

    async def _read_stored(self, record: Record, spot: Spot, key: bytes) -> bytes:
        async with self._fetched(record, spot, key) as stored:
            return await _on_loop_or_thread(stored.nbytes, bytes, stored)

    @asynccontextmanager
    async def _fetched(self, record: Record, spot: Spot, key: bytes) -> AsyncIterator[memoryview]:
        """Hold the stored payload of a record in memory, proven, while the block runs."""
        alignment = self._log.device.alignment
        start = spot.offset // alignment * alignment
        nbytes = round_up(spot.offset + record.stored_bytes, alignment) - start
        memory = await self._staging.take(nbytes)
        try:
            await self._fetch(Spot(spot.segment, start), memory[:nbytes])
            stored = memory[spot.offset - start :][: record.stored_bytes]
            await check_stored(record, key, stored)
            yield stored[HEADER_BYTES:]
        finally:
            self._staging.give_back(memory)

    async def _fetch(self, spot: Spot, into: memoryview) -> None:
        log = self._log
        started = log.clock()
        with anyio.CancelScope(shield=True):
            await log.device.read(segment_name(spot.segment), spot.offset, into)
        self._estimate.observe(into.nbytes, log.clock() - started)

    async def _unpack(self, record: Record, stored: memoryview, into: memoryview) -> int:
        """Decode a payload; return the checksum of what came out."""
        if record.codec == RAW:
            await _on_loop_or_thread(record.payload_bytes, _copy, stored, into)
            return record.checksum
        if self._codec is None:
            raise PageCorrupt(f"this tier knows no codec {record.codec}")
        is_lossless = await self._codec.decode(record.codec, stored, into)
        checksum = await hash_of(into)
        if is_lossless and checksum != record.checksum:
            raise PageCorrupt("what was decoded has another checksum than what was put")
        return checksum

    def _drop(self, record: Record, key: bytes, error: PageCorrupt | OSError) -> CacheError:
        """Drop a copy that cannot be had, and return what its reader is told."""
        log = self._log
        if isinstance(error, PageCorrupt):
            logger.error("tier %s: a copy of %r is dropped: %s", log.name, key[:80], error)
            log.drop(record, "corrupt")
            return PageCorrupt(str(error))
        log.stats.read_errors += 1
        if error.errno not in _PASSING:
            logger.error("tier %s: a copy of %r is lost: %s", log.name, key[:80], why(error))
            log.health.read_failed(error)
            log.drop(record, "lost")
        return TierError(f"tier {log.name} could not read: {why(error)}")


async def check_stored(record: Record, key: bytes, stored: memoryview) -> None:
    """Check a header and the stored payload behind it against the record. Raises PageCorrupt."""
    header = read_header(stored)
    payload = stored[HEADER_BYTES:]
    there = (header.codec, header.key_hash, header.generation, header.payload_bytes)
    if there != (record.codec, hash64(key), record.generation, payload.nbytes):
        raise PageCorrupt("its place holds another value")
    if record.codec == RAW and header.checksum != record.checksum:
        raise PageCorrupt("its place holds other bytes than were put")
    if await hash_of(payload) != header.checksum:
        raise PageCorrupt("its bytes were changed")


async def hash_of(payload: memoryview) -> int:
    """Return the checksum of a payload; a large one is hashed in a thread."""
    return await _on_loop_or_thread(payload.nbytes, hash64, payload)


async def _on_loop_or_thread(nbytes: int, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
    if nbytes <= LOOP_BYTES_MAX:
        return work(*arguments)
    return await anyio.to_thread.run_sync(work, *arguments)


def _copy(stored: memoryview, into: memoryview) -> None:
    into.cast("B")[:] = stored


def _header(record: Record, key: bytes, checksum: int) -> Header:
    return Header(RAW, 0, 0, hash64(key), record.generation, record.payload_bytes, checksum)
