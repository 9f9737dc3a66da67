"""Aligned memory for what cannot go straight between a file and where it belongs.

O_DIRECT wants addresses, offsets and lengths in multiples of 4096; heads of batches, small values
and encoded payloads have none of that. They pass through here: one bounded piece of memory, made
once and registered with the device. Whoever needs a part waits, in order of coming, until there is
one. A part belongs to its taker until the operation that uses it is over, and no taker waits for a
second one: so all parts come back, and waiting ends.
"""

import mmap
from collections import deque

import anyio

from respkv.tiers.runs import FreeRuns

UNIT_BYTES = 4096


class Staging:
    """A pool of ``capacity_bytes``. A part that is larger than all of it is made for its taker,
    when no other such part is out."""

    def __init__(self, capacity_bytes: int) -> None:
        assert capacity_bytes % UNIT_BYTES == 0
        self.memory = memoryview(mmap.mmap(-1, capacity_bytes))
        self._num_units = capacity_bytes // UNIT_BYTES
        self._free = FreeRuns(self._num_units)
        self._taken: dict[int, tuple[int, int]] = {}  # by id of the part: first unit and units
        self._has_large = False
        self._waiting: deque[tuple[int, anyio.Event]] = deque()

    @property
    def taken_bytes(self) -> int:
        """Bytes that are out."""
        return sum(units for _, units in self._taken.values()) * UNIT_BYTES

    async def take(self, nbytes: int) -> memoryview:
        """Take a part of at least ``nbytes``, 4096-aligned; its content is undefined.

        Cancelled: nothing is taken.
        """
        units = -(-nbytes // UNIT_BYTES)
        if (part := self.take_now(nbytes)) is not None:
            return part
        turn = anyio.Event()
        place = (units, turn)
        self._waiting.append(place)
        try:
            while True:
                if self._waiting[0] is place and (part := self._cut(units)) is not None:
                    return part
                await turn.wait()
                turn = anyio.Event()
                self._waiting[self._waiting.index(place)] = place = (units, turn)
        finally:
            self._waiting.remove(place)
            self._wake()

    def take_now(self, nbytes: int) -> memoryview | None:
        """Take a part as ``take`` does; None when that would have to wait."""
        assert nbytes > 0
        return None if self._waiting else self._cut(-(-nbytes // UNIT_BYTES))

    def give_back(self, part: memoryview) -> None:
        """Return a part. Nothing may use its memory any more."""
        first, units = self._taken.pop(id(part))
        if units > self._num_units:
            self._has_large = False
        else:
            self._free.give_back(first, units)
        self._wake()

    def _cut(self, units: int) -> memoryview | None:
        if units > self._num_units:
            return self._make(units)
        first = self._free.take(units)
        if first is None:
            return None
        part = self.memory[first * UNIT_BYTES : (first + units) * UNIT_BYTES]
        self._taken[id(part)] = (first, units)
        return part

    def _make(self, units: int) -> memoryview | None:
        if self._has_large:
            return None
        self._has_large = True
        part = memoryview(mmap.mmap(-1, units * UNIT_BYTES))
        self._taken[id(part)] = (0, units)
        return part

    def _wake(self) -> None:
        if self._waiting:
            self._waiting[0][1].set()
