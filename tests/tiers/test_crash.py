"""Crashes between any two events of a device: nothing promised is lost, nothing void comes back.

A seeded program puts, overwrites, deletes, changes, evicts, takes checkpoints, clears and stops, on
a device in memory. It notes when each thing was asked and when it was acknowledged. Then the
machine or the process stops before some events, the files of that moment are recovered, and what is
found is held against what may and what must be there. One of these recoveries goes on as the next
life, so that crashes follow crashes.
"""

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from respkv.errors import TierError
from respkv.tiers.file_tier import FileTier
from respkv.tiers.parts import TierConfig
from respkv.tiers.record import Level, Meta, Record, Value
from tests.tiers.memory_device import Crash, Kind, MemoryDevice
from tests.tiers.shelf import Held, Shelf, check_books, make_value, page

SEGMENT_BYTES = 96 << 10
CAPACITY_BYTES = 9 * SEGMENT_BYTES + (512 << 10)
FOREVER = 1 << 60
CRASHES: tuple[Crash, Crash] = ("kill", "power")


@dataclass(eq=False)
class Step:
    """What a client asked of a key.

    generation: 0 for a deletion. ended: when it was acknowledged.
    voids:      the level at which what was there before has been buried.
    """

    generation: int
    level: Level
    started: int
    ended: int = FOREVER
    expires_ms: int = 0
    voids: Level = Level.MEMORY


@dataclass
class Story:
    """All steps by key, and when the tier began to give up a generation of its own accord."""

    steps: dict[bytes, list[Step]] = field(default_factory=dict[bytes, list[Step]])
    leaving: dict[tuple[bytes, int], int] = field(default_factory=dict[tuple[bytes, int], int])
    clean: int = FOREVER

    def begin(self, key: bytes, step: Step) -> Step:
        self.steps.setdefault(key, []).append(step)
        return step

    def check(self, event: int, crash: Crash, found: dict[bytes, Meta]) -> None:
        """Assert that a recovery after a crash before ``event`` found what it may and must."""
        for key, steps in self.steps.items():
            begun = [step for step in steps if step.started <= event]
            ended = [step for step in begun if step.ended <= event]
            going = [step for step in begun if step.ended > event]
            last = ended[-1] if ended else Step(0, Level.MEMORY, 0)
            what = f"{key!r} before {event} ({crash}): last {last}, going on {going}"
            meta = found.get(key)
            if meta is None:
                is_safe = last.level == Level.DURABLE or (
                    last.level == Level.WRITTEN and crash == "kill"
                )
                has_left = self.leaving.get((key, last.generation), FOREVER) <= event
                assert not (last.generation and is_safe) or going or has_left, f"lost: {what}"
                continue
            may = [last, *going]
            if key.startswith(b"ns:"):
                # A page may come back after a deletion that was not as safe as that.
                needed = Level.WRITTEN if crash == "kill" else Level.DURABLE
                safe = [i for i, step in enumerate(begun) if step in ended and step.voids >= needed]
                may = begun[max(safe, default=0) :]
            assert meta.generation in {step.generation for step in may}, f"{meta}: {what}"
            if meta.level >= Level.WRITTEN:
                times = {step.expires_ms for step in may if step.generation == meta.generation}
                assert meta.expires_ms in times, f"{meta}: {what}"
        assert found.keys() <= self.steps.keys()


class World:
    """One life of a tier, from a start to a crash or a stop."""

    def __init__(
        self, rng: random.Random, device: MemoryDevice, alignment: int, boot_id: str
    ) -> None:
        self.rng = rng
        self.device = device
        self.story = Story()
        config = TierConfig(
            "test",
            "t",
            4096 if alignment == 4096 else 64,
            CAPACITY_BYTES,
            SEGMENT_BYTES,
            depth=4,
            staging_bytes=256 << 10,
            boot_id=boot_id,
        )

        async def connect() -> MemoryDevice:
            return device

        self.tier = FileTier(config, connect)
        self.shelf = Shelf(self.tier)
        self.tier.leave = self.leave
        self.busy: set[bytes] = set()

    @property
    def now(self) -> int:
        return self.device.num_events

    async def leave(self, records: list[Record]) -> None:
        for record in records:
            meta: Meta = record.owner.meta
            self.story.leaving.setdefault((meta.key, meta.generation), self.now)
        await checkpoint()

    async def start(self) -> None:
        """Recover; what is there becomes the beginning of the story."""
        await self.tier.start(self.shelf.found)
        for key, held in self.shelf.held.items():
            meta = held.meta
            self.story.begin(key, Step(meta.generation, meta.level, 0, 0, meta.expires_ms))
        self.shelf.generation = max(self.shelf.generation, self.tier.next_generation)

    async def live(self, steps: int) -> None:
        """Do some steps, several at a time, and perhaps stop cleanly."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.tier.run)
            async with anyio.create_task_group() as askers:
                for _ in range(steps):
                    await self.step(askers)
                    for _ in range(self.rng.randrange(6)):
                        await checkpoint()
            check_books(self.tier)
            assert not [gone for gone in self.shelf.gone if gone[2] != "evicted"]
            if self.rng.randrange(3) == 0:
                await self.tier.stop()
                self.story.clean = self.now
            group.cancel_scope.cancel()

    async def step(self, askers: TaskGroup) -> None:
        choice = self.rng.randrange(100)
        key = self.key()
        if key in self.busy:
            return
        if choice < 45:
            self.ask(askers, key, self.put)
        elif choice < 60:
            self.ask(askers, key, self.delete)
        elif choice < 68:
            self.ask(askers, key, self.expire)
        elif choice < 88:
            askers.start_soon(self.demote, key)
        elif choice < 94:
            assert self.tier._parts is not None
            askers.start_soon(self.tier._parts.checkpointer.try_write)
        elif choice < 96:
            keeps = self.rng.choice([lambda record: True, lambda record: record.offset % 3 > 0])
            self.shelf.keeps = keeps
        elif not self.busy:
            await self.clear()

    def key(self) -> bytes:
        number = self.rng.randrange(40)
        return page(number) if number % 2 else b"key%d" % number

    def ask(self, askers: TaskGroup, key: bytes, step: Callable[[bytes], Awaitable[None]]) -> None:
        self.busy.add(key)
        askers.start_soon(self.asked, key, step)

    async def asked(self, key: bytes, step: Callable[[bytes], Awaitable[None]]) -> None:
        with suppress(TierError):  # then it is never acknowledged
            await step(key)
        self.busy.discard(key)

    def retire(self, key: bytes) -> tuple[int, Level]:
        """Forget what a key has; return the ticket of its burial and the level to wait for."""
        held = self.shelf.held.pop(key, None)
        if held is None:
            return 0, Level.MEMORY
        if held.record is not None:
            self.tier.free(held.record)
        if held.meta.level == Level.MEMORY and not key.startswith(b"ns:"):
            return 0, Level.MEMORY
        return self.tier.bury(key, held.meta.generation), held.meta.level

    def value(self, key: bytes, level: Level) -> tuple[Held, Value]:
        nbytes = self.rng.choice([10, 500, 3000, 9000, 20000])
        has_image = nbytes > 3000 and self.rng.randrange(2) == 0
        value = make_value(
            key, self.shelf.next_generation(), nbytes, level=level, has_image=has_image
        )
        held = Held(value.meta)
        held.value = value._replace(owner=held)
        return held, held.value

    async def put(self, key: bytes) -> None:
        level = Level(self.rng.randrange(3))
        held, value = self.value(key, level)
        step = self.story.begin(key, Step(held.meta.generation, level, self.now))
        old = self.shelf.held.get(key)
        if old is not None and old.record is not None and self.is_late(key, old, level):
            # The old one stays until the new one is in the log; nobody waits for its burial.
            self.shelf.held[key] = held
            await self.write(held, value, level)
            if old.record is not None:
                self.tier.free(old.record)
            self.tier.bury(key, old.meta.generation)
            old_level = Level.MEMORY
        else:
            ticket, old_level = self.retire(key)
            self.shelf.held[key] = held
            if level > Level.MEMORY:
                await self.write(held, value, level)
            if ticket:
                await self.tier.settle(ticket, old_level)
        step.voids = old_level
        if level == Level.MEMORY or held.record is not None or not self.is_there(held):
            step.ended = self.now

    def is_late(self, key: bytes, old: Held, level: Level) -> bool:
        is_safe = level >= old.meta.level >= Level.WRITTEN
        return is_safe and not key.startswith(b"ns:") and self.rng.randrange(2) == 0

    def is_there(self, held: Held) -> bool:
        return self.shelf.held.get(held.meta.key) is held

    async def write(self, held: Held, value: Value, level: Level) -> None:
        (record,) = await self.tier.write([value], level)
        if record is None or record.is_gone:
            return
        if self.is_there(held) and held.record is None:
            held.record = record
        else:
            self.tier.free(record)

    async def demote(self, key: bytes) -> None:
        held = self.shelf.held.get(key)
        if held is not None and held.record is None and held.value is not None:
            await self.write(held, held.value._replace(meta=held.meta), Level.MEMORY)

    async def delete(self, key: bytes) -> None:
        if key not in self.shelf.held:
            return
        level = self.shelf.held[key].meta.level
        step = self.story.begin(key, Step(0, level, self.now))
        ticket, old = self.retire(key)
        if ticket:
            # Nobody waits for the deletion of a page that was put at MEMORY: it may come back.
            if old == Level.MEMORY:
                return
            await self.tier.settle(ticket, old)
            step.voids = old
        step.ended = self.now

    async def expire(self, key: bytes) -> None:
        held = self.shelf.held.get(key)
        if held is None or (held.meta.level == Level.MEMORY and held.record is None):
            return
        held.meta = held.meta._replace(expires_ms=self.now + 1)
        if held.record is not None and self.rng.randrange(3) == 0:
            held.meta = held.meta._replace(level=Level.DURABLE)
        meta = held.meta
        step = Step(meta.generation, meta.level, self.now, expires_ms=meta.expires_ms)
        self.story.begin(key, step)
        await self.tier.settle(self.tier.change(meta), meta.level)
        step.ended = self.now

    async def clear(self) -> None:
        steps = [self.story.begin(key, Step(0, Level.MEMORY, self.now)) for key in self.story.steps]
        self.shelf.held.clear()
        await self.tier.clear()
        for step in steps:
            step.ended, step.voids = self.now, Level.DURABLE


async def recovered(world: World, event: int, crash: Crash, rng: random.Random) -> World:
    """Crash before an event, recover and read everything."""
    files = world.device.after_crash(event, crash, rng.randrange)
    boot_id = world.tier.config.boot_id
    device = make_device(files, world.device.alignment, rng)
    boot = boot_id if crash == "kill" else boot_id + "+"
    other = World(rng, device, world.device.alignment, boot)
    await other.start()
    await other.shelf.check()
    assert not other.shelf.gone
    found = {key: held.meta for key, held in other.shelf.held.items()}
    if event >= world.story.clean:
        wanted = {key: held.meta for key, held in world.shelf.held.items() if held.record}
        assert found == wanted, f"{found.items() ^ wanted.items()}"
    world.story.check(event, crash, found)
    return other


def make_device(files: dict[str, bytes], alignment: int, rng: random.Random) -> MemoryDevice:
    async def pause(kind: Kind, name: str) -> None:
        for _ in range(rng.randrange(5)):
            await checkpoint()

    return MemoryDevice(files, alignment=alignment, capacity_bytes=CAPACITY_BYTES, pause=pause)


async def run(seed: int, *, lives: int, steps: int, crashes: int) -> None:
    rng = random.Random(seed)
    alignment = rng.choice([1, 4096])
    world = World(rng, make_device({}, alignment, rng), alignment, "boot")
    await world.start()
    for _ in range(lives):
        await world.live(rng.randrange(steps))
        events = [world.now, *(rng.randrange(world.now + 1) for _ in range(crashes))]
        kinds: list[Crash] = [rng.choice(CRASHES) for _ in events]
        others = [
            await recovered(world, event, crash, rng)
            for event, crash in zip(events, kinds, strict=True)
        ]
        world = rng.choice(others)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_a_crash_loses_nothing_promised_and_brings_nothing_back(seed: int) -> None:
    anyio.run(lambda: run(seed, lives=3, steps=120, crashes=4))
