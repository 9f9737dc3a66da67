"""A file tier without files: what the engine asks for is kept in a dict, and a test decides when.

It is strict where a real one is lenient: memory is looked at only while a call lasts, records are
known by identity, and what was freed may not be read again.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import anyio
import anyio.lowlevel

from respkv.errors import PageCorrupt, TierError
from respkv.tiers.format import HEADER_BYTES, Header, check_page, hash64, write_header
from respkv.tiers.meta import is_content_addressed
from respkv.tiers.record import NOWHERE, Level, Meta, Record, Value

LOSSY = 21  # a codec's id


@dataclass(slots=True)
class FakeHealth:
    state: Literal["ok", "read-only", "off"] = "ok"
    reason: str = ""


@dataclass(slots=True)
class FakeStats:
    live_bytes: int = 0
    too_large: int = 0
    stale: int = 0


@dataclass(slots=True)
class Logged:
    """A value as the log has it."""

    meta: Meta
    data: bytes


@dataclass(slots=True)
class FakeLog:
    """What survives: values in the order in which they were written, and burials by key."""

    values: list[Logged] = field(default_factory=list)
    buried: dict[bytes, int] = field(default_factory=dict)
    clean: list[Logged] | None = None  # the final checkpoint, after a clean stop
    next_generation: int = 1


def coarse(data: bytes) -> bytes:
    """Return what a lossy codec makes of a value; once more changes nothing."""
    return bytes(byte & 0xF0 for byte in data)


class FakeTier:
    """A tier with ``log`` as its files. ``gate``: I/O waits while it is not None.

    is_lossy: what is written from now on is read back ``coarse``.
    """

    def __init__(
        self, log: FakeLog | None = None, *, name: str = "nvme", capacity_bytes: int = 1 << 40
    ) -> None:
        self.name = name
        self.letter = name[0]
        self.log = FakeLog() if log is None else log
        self.health = FakeHealth()
        self.stats = FakeStats(capacity_bytes)  # full: it is asked what to keep
        self.payload_bytes_max = 1 << 30
        self.capacity_bytes = capacity_bytes
        self.describe: Callable[[Record], Meta]
        self.keep: Callable[[Record], bool]
        self.leave: Callable[[list[Record]], Awaitable[None]]
        self.release: Callable[[Record], bool]
        self.dropped: Callable[[Record, str], None]
        self.generation: Callable[[], int]
        self.records: dict[Record, Logged] = {}
        self.gate: anyio.Event | None = None
        self.is_lossy = False
        self.crash: Exception | None = None
        self.read_error: TierError | None = None
        self.write_error: TierError | None = None
        self.refuses = False  # writes answer None
        self.evicts = False  # what is written is evicted before its asker has it
        self.writes: list[list[bytes]] = []
        self.levels: list[Level] = []
        self.reads: list[bytes] = []
        self.settled: list[tuple[int, Level]] = []
        self.num_resets = 0
        self._ticket = 0
        self._failed: dict[int, str] = {}
        self._wake = anyio.Event()
        self._is_running = False

    # -- life ---------------------------------------------------------------------------------

    @property
    def next_generation(self) -> int:
        return self.log.next_generation

    async def start(self, found: Callable[[Meta, Record], bool]) -> None:
        await anyio.lowlevel.checkpoint()
        log = self.log
        was_clean, log.clean = log.clean is not None, None
        newest: dict[bytes, Logged] = {}
        for each in log.values:
            if each.meta.generation > log.buried.get(each.meta.key, -1):
                known = newest.get(each.meta.key)
                if known is None or known.meta.generation < each.meta.generation:
                    newest[each.meta.key] = each
        for each in newest.values():
            meta = each.meta
            if not was_clean and not meta.level and not is_content_addressed(meta.key, meta.kind):
                continue
            record = self._record(each, None)
            if found(meta, record):
                self.records[record] = each

    async def run(self) -> None:
        self._is_running = True
        while self._is_running:
            await self._wake.wait()
            self._wake = anyio.Event()
            if self.crash is not None:
                crash, self.crash = self.crash, None
                raise crash

    def crash_with(self, error: Exception) -> None:
        self.crash = error
        self._wake.set()

    async def stop(self, seconds: float = 10.0) -> None:
        await anyio.lowlevel.checkpoint()
        self._is_running = False
        self._wake.set()
        if self.gate is not None:
            self.open_gate()
        kept = [Logged(self.describe(record), each.data) for record, each in self.records.items()]
        self.log.values, self.log.clean = kept, kept
        self.log.buried.clear()
        self.log.next_generation = self.generation()

    async def reset(self) -> None:
        self.num_resets += 1
        for record in list(self.records):
            self.drop(record, "lost")
        self.log.values.clear()
        self.log.buried.clear()

    async def clear(self) -> None:
        self.records.clear()
        await self._io()
        self.log.values.clear()
        self.log.buried.clear()

    # -- values -------------------------------------------------------------------------------

    async def write(self, values: Sequence[Value], level: Level) -> list[Record | None]:
        self.writes.append([value.meta.key for value in values])
        self.levels.append(level)
        before = [bytes(value.payload) for value in values]
        await self._io()
        if self.write_error is not None:
            raise self.write_error
        answers: list[Record | None] = []
        for value, data in zip(values, before, strict=True):
            assert bytes(value.payload) == data, "the value changed while it was written"
            if self.refuses or self.health.state != "ok":
                answers.append(None)
                continue
            meta = value.meta
            assert hash64(data) == meta.checksum
            assert len(data) == meta.payload_bytes
            if value.image is not None:
                found = check_page(
                    value.image, value.payload, key=meta.key, generation=meta.generation
                )
                assert found.checksum == meta.checksum
            logged = Logged(meta._replace(level=level), data)
            self.log.values.append(logged)
            self.log.next_generation = max(self.log.next_generation, meta.generation + 1)
            record = self._record(logged, value.owner)
            if self.evicts:
                self._bury(meta.key, meta.generation)
                record.segment = NOWHERE
            else:
                self.records[record] = logged
            answers.append(record)
        return answers

    async def read(
        self, record: Record, key: bytes, into: memoryview, image: memoryview | None
    ) -> int:
        into[:] = b"?" * len(into)
        codec, data = await self.read_stored(record, key)
        into[:] = data if codec == 0 else coarse(data)
        checksum = hash64(into)
        if image is not None:
            header = Header(0, 0, 0, hash64(key), record.generation, len(into), checksum)
            write_header(image[:HEADER_BYTES], header)
            assert image[HEADER_BYTES : HEADER_BYTES + len(into)] == into
        return checksum

    async def read_stored(self, record: Record, key: bytes) -> tuple[int, bytes]:
        self.reads.append(key)
        await self._io()
        if self.read_error is not None:
            raise self.read_error
        logged = self.records.get(record)
        if logged is None:
            raise TierError(f"{self.name}: the record is gone")
        assert logged.meta.key == key
        if hash64(logged.data) != record.checksum:
            self.drop(record, "corrupt")
            raise PageCorrupt(f"{self.name}: {key!r}")
        return record.codec, logged.data

    def free(self, record: Record) -> None:
        self.records.pop(record, None)

    def bury(self, key: bytes, generation: int) -> int:
        return self._note(lambda: self._bury(key, generation))

    def change(self, meta: Meta) -> int:
        def apply() -> None:
            for each in self.log.values:
                if each.meta.generation == meta.generation:
                    each.meta = meta

        return self._note(apply)

    async def settle(self, ticket: int, level: Level) -> None:
        await self._io()
        self.settled.append((ticket, level))
        if ticket in self._failed:
            raise TierError(self._failed[ticket])

    def load_us(self, nbytes: int) -> int:
        return 100 + nbytes // 1000

    # -- for tests ----------------------------------------------------------------------------

    def drop(self, record: Record, why: str) -> None:
        """Lose a copy, as reclaim or a fault does."""
        del self.records[record]
        self.dropped(record, why)

    def check(self) -> None:
        """Assert that every record is one that its owner knows."""
        for record in self.records:
            assert record in record.owner.records

    def flip(self, key: bytes) -> None:
        """Change a bit of a value in the log."""
        for each in self.log.values:
            if each.meta.key == key:
                each.data = bytes([each.data[0] ^ 1]) + each.data[1:]

    def close_gate(self) -> None:
        """Let I/O wait until ``open_gate``."""
        self.gate = anyio.Event()

    def open_gate(self) -> None:
        """Let I/O go on."""
        assert self.gate is not None
        self.gate.set()
        self.gate = None

    # -- inside -------------------------------------------------------------------------------

    async def _io(self) -> None:
        await anyio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()

    def _note(self, apply: Callable[[], None]) -> int:
        self._ticket += 1
        if self.health.state != "ok":
            self._failed[self._ticket] = f"{self.name} is {self.health.state}"
        else:
            apply()
        return self._ticket

    def _bury(self, key: bytes, generation: int) -> None:
        self.log.buried[key] = max(generation, self.log.buried.get(key, -1))

    def _record(self, logged: Logged, owner: object) -> Record:
        meta = logged.meta
        return Record(
            segment=0,
            offset=0,
            stored_bytes=meta.payload_bytes + HEADER_BYTES,
            payload_bytes=meta.payload_bytes,
            codec=LOSSY if self.is_lossy else 0,
            generation=meta.generation,
            checksum=meta.checksum,
            sequence=0,
            level=meta.level,
            owner=owner,
        )
