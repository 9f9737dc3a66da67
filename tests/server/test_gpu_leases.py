"""KV.LEASE ... TIER gpu: pages pinned on the device. The processor stands in for it, with a handle."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import torch

from respkv.engine.entry import Put
from respkv.engine.namespaces import Schema
from respkv.kernels.page_form import form_of_name
from respkv.page import Geometry
from respkv.server.gpu import using_gpu
from respkv.tiers.gpu import GpuTier
from respkv.tiers.gpu_lanes import Lanes
from tests.fakes import FakeWire, ManualClock
from tests.server.cold import Cold, cold_server, replies, settle
from tests.server.raw import error_of, request
from tests.tiers.late_lanes import LateLanes

pytestmark = pytest.mark.anyio

SHAPE = Geometry(layers=1, heads=2, dim=64, tokens=32, dtype="bfloat16")
NBYTES = SHAPE.page_bytes
BASE = 512
HANDLE = bytes(range(64))


class SharedTier(GpuTier):
    """A tier on the processor that says it can be shared."""

    def handle(self) -> tuple[str, bytes, int]:
        return "uuid", HANDLE, BASE


class PromptLanes:
    """Lanes whose work is over at once, launched from the loop."""

    def __init__(self) -> None:
        self._late = LateLanes()
        self.is_quick = True

    def launch(self, way: Any, work: Any) -> Any:
        ending = self._late.launch(way, work)
        self._late.finish_all()
        return ending

    def wait_for_users(self) -> None:
        return


@asynccontextmanager
async def gpu_server(
    lanes: Lanes | None = None, *, slots: int = 8, clock: ManualClock | None = None, **how: Any
) -> AsyncIterator[tuple[Cold, SharedTier]]:
    """Yield a server between a gpu tier and a file tier."""
    async with cold_server(clock=clock, gpu_promote="never") as cold:
        memory = torch.zeros(slots * NBYTES, dtype=torch.uint8)
        tier = SharedTier(memory, lanes or PromptLanes(), unit_bytes=4096)
        cold.cache.namespaces.put(Schema(b"ns", SHAPE, **how))
        async with using_gpu(cold.server, tier):
            yield cold, tier
            cold.cache.check()
            for session in list(cold.server.sessions.values()):
                session.lost()
        assert tier.slots.used_bytes == 0


def page(number: int) -> bytes:
    numbers = torch.randn(NBYTES // 2, generator=torch.Generator().manual_seed(number))
    return numbers.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def put(cold: Cold, *numbers: int) -> list[bytes]:
    keys = [b"ns:%d" % number for number in numbers]
    for key, number in zip(keys, numbers, strict=True):
        cold.cache.put(key, page(number), Put("kvpage"))
    return keys


def bytes_at(tier: GpuTier, place: list[Any]) -> bytes:
    offset, nbytes, _ = place
    return tier.memory[offset - BASE : offset - BASE + nbytes].numpy().tobytes()


def holders_of(tier: GpuTier) -> set[int]:
    """Return how many hold a slot, of all that are used."""
    return {slot.holders for slot in tier.slots.used()}


async def ask(wire: FakeWire, *words: Any) -> Any:
    wire.feed(request(*words))
    return (await replies(wire, 1))[0]


async def test_a_lease_says_where_each_page_is_and_holds_it() -> None:
    async with gpu_server() as (cold, tier):
        keys, wire = put(cold, 1, 2), FakeWire(cold.server)
        lease, places, device, handle = await ask(wire, "KV.LEASE", 2, *keys, "TIER", "gpu")
        assert (device, handle) == (b"uuid", HANDLE)
        assert [bytes_at(tier, place) for place in places] == [page(1), page(2)]
        assert [place[2] for place in places] == [b"raw", b"raw"]
        cold.cache.flush()
        assert tier.slots.used_bytes == 2 * NBYTES
        assert [bytes_at(tier, place) for place in places] == [page(1), page(2)]
        assert await ask(wire, "KV.RELEASE", lease) == 1
        assert await ask(wire, "KV.RELEASE", lease) == 0
        assert tier.slots.used_bytes == 0


async def test_pages_in_files_alone_are_brought_through_memory() -> None:
    async with gpu_server() as (cold, tier):
        await cold.put({b"ns:plain": b"x" * 1000})
        keys, wire = put(cold, 1, 2, 3), FakeWire(cold.server)
        await cold.chill(*keys[:2])
        _, places, *_ = await ask(wire, "KV.LEASE", 3, *keys, "TIER", "gpu", "MS", 5000)
        assert [bytes_at(tier, place) for place in places] == [page(1), page(2), page(3)]
        assert cold.is_cold(keys[0]), "it was in memory for that alone"


async def test_a_cold_page_that_has_a_copy_is_not_read_again() -> None:
    async with gpu_server() as (cold, tier):
        (key,), wire = put(cold, 1), FakeWire(cold.server)
        lease, *_ = await ask(wire, "KV.LEASE", 1, key, "TIER", "gpu")
        await ask(wire, "KV.RELEASE", lease)
        await cold.chill(key)
        cold.tier.reads.shut()
        _, (place,), *_ = await ask(wire, "KV.LEASE", 1, key, "TIER", "gpu")
        assert bytes_at(tier, place) == page(1)


async def test_what_has_no_page_there_is_null_and_a_key_may_come_twice() -> None:
    async with gpu_server() as (cold, tier):
        (key,), wire = put(cold, 1), FakeWire(cold.server)
        cold.cache.put(b"free:1", bytes(NBYTES), Put("kvpage"))
        words = [key, b"absent", b"free:1", key]
        _, places, *_ = await ask(wire, "KV.LEASE", 4, *words, "TIER", "gpu")
        assert places[1:3] == [None, None]
        assert places[0] == places[3]
        assert tier.slots.used_bytes == NBYTES


async def test_more_pages_than_the_device_holds_are_null_at_the_end() -> None:
    async with gpu_server(slots=2) as (cold, tier):
        keys, wire = put(cold, 1, 2, 3), FakeWire(cold.server)
        _, places, *_ = await ask(wire, "KV.LEASE", 3, *keys, "TIER", "gpu")
        assert sum(place is None for place in places) == 1
        assert cold.cache.gpu.stats.no_room == 1
        for number, place in enumerate(places, 1):
            assert place is None or bytes_at(tier, place) == page(number)


async def test_the_form_of_an_encoded_page_is_named() -> None:
    async with gpu_server(codecs=((b"gpu", b"i8/f8"),), exact_last=2) as (cold, tier):
        (key,), wire = put(cold, 1), FakeWire(cold.server)
        _, (place,), *_ = await ask(wire, "KV.LEASE", 1, key, "TIER", "gpu")
        form = form_of_name(place[2].decode(), SHAPE)
        assert form.name == "i8/f8+0+2"
        assert place[1] == form.nbytes < NBYTES
        copy = cold.cache.gpu.find(cold.cache.entries[key])
        assert copy is not None
        assert torch.equal(tier.view(copy.slot, form), tier.memory[place[0] - BASE :][: place[1]])


async def test_a_connection_that_breaks_while_pages_are_brought_holds_nothing() -> None:
    lanes = LateLanes()
    async with gpu_server(lanes) as (cold, tier):
        keys, wire = put(cold, 1, 2, 3), FakeWire(cold.server)
        wire.feed(request("KV.LEASE", 3, *keys, "TIER", "gpu"))
        await lanes.launched("in")
        lanes.finish("in")
        await settle()
        assert len(cold.cache.gpu.leases) == 1
        wire.lose()
        await settle()
        while tier.slots.used_bytes > len(cold.cache.gpu.by_entry) * NBYTES or lanes.todo["in"]:
            lanes.finish_all()
            await anyio.sleep(0.002)
        with anyio.fail_after(60):  # until it has been noticed that the copies are over
            while len(cold.cache.gpu.leases) or not holders_of(tier) <= {1}:  # noqa: ASYNC110
                await anyio.sleep(0.002)
        assert holders_of(tier) <= {1}, "only the copies hold slots"
        cold.cache.flush()
        assert tier.slots.used_bytes == 0


async def test_a_lease_that_lapses_while_pages_are_brought_is_an_error() -> None:
    lanes, clock = LateLanes(), ManualClock()
    async with gpu_server(lanes, clock=clock) as (cold, _):
        keys, wire = put(cold, 1), FakeWire(cold.server)
        wire.feed(request("KV.LEASE", 1, *keys, "TIER", "gpu", "MS", 50))
        await lanes.launched("in")
        clock.advance(1)
        cold.cache.lapse()
        lanes.finish_all()
        assert error_of((await replies(wire, 1))[0]).startswith("KVLEASE ")


async def test_a_device_that_fails_is_said() -> None:
    lanes = LateLanes()
    async with gpu_server(lanes) as (cold, tier):
        keys, wire = put(cold, 1), FakeWire(cold.server)
        lanes.error = RuntimeError("CUDA error: it fell off the bus")
        said = error_of(await ask(wire, "KV.LEASE", 1, *keys, "TIER", "gpu"))
        assert said == "KVTIER the gpu tier: CUDA error: it fell off the bus"
        assert tier.state == "off"
        said = await ask(wire, "KV.LEASE", 1, *keys, "TIER", "gpu")
        assert said[1] == [None]
        rows = await ask(wire, "KV.TIERS")
        assert b"CUDA error: it fell off the bus" in rows[0]


async def test_leases_count_in_what_is_told() -> None:
    async with gpu_server() as (cold, _):
        keys, wire = put(cold, 1), FakeWire(cold.server)
        await ask(wire, "KV.LEASE", 1, *keys, "TIER", "gpu")
        rows = await ask(wire, "KV.TIERS")
        row = dict(zip(rows[0][::2], rows[0][1::2], strict=True))
        assert (row[b"name"], row[b"leases"], row[b"pages"]) == (b"gpu", 1, 1)
        assert cold.cache.stats.bytes_out == NBYTES


@pytest.mark.parametrize(
    "words", [("TIER",), ("TIER", "gpu", "TIER"), ("MS", 5, "TIER"), ("GPU",), ("MS", "gpu")]
)
async def test_wrong_words_hold_nothing(words: tuple[Any, ...]) -> None:
    async with gpu_server() as (cold, tier):
        keys, wire = put(cold, 1), FakeWire(cold.server)
        error_of(await ask(wire, "KV.LEASE", 1, *keys, *words))
        assert tier.slots.used_bytes == 0


async def test_others_are_served_while_pages_are_brought() -> None:
    lanes = LateLanes()
    async with gpu_server(lanes) as (cold, _):
        keys, wire, other = put(cold, 1), FakeWire(cold.server), FakeWire(cold.server)
        wire.feed(request("KV.LEASE", 1, *keys, "TIER", "gpu"))
        with anyio.fail_after(60):
            assert await ask(other, "PING") == b"PONG"
        assert wire.drain() == b""
        await lanes.launched("in")
        lanes.finish_all()
        assert len((await replies(wire, 1))[0]) == 4
