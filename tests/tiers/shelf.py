"""The engine's side of a file tier, as small as it can be: which key has which record.

Every value is made from its key and its generation, so a wrong or stale byte is seen at once.
"""

import mmap
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import anyio
import anyio.lowlevel

from respkv.tiers.file_tier import FileTier
from respkv.tiers.format import HEADER_BYTES, Header, hash64, write_header
from respkv.tiers.opening import Recovery
from respkv.tiers.record import Level, Meta, Record, Value
from respkv.tiers.sizes import round_up

# Longer than any machine stands still: what takes so long does not come at all.
GIVE_UP_S = 60.0


def payload_of(key: bytes, generation: int, nbytes: int) -> bytes:
    """Return the bytes that this put of this key has: half of them random, half of them zero."""
    half = random.Random(f"{key!r} {generation}").randbytes(nbytes - nbytes // 2)
    return half + bytes(nbytes // 2)


def page(name: int) -> bytes:
    """Return a key that names its content."""
    return b"ns:%064x" % name


def make_image(meta: Meta, payload: bytes) -> memoryview:
    """Return a payload as it stands in a slot of the arena."""
    memory = memoryview(mmap.mmap(-1, round_up(HEADER_BYTES + len(payload), 4096)))
    key_hash = hash64(meta.key)
    header = Header(0, 0, 0, key_hash, meta.generation, len(payload), meta.checksum)
    write_header(memory, header)
    memory[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
    return memory


def make_value(
    key: bytes,
    generation: int,
    nbytes: int,
    *,
    level: Level = Level.MEMORY,
    has_image: bool = False,
    owner: object = None,
    expires_ms: int = 0,
) -> Value:
    payload = payload_of(key, generation, nbytes)
    kind: Literal["kvpage", "string"] = "kvpage" if key.startswith(b"ns:") else "string"
    meta = Meta(key, kind, nbytes, hash64(payload), generation, level, expires_ms)
    image = make_image(meta, payload) if has_image else None
    body = memoryview(payload) if image is None else image[HEADER_BYTES : HEADER_BYTES + nbytes]
    return Value(meta, body, image, owner)


@dataclass(eq=False)
class Held:
    """A value that the shelf knows."""

    meta: Meta
    record: Record | None = None
    value: Value | None = None


@dataclass(eq=False)
class Shelf:
    """Keys and their records in one tier.

    keeps:   whether reclaim is to copy a record.
    gone:    what the tier dropped: (key, generation, why).
    """

    tier: FileTier
    held: dict[bytes, Held] = field(default_factory=dict[bytes, Held])
    gone: list[tuple[bytes, int, str]] = field(default_factory=list[tuple[bytes, int, str]])
    left: list[Record] = field(default_factory=list[Record])
    keeps: Callable[[Record], bool] = lambda record: False
    generation: int = 0

    def __post_init__(self) -> None:
        self.tier.describe = lambda record: record.owner.meta
        self.tier.keep = lambda record: self.keeps(record)
        self.tier.leave = self.leave
        self.tier.dropped = self.dropped
        self.tier.generation = lambda: self.generation + 1

    async def leave(self, records: list[Record]) -> None:
        self.left += records
        await anyio.lowlevel.checkpoint()

    def dropped(self, record: Record, why: str) -> None:
        held: Held = record.owner
        self.gone.append((held.meta.key, held.meta.generation, why))
        if held.record is record:
            held.record = None
        if self.held.get(held.meta.key) is held:
            del self.held[held.meta.key]

    def found(self, meta: Meta, record: Record) -> bool:
        self.generation = max(self.generation, meta.generation)
        record.owner = self.held[meta.key] = Held(meta, record)
        return True

    def next_generation(self) -> int:
        self.generation += 1
        return self.generation

    async def put(
        self,
        key: bytes,
        nbytes: int = 1000,
        *,
        level: Level = Level.MEMORY,
        has_image: bool = False,
    ) -> Record | None:
        """Put a value and write it; return its record."""
        (record,) = await self.put_many([key], nbytes, level=level, has_image=has_image)
        return record

    async def put_many(
        self,
        keys: list[bytes],
        nbytes: int = 1000,
        *,
        level: Level = Level.MEMORY,
        has_image: bool = False,
    ) -> list[Record | None]:
        values: list[Value] = []
        for key in keys:
            value = make_value(
                key, self.next_generation(), nbytes, level=level, has_image=has_image
            )
            held = Held(value.meta)
            values.append(value._replace(owner=held))
        records = await self.tier.write(values, level)
        for value, record in zip(values, records, strict=True):
            if record is not None:
                old = self.held.get(value.meta.key)
                if old is not None and old.record is not None:
                    self.tier.free(old.record)
                value.owner.record = record
                self.held[value.meta.key] = value.owner
                if record.is_gone:
                    self.dropped(record, "evicted")
        return records

    async def get(self, key: bytes, *, has_image: bool = False) -> bytes | None:
        """Read a value and check it against what was put; None when it is not there."""
        held = self.held.get(key)
        if held is None or held.record is None:
            return None
        nbytes = held.meta.payload_bytes
        memory = memoryview(mmap.mmap(-1, round_up(HEADER_BYTES + nbytes, 4096)))
        into = memory[HEADER_BYTES : HEADER_BYTES + nbytes]
        await self.tier.read(held.record, key, into, memory if has_image else None)
        assert into == payload_of(key, held.meta.generation, nbytes)
        return bytes(into)

    async def check(self, *, has_image: bool = False) -> None:
        """Read everything, and let the books be checked."""
        for key in list(self.held):
            is_there = await self.get(key, has_image=has_image) is not None
            assert is_there or key not in self.held
        check_books(self.tier)


def check_books(tier: FileTier) -> None:
    """Assert that the accounts of the tier add up."""
    assert tier._parts is not None
    log = tier._parts.log
    records = list(log.records())
    log.table.check(records)
    assert len(records) == log.table.live_records
    assert log.young == {}


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so; a test that waits for ever is ended by the clock."""
    with anyio.fail_after(GIVE_UP_S):
        while True:
            if is_so():
                return
            await anyio.sleep(0.01)


@asynccontextmanager
async def running(
    tier: FileTier, *, is_clean: bool = True
) -> AsyncIterator[tuple[Shelf, Recovery]]:
    """Start a tier and run it; stop it at the end, or leave it as a crash would."""
    shelf = Shelf(tier)
    recovery = await tier.start(shelf.found)
    async with anyio.create_task_group() as group:
        group.start_soon(tier.run)
        yield shelf, recovery
        if is_clean:
            await tier.stop()
        group.cancel_scope.cancel()
    if not is_clean:
        await tier.device.close()
