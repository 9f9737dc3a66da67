"""One history of an engine with file tiers: lives that end cleanly, by a kill or by a power cut.

Real are the cache, the mover, the actors and the file tiers; simulated are time, the devices, their
faults, and clients. Every command changes the cache in one turn, so what each key was told is one
list, in order. While a life lasts a read sees the last value of that list or nothing. After a crash,
which may come in the middle of commands, it may see what any command left that was not certainly
over: the last one that was acknowledged, or one after it; with the TTL that this one left. What was
to survive, and was still known when the machine stopped, is there.
"""

import errno
import mmap
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import anyio
import anyio.lowlevel

from respkv.engine.cache import Cache
from respkv.engine.entry import PLAIN, Entry, Put
from respkv.engine.files import open_files
from respkv.engine.mover import Mover
from respkv.engine.placement import MoveSettings
from respkv.errors import CommandError, OutOfMemory, TierError
from respkv.tiers.device import Device
from respkv.tiers.file_tier import FileTier
from respkv.tiers.format import check_page
from respkv.tiers.parts import TierConfig
from respkv.tiers.record import Level, Record
from respkv.tiers.slab import SlabAllocator
from tests.fakes import ManualClock
from tests.simulation.values import Value, value_of_page, value_of_write
from tests.simulation.virtual import Jump, run
from tests.tiers.faulty_device import FaultyDevice
from tests.tiers.memory_device import Files, Kind, MemoryDevice

ARENA_BYTES = 512 << 10
SEGMENT_BYTES = 160 << 10
CLIENTS = 4
LIVES = 4
LIFE_S_MAX = 300.0
STEPS = 120  # of each client in a life
End = Literal["clean", "kill", "power"]


class Stop(Exception):
    """The process ends here."""


@dataclass(eq=False, slots=True)
class Step:
    """What a command made of a key. ``is_over``: it was acknowledged."""

    value: Value | None
    level: Level = Level.MEMORY
    expires_ms: int = 0
    is_over: bool = False


@dataclass(slots=True)
class Result:
    """What a history did; two runs of a seed are equal."""

    lives: list[str] = field(default_factory=list[str])
    reads: int = 0
    misses: int = 0
    failed: int = 0
    loads: int = 0
    demoted: int = 0
    moved_down: int = 0
    evicted: int = 0
    recovered: int = 0


class History:
    """What every key was told, over all lives."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.strings = [b"k%d" % number for number in range(rng.choice((4, 12)))]
        self.pages = [b"m:" + b"%064x" % number for number in range(rng.choice((4, 12, 24)))]
        self.page_bytes = rng.choice((1000, 20_000, 50_000))
        self.steps: dict[bytes, list[Step]] = {}
        self.writes = 0
        self.boot = 0
        self.result = Result()

    def is_page(self, key: bytes) -> bool:
        return key.startswith(b"m:")

    def begin(self, key: bytes, step: Step) -> Step:
        self.steps.setdefault(key, []).append(step)
        return step

    def end(self, key: bytes, step: Step) -> None:
        """Note that a step is over; what was told before it can never come back."""
        step.is_over = True
        steps = self.steps[key]
        if step in steps:
            del steps[: steps.index(step)]

    def see(
        self, key: bytes, data: bytes, expires_ms: int, wall_ms: int, *, crashed: bool = False
    ) -> None:
        """Assert that a value may be there now. What is found after a crash is the truth then."""
        steps = self.steps.get(key, [])
        if self.is_page(key):
            assert data == value_of_page(key, self.page_bytes).bytes(), f"{key!r}: wrong bytes"
            return
        may = steps if crashed else steps[-1:]
        found = [
            step
            for step in may
            if step.value is not None
            and step.value.bytes() == data
            and step.expires_ms == expires_ms
        ]
        what = f"{data[:40]!r}, {len(data)} bytes, and expires at {expires_ms}"
        assert found, f"{key!r} is {what}; it may be one of {may}"
        assert not expires_ms or expires_ms > wall_ms, f"{key!r} is there though its TTL ended"
        if crashed:
            steps[:] = found[-1:]
            steps[0].is_over = True


class Life:
    """One process: a cache, its tiers, and clients."""

    def __init__(self, history: History, files: list[Files], jump: Jump, *, faults: bool) -> None:
        rng = history.rng
        self.history = history
        self.rng = rng
        self.jump = jump
        self.has_faults = faults
        self.clock = ManualClock(anyio.current_time)
        self.clock.refresh()
        arena = memoryview(mmap.mmap(-1, ARENA_BYTES))
        self.cache = Cache(
            arena,
            SlabAllocator(ARENA_BYTES),
            policy=rng.choice(("lru", "s3fifo", "sieve", "survival")),
            small_max=rng.choice((6000, 60_000)),
            clock=self.clock,
        )
        self.devices: list[MemoryDevice] = []
        self.faulty: list[FaultyDevice] = []
        self.tiers: list[FileTier] = []
        self.must_find: list[bytes] = []  # the life before promised them
        self.promised: list[bytes] = []
        self.leaving: set[Record] = set()
        for number, (name, alignment) in enumerate((("nvme", 4096), ("disk", 64))):
            if number < len(files):
                self._add_tier(name, alignment, files[number])

    def _add_tier(self, name: str, alignment: int, files: Files) -> None:
        capacity = (9 if name == "nvme" else 24) * SEGMENT_BYTES + (512 << 10)
        device = MemoryDevice(
            files, alignment=alignment, capacity_bytes=capacity, pause=self._pause
        )
        faulty = FaultyDevice(device, self.rng.randrange)
        config = TierConfig(
            name,
            name[0],
            4096 if alignment == 4096 else 64,
            capacity,
            SEGMENT_BYTES,
            depth=4,
            checkpoint_interval_s=self.rng.choice((0.5, 5.0)),
            staging_bytes=1 << 20,
            boot_id=f"boot {self.history.boot}",
        )

        async def connect() -> Device:
            tier.leave = partial(self._leave, tier.leave)
            return faulty

        tier = FileTier(config, connect, clock=anyio.current_time)
        self.devices.append(device)
        self.faulty.append(faulty)
        self.tiers.append(tier)

    async def _leave(
        self, leave: Callable[[list[Record]], Awaitable[None]], records: list[Record]
    ) -> None:
        """Note what reclaim is about to drop: its log is told so a little earlier than the engine."""
        self.leaving.update(records)
        await leave(records)

    async def _pause(self, kind: Kind, name: str) -> None:
        await anyio.sleep(self.rng.choice((0, 0.0001, 0.001, 0.02)))

    async def live(self, end: End) -> list[Files]:
        """Live to the end; return what the devices hold then."""
        left: list[Files] = []
        with suppress(Stop):
            settings = MoveSettings(
                promote=self.rng.choice(("first", "second", "never")),
                dirty_high=self.rng.choice((20, 50, 80)),
                dirty_low=10,
                move_bytes_max=self.rng.choice((100_000, 1 << 20)),
                reserve_timeout_s=1.0,
                shutdown_timeout_s=60.0,
            )
            try:
                async with open_files(self.cache, self.tiers, settings) as mover:
                    await self._play(mover, end)
                    if end != "clean":
                        left = self._crash(end)
                        raise Stop
            except BaseExceptionGroup as group:
                if group.split(Stop)[1] is not None:
                    raise
        self._count()
        if end == "clean":
            left = [
                {name: bytes(data) for name, data in each.files.items()} for each in self.devices
            ]
            self._keep_what_is_true()
        return left

    async def _play(self, mover: Mover, end: End) -> None:
        self.history.result.recovered += len(self.cache.entries)
        lost = [key for key in self.must_find if key not in self.cache.entries]
        assert not lost, f"acknowledged and lost: {lost}"
        for key in [*self.history.strings, *self.history.pages]:
            await self._read(mover, key, crashed=True)
        self._forget_what_is_gone()
        if self.has_faults:
            for each in self.faulty:
                each.add("error", "write", code=errno.EIO, name="segment", one_in=30)
                each.add("error", "read", code=errno.EIO, name="segment", one_in=60)
                each.add("flip", "read", name="segment", one_in=60)
        with anyio.move_on_after(LIFE_S_MAX) as scope:
            async with anyio.create_task_group() as tasks:
                for _ in range(CLIENTS):
                    tasks.start_soon(self._be_client, mover)
                if end != "clean" and self.rng.random() < 0.5:
                    await anyio.sleep(self.rng.uniform(0, 4))
                    tasks.cancel_scope.cancel()  # it ends in the middle of commands
        assert not scope.cancelled_caught, f"a client hangs for {LIFE_S_MAX} s"
        if self.has_faults:
            for each in self.faulty:
                each.heal()
            await anyio.sleep(self.rng.choice((0, 3)))

    async def _be_client(self, mover: Mover) -> None:
        rng = self.rng
        for _ in range(STEPS):
            self.jump(rng.uniform(1e-6, 2e-6))
            self.clock.refresh()
            keys = rng.choice((self.history.strings, self.history.pages))
            key = keys[min(rng.randrange(len(keys)), rng.randrange(len(keys)))]
            what = rng.random()
            if what < 0.4:
                await self._read(mover, key)
            elif what < 0.85:
                await self._change(mover, key, self._put)
            elif what < 0.93:
                await self._change(mover, key, self._delete)
            elif what < 0.95:
                await self._change(mover, key, self._pin)
            elif what < 0.98 and not self.history.is_page(key):
                await self._change(mover, key, self._expire)
            elif what < 0.985:
                await self._flush(mover)
            elif what < 0.993:
                entries = [self.cache.find(each) for each in self.history.pages]
                mover.advise_prefetch([each for each in entries if each is not None])
            else:
                self.check()
            await anyio.sleep(rng.choice((0, 0, 0.001, 0.05)))

    # -- commands -----------------------------------------------------------------------------

    async def _read(self, mover: Mover, key: bytes, *, crashed: bool = False) -> None:
        cache, history = self.cache, self.history
        history.result.reads += 1
        self.clock.refresh()
        entry = cache.find(key)
        if entry is None:
            history.result.misses += 1
            return
        load = mover.start_load(entry)
        try:
            await load.wait()
            self.clock.refresh()
            entry = cache.find(key)
            if entry is None or entry.is_cold:
                assert entry is None or load.error is not None or entry is not load.entry
                history.result.misses += 1
                return
            if entry.slot is not None:
                header = cache.header(entry.slot)
                check_page(header, cache.payload(entry.slot), key=key)
            now_ms = self.clock.wall_ms
            history.see(key, cache.copy(entry), entry.expires_ms, now_ms, crashed=crashed)
        finally:
            mover.release(load)

    async def _change(
        self, mover: Mover, key: bytes, change: Callable[[bytes], Step | None]
    ) -> None:
        """Let a command change a key in one turn; it is over when what it noted holds."""
        before = self.cache.copies.ticket
        try:
            step = change(key)
        except (OutOfMemory, CommandError):
            return
        try:
            if self.cache.copies.ticket != before:
                await mover.settle(self.cache.copies.ticket, before)
        except TierError as error:
            self.history.result.failed += 1
            was_dropped = "the value is gone: evicted" in str(error)
            assert was_dropped or self.has_faults, "nothing fails without a fault"
        else:
            if step is not None:
                self.history.end(key, step)

    def _put(self, key: bytes) -> Step:
        rng, history, cache = self.rng, self.history, self.cache
        level = rng.choice((Level.MEMORY, Level.MEMORY, Level.WRITTEN, Level.DURABLE))
        if history.is_page(key):
            number = history.pages.index(key)
            parent = history.pages[number - 1] if number else None
            how = Put("kvpage", 0, rng.choice((0, 0, 1)), 16, parent, level)
            value = value_of_page(key, history.page_bytes)
            same = cache.has_page(key, value.nbytes)
            if same is not None:
                cache.describe(same, how)
            else:
                cache.put(key, value.bytes(), how)
            return history.begin(key, Step(value, level))
        history.writes += 1
        nbytes = rng.choice((3, 20, 20, 400, 3000, 30_000, 60_000))
        value = value_of_write(key, history.writes, nbytes)
        expires_ms = self.clock.wall_ms + rng.choice((20, 2000)) if rng.random() < 0.1 else 0
        plain = level == Level.MEMORY and not expires_ms
        cache.put(key, value.bytes(), PLAIN if plain else Put(expires_ms=expires_ms, level=level))
        return history.begin(key, Step(value, level, expires_ms))

    def _delete(self, key: bytes) -> Step | None:
        entry = self.cache.find(key)
        if entry is None:
            return None
        self.cache.delete(entry)
        return self.history.begin(key, Step(None))

    def _pin(self, key: bytes) -> None:
        entry = self.cache.find(key)
        if entry is not None:
            self.cache.pin(entry, self.clock.now + self.rng.choice((0, 0.1)))

    def _expire(self, key: bytes) -> Step | None:
        entry = self.cache.find(key)
        if entry is None:
            return None
        left_ms = self.rng.choice((None, 20, 2000, 200_000))
        expires_ms = 0 if left_ms is None else self.clock.wall_ms + left_ms
        self.cache.expire_at(entry, expires_ms)
        before = self.history.steps[key][-1]
        return self.history.begin(key, Step(before.value, before.level, expires_ms))

    async def _flush(self, mover: Mover) -> None:
        steps = {key: self.history.begin(key, Step(None)) for key in self.history.steps}
        with suppress(TierError):
            await mover.flush_all()
            for key, step in steps.items():
                self.history.end(key, step)

    # -- ends ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert that the engine is whole, and that its books and the tiers' agree."""
        self.cache.check()
        for tier in self.tiers:
            assert tier.stats.file_bytes <= tier.capacity_bytes

    def _crash(self, end: Literal["kill", "power"]) -> list[Files]:
        """Return what is left of each device, and check afterwards that what was promised is."""
        self.history.boot += end == "power"
        choose = self.rng.randrange
        left = [device.after_crash(device.num_events, end, choose) for device in self.devices]
        least = Level.WRITTEN if end == "kill" else Level.DURABLE
        self.promised = (
            []
            if self.has_faults
            else [
                entry.key
                for entry in self.cache.entries.values()
                if self._is_promised(entry, least)
            ]
        )
        return left

    def _is_promised(self, entry: Entry, least: Level) -> bool:
        steps = self.history.steps.get(entry.key, [])
        is_safe = any(
            record.level >= least and record not in self.leaving for record in entry.records
        )
        return is_safe and len(steps) == 1 and steps[0].is_over and not entry.expires_ms

    def _keep_what_is_true(self) -> None:
        """After a clean stop only what was there is true."""
        self.promised = []
        for steps in self.history.steps.values():
            del steps[:-1]

    def _forget_what_is_gone(self) -> None:
        """What was not found after a start has not happened; what was found is the truth now."""
        cache, history = self.cache, self.history
        for key, steps in history.steps.items():
            entry = cache.entries.get(key)
            if history.is_page(key):
                del steps[:-1]
            elif entry is None:
                steps[:] = [Step(None, is_over=True)]

    def _count(self) -> None:
        stats, result = self.cache.stats, self.history.result
        result.loads += stats.loads
        result.demoted += stats.demoted
        result.moved_down += stats.moved_down
        result.evicted += stats.evicted


async def _play_lives(seed: int, jump: Jump) -> Result:
    rng = random.Random(seed)
    history = History(rng)
    files: list[Files] = [{} for _ in range(rng.choice((1, 2)))]
    promised: list[bytes] = []
    for _ in range(LIVES):
        end: End = rng.choice(("clean", "kill", "power"))
        life = Life(history, files, jump, faults=rng.random() < 0.3)
        life.must_find = promised
        files = await life.live(end)
        promised = life.promised
        history.result.lives.append(end)
    return history.result


def play_lives(seed: int, *, backend: str = "asyncio") -> Result:
    """Play one history. Raises AssertionError, with the seed in it, when something is wrong."""

    async def play(jump: Jump) -> Result:
        return await _play_lives(seed, jump)

    work: Callable[[Jump], Awaitable[Result]] = play
    try:
        result = run(work, backend=backend, seed=seed)
    except BaseException as error:
        error.add_note(f"again with: play_lives({seed}, backend={backend!r})")
        raise
    assert isinstance(result, Result)
    return result
