"""A gpu tier of plain bytes: no torch, and a test decides when copies happen and how they end."""

from typing import Any

import anyio
import anyio.lowlevel

from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.namespaces import Schema
from respkv.errors import TierError
from respkv.kernels.page_form import PageForm
from respkv.page import Geometry
from respkv.tiers.format import hash64
from respkv.tiers.gpu_slots import GpuSlots
from respkv.tiers.slab import Slot

SHAPE = Geometry(layers=1, heads=2, dim=64, tokens=16, dtype="bfloat16")
NBYTES = SHAPE.page_bytes
PAGE = Put("kvpage")


class Broken(TierError):
    """What a copy raises with which the tier goes off."""


class FakeGpu:
    """A tier of ``capacity_bytes``. ``gate``: copies wait while it is not None.

    error: raised by the next copy. is_unfit: no page fits an encoded form.
    An encoded page is the page's first bytes, so it is never what was put.
    """

    name = "gpu"
    letter = "g"

    def __init__(self, capacity_bytes: int = 1 << 20, *, unit_bytes: int = 4096) -> None:
        self.slots = GpuSlots(capacity_bytes, unit_bytes=unit_bytes)
        self.memory = bytearray(capacity_bytes)
        self.state, self.reason = "ok", ""
        self.gate: anyio.Event | None = None
        self.error: BaseException | None = None
        self.is_unfit = False
        self.num_writes = self.num_reads = 0

    def take(self, nbytes: int) -> Slot | None:
        return None if self.reason else self.slots.take(nbytes)

    async def write(self, slot: Slot, payload: memoryview, form: PageForm) -> bool:
        self.num_writes += 1
        await self._pass()
        self.memory[slot.offset : slot.offset + form.nbytes] = payload[: form.nbytes]
        return form.is_lossless or not self.is_unfit

    async def read(self, slot: Slot, into: memoryview, form: PageForm) -> int:
        self.num_reads += 1
        await self._pass()
        into[:] = self.memory[slot.offset : slot.offset + form.nbytes]
        return hash64(into)

    def handle(self) -> tuple[str, bytes, int]:
        return "uuid", b"h" * 64, 0

    def load_us(self, nbytes: int) -> int:
        return 10

    def stop_working(self, reason: str = "CUDA error: it broke") -> None:
        """Fail the next copy, and be off from then on."""
        self.error = Broken(reason)

    async def _pass(self) -> None:
        await anyio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        error, self.error = self.error, None
        if isinstance(error, Broken):
            self.state, self.reason = "off", str(error)
        if error is not None:
            raise error


def declare(cache: Cache, namespace: bytes = b"ns", **how: Any) -> None:
    """Give a namespace pages of NBYTES."""
    cache.namespaces.put(Schema(namespace, SHAPE, **how))


def put_page(cache: Cache, key: bytes, fill: int, how: Put = PAGE) -> Entry:
    """Store a page of equal bytes."""
    return cache.put(key, bytes([fill]) * NBYTES, how)


def read_page(cache: Cache, key: bytes, times: int = 1) -> None:
    """Do as KV.GET does."""
    for _ in range(times):
        assert cache.use(key) is not None


def check_bytes(cache: Cache, gpu: FakeGpu) -> None:
    """Assert that no copy is of anything but the value its entry has now, where that is known."""
    for entry, copy in cache.gpu.by_entry.items():
        place = copy.slot.offset
        there = gpu.memory[place : place + copy.form.nbytes]
        if entry.slot is not None:
            assert there == cache.payload(entry.slot)[: copy.form.nbytes]
        if copy.form.is_lossless:
            assert hash64(bytes(there)) == copy.checksum
