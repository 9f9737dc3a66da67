"""A file tier without files whose reads and writes a test lets through one by one, or has fail."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio

from respkv.errors import PageCorrupt, TierError
from respkv.tiers.health import Health
from respkv.tiers.record import Level, Meta, Record, Value
from respkv.tiers.tier_stats import TierStats


class Gate:
    """Lets pass while it is open; what waits at it, in order, can also be let through singly."""

    def __init__(self) -> None:
        self.is_open = True
        self.waiting: list[bytes] = []
        self.errors: dict[bytes, str] = {}
        self.passed: list[bytes] = []
        self._changed = anyio.Event()
        self._came = anyio.Event()

    def shut(self) -> None:
        self.is_open = False

    def open(self) -> None:
        self.is_open = True
        self._wake()

    def let(self, name: bytes) -> None:
        """Let one through."""
        self.waiting.remove(name)
        self._wake()

    async def has_waiting(self, count: int) -> None:
        """Wait until so many wait here."""
        with anyio.fail_after(60):
            while len(self.waiting) < count:
                await self._came.wait()

    async def go_through(self, name: bytes) -> None:
        """Wait for one's turn; raise the error that is laid out for this name."""
        if not self.is_open:
            self.waiting.append(name)
            self._came.set()
            self._came = anyio.Event()
        while not self.is_open and name in self.waiting:
            await self._changed.wait()
        if name in self.waiting:
            self.waiting.remove(name)
        self.passed.append(name)
        if name in self.errors:
            raise TierError(self.errors[name])

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def _unset(*_: object) -> Any:
    raise AssertionError("the engine sets its hooks")


class GatedTier:
    """Values in a dict. reads, writes and notes are the gates; writes are known by their keys."""

    name, letter = "nvme", "n"
    payload_bytes_max = 1 << 30
    capacity_bytes = 1 << 40
    next_generation = 1

    def __init__(self) -> None:
        self.describe: Callable[[Record], Meta] = _unset
        self.keep: Callable[[Record], bool] = _unset
        self.leave: Callable[[list[Record]], Awaitable[None]] = _unset
        self.release: Callable[[Record], bool] = _unset
        self.dropped: Callable[[Record, str], None] = _unset
        self.generation: Callable[[], int] = _unset
        self.health = Health(self.name)
        self.stats = TierStats()
        self.values: dict[Record, bytes] = {}
        self.reads, self.writes, self.notes = Gate(), Gate(), Gate()
        self.batches: list[list[bytes]] = []  # keys of the writes that clients waited for
        self.corrupt: set[bytes] = set()
        self.num_clears = 0
        self.settled: set[Level] = set()
        self._ticket = 0

    async def start(self, found: Callable[[Meta, Record], bool]) -> Any:
        return None

    async def run(self) -> None:
        await anyio.sleep_forever()

    async def write(self, values: Sequence[Value], level: Level) -> list[Record | None]:
        if level:
            self.batches.append([value.meta.key for value in values])
        return [await self._write(value, level) for value in values]

    async def _write(self, value: Value, level: Level) -> Record | None:
        try:
            await self.writes.go_through(value.meta.key)
        except TierError:
            return None
        meta, payload = value.meta, bytes(value.payload)
        self._ticket += 1
        record = Record(
            *(0, 0, len(payload) + 64, len(payload), 0, meta.generation, meta.checksum),
            *(self._ticket, level, value.owner),
        )
        self.values[record] = payload
        return record

    async def read(
        self, record: Record, key: bytes, into: memoryview, image: memoryview | None
    ) -> int:
        _, into[:] = await self.read_stored(record, key)
        return record.checksum

    async def read_stored(self, record: Record, key: bytes) -> tuple[int, bytes]:
        await self.reads.go_through(key)
        if key in self.corrupt:
            del self.values[record]
            self.dropped(record, "corrupt")
            raise PageCorrupt("a bit has flipped")
        if record not in self.values:
            raise TierError("it is gone")
        return record.codec, self.values[record]

    def free(self, record: Record) -> None:
        self.values.pop(record, None)

    def bury(self, key: bytes, generation: int) -> int:
        self._ticket += 1
        return self._ticket

    def change(self, meta: Meta) -> int:
        self._ticket += 1
        return self._ticket

    async def settle(self, ticket: int, level: Level) -> None:
        await self.notes.go_through(b"note")
        self.settled.add(level)

    async def clear(self) -> None:
        await self.notes.go_through(b"clear")
        self.num_clears += 1
        self.values.clear()

    async def stop(self, seconds: float = 0.0) -> None:
        self.values.clear()

    async def reset(self) -> None:
        self.values.clear()

    def load_us(self, nbytes: int) -> int:
        return 100 + nbytes // 1000
