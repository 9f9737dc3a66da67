"""A file tier on a device that fails at random: it never hands out a wrong byte, and gets well again.

Seeded histories in virtual time. A model of the engine puts, overwrites, buries and reads values while
faults come and go; the seed of a history that fails is its test's name.
"""

import errno
import random
from collections import Counter
from dataclasses import dataclass

import anyio
import pytest

from respkv.errors import PageCorrupt, TierError
from respkv.kernels.lossless import decode, encode
from respkv.tiers.file_tier import FileTier
from respkv.tiers.format import hash64
from respkv.tiers.parts import TierConfig
from respkv.tiers.record import Level, Meta, Record, Value
from tests.simulation import virtual
from tests.tiers.faulty_device import Call, FaultyDevice, Kind
from tests.tiers.memory_device import MemoryDevice

CAPACITY_BYTES = 12 << 20
KEYS = 40
SIZES = [10, 500, 3000, 4096, 9000, 40_000, 120_000]
ROUNDS = 6
WORKERS = 4
ACTIONS = 25
BACK_S_MAX = 5.0
HANG_S_MAX = 120.0  # virtual: nothing may wait for longer once the device is well


@dataclass(eq=False)
class Entry:
    """What the engine knows of a key."""

    meta: Meta
    record: Record | None = None


def payload_of(generation: int) -> bytes:
    rng = random.Random(generation)
    size = rng.choice(SIZES)
    if generation % 2:
        return rng.randbytes(size)
    return (b"%d, " % generation * size)[:size]


class Codec:
    """The disk tier's, without its threads, which would take real time."""

    async def encode(self, meta: Meta, payload: memoryview) -> tuple[int, memoryview]:
        codec, stored = encode(payload, element_bytes=1, codec="lz4")
        return codec, memoryview(stored)

    async def decode(self, codec: int, stored: memoryview, into: memoryview) -> bool:
        decode(codec, stored, into)
        return True


class Engine:
    """Puts and reads through one tier, and knows what it may find."""

    def __init__(self, tier: FileTier, rng: random.Random) -> None:
        self.tier = tier
        self.rng = rng
        self.entries: dict[bytes, Entry] = {}
        self.counts: Counter[str] = Counter()
        self.last_generation = 0
        tier.describe = lambda record: self.owner(record).meta
        tier.keep = lambda record: self.owner(record).record is record
        tier.leave = self.leave
        tier.dropped = self.dropped
        tier.generation = lambda: self.last_generation + 1

    def owner(self, record: Record) -> Entry:
        entry = record.owner
        assert isinstance(entry, Entry)
        return entry

    async def leave(self, records: list[Record]) -> None:
        for record in records:
            await self.read(self.owner(record), record)

    def dropped(self, record: Record, why: str) -> None:
        entry = self.owner(record)
        assert entry.record is record
        entry.record = None
        self.counts[why] += 1

    def found(self, meta: Meta, record: Record) -> bool:
        """Take a value that recovery offers."""
        entry = self.entries.get(meta.key)
        if entry is None or entry.meta.generation != meta.generation or entry.record is not None:
            self.counts["offered, not wanted"] += 1
            return False
        record.owner, entry.record = entry, record
        self.counts["recovered"] += 1
        return True

    async def put(self, key: bytes) -> None:
        self.last_generation += 1
        level = self.rng.choice([Level.MEMORY, Level.WRITTEN, Level.DURABLE])
        body = payload_of(self.last_generation)
        meta = Meta(key, "string", len(body), hash64(body), self.last_generation, level)
        ticket = self.forget(key)
        entry = self.entries[key] = Entry(meta)
        if ticket:
            await self.settle(ticket, level)
        (record,) = await self.tier.write([Value(meta, memoryview(body), None, entry)], level)
        self.counts["written" if record else "not written"] += 1
        if record is None or record.is_gone:
            return
        assert (record.generation, record.checksum) == (meta.generation, meta.checksum)
        if self.entries.get(key) is entry:
            entry.record = record
        else:
            self.tier.free(record)

    def forget(self, key: bytes) -> int:
        """Forget a key; return the ticket of the note that says so."""
        entry = self.entries.pop(key, None)
        if entry is None:
            return 0
        if entry.record is not None:
            self.tier.free(entry.record)
            entry.record = None
        return self.tier.bury(key, entry.meta.generation)

    async def settle(self, ticket: int, level: Level) -> None:
        try:
            await self.tier.settle(ticket, level)
        except TierError:
            self.counts["not settled"] += 1

    async def read(self, entry: Entry, record: Record) -> None:
        into = memoryview(bytearray(entry.meta.payload_bytes))
        try:
            await self.tier.read(record, entry.meta.key, into, None)
        except (PageCorrupt, TierError) as error:
            self.counts[type(error).__name__] += 1
            return
        assert into == payload_of(entry.meta.generation), entry.meta
        self.counts["read"] += 1

    async def work(self) -> None:
        """Do a few things, one after another, as one client would."""
        for _ in range(ACTIONS):
            key = b"key:%d" % self.rng.randrange(KEYS)
            chance = self.rng.random()
            entry = self.entries.get(key)
            if chance < 0.4:
                await self.put(key)
            elif chance < 0.85 and entry is not None and entry.record is not None:
                await self.read(entry, entry.record)
            elif chance < 0.9 and (ticket := self.forget(key)):
                await self.settle(ticket, self.rng.choice(list(Level)))
            else:
                await anyio.sleep(self.rng.random() * 0.1)


BROKEN: list[tuple[Call, ...]] = [
    ("write",),
    ("read",),
    ("sync",),
    ("create", "replace"),
    ("remove",),
    ("names", "open"),
]
HUNG: list[Call] = ["read", "write", "sync", "create"]
LIES: list[Kind] = ["torn", "dropped", "misdirected", "flip"]


def break_it(faulty: FaultyDevice, rng: random.Random, *, may_lie: bool) -> None:
    """Let something go wrong from now on."""
    code = rng.choice([errno.EIO, errno.ENOSPC, errno.EROFS])
    match rng.choice(["error", "short", "slow", "hang", "gone", *(["lie"] * 3 if may_lie else [])]):
        case "error":
            fault = faulty.add("error", *rng.choice(BROKEN), code=code)
        case "short":
            fault = faulty.add("short", "read", "write", code=code)
        case "slow":
            fault = faulty.add("slow", "read", "write", "sync", "create", delay_s=0.3)
        case "hang":
            fault = faulty.add("hang", rng.choice(HUNG))
        case "gone":
            faulty.vanish()
            return
        case _:
            moves: list[Call] = ["read", "write"]
            fault = faulty.add(rng.choice(LIES), rng.choice(moves))
    fault.one_in, fault.skip = rng.choice([1, 2, 10]), rng.randrange(5)


async def history(seed: int, alignment: int, *, may_lie: bool) -> Counter[str]:
    rng = random.Random(f"{seed} {alignment} {may_lie}")
    inner = MemoryDevice(alignment=4096 if alignment == 4096 else 1)
    faulty = FaultyDevice(inner, rng.randrange)

    async def connect() -> FaultyDevice:
        inner.is_closed = False
        return faulty

    def make() -> FileTier:
        config = TierConfig(
            *("trial", "t", 4096 if alignment == 4096 else 64, CAPACITY_BYTES),
            checkpoint_interval_s=2.0,
        )
        tier = FileTier(config, connect, clock=anyio.current_time)
        if alignment != 4096:
            tier.codec = Codec()
        return tier

    engine = Engine(make(), rng)
    for _ in range(2):
        await engine.tier.start(engine.found)
        async with anyio.create_task_group() as running:
            running.start_soon(engine.tier.run)
            for _ in range(ROUNDS):
                await one_round(engine, faulty, rng, may_lie=may_lie)
            await engine.tier.stop()
            running.cancel_scope.cancel()
        assert inner.peak_bytes <= CAPACITY_BYTES
        engine.counts["corrupt when healthy"] += engine.tier.stats.corrupt if not may_lie else 0
        after = Engine(make(), rng)
        after.entries, after.counts = engine.entries, engine.counts
        after.last_generation = engine.last_generation
        for entry in after.entries.values():
            entry.record = None
        engine = after
    return engine.counts


async def one_round(
    engine: Engine, faulty: FaultyDevice, rng: random.Random, *, may_lie: bool
) -> None:
    """Work while things go wrong; then the device gets well, and so must all that waits for it."""
    for _ in range(rng.randrange(3)):
        break_it(faulty, rng, may_lie=may_lie)
    async with anyio.create_task_group() as workers:
        for _ in range(WORKERS):
            workers.start_soon(engine.work)
        await anyio.sleep(rng.random() * 3)
        faulty.heal()
        faulty.come_back(is_empty=rng.random() < 0.5)
        with anyio.fail_after(BACK_S_MAX):
            while engine.tier.health.state != "ok":  # noqa: ASYNC110
                await anyio.sleep(0.1)
        workers.cancel_scope.deadline = anyio.current_time() + HANG_S_MAX
    assert not workers.cancel_scope.cancelled_caught, "somebody waits for ever"


def run(seed: int, backend: str, alignment: int, *, may_lie: bool) -> Counter[str]:
    """Live through one history in virtual time."""

    async def main(jump: virtual.Jump) -> Counter[str]:
        return await history(seed, alignment, may_lie=may_lie)

    counts: Counter[str] = virtual.run(main, backend=backend, seed=seed)
    return counts


@pytest.mark.parametrize("alignment", [4096, 64])
@pytest.mark.parametrize("may_lie", [False, True], ids=["honest", "lying"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_wrong_comes_out_and_the_tier_gets_well(
    seed: int, backend: str, alignment: int, may_lie: bool
) -> None:
    counts = run(seed, backend, alignment, may_lie=may_lie)
    assert counts["read"] > 50, counts
    assert counts["written"] > 50, counts
    assert not counts["corrupt when healthy"], counts
