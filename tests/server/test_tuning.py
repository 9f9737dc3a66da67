"""Measuring live pages: what is held for it, and what others do meanwhile."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import anyio
import pytest

from respkv.engine.entry import Put
from respkv.engine.namespaces import Schema
from respkv.kernels.layout import Codec
from respkv.kernels.quality import Quality
from respkv.page import Geometry
from respkv.server import tuning
from tests.fakes import FakeWire
from tests.server.cold import Cold, cold_server, replies
from tests.server.raw import request

pytestmark = pytest.mark.anyio

SHAPE = Geometry(2, 4, 64, 64, "bfloat16")  # pages of 128 KiB
PAGE = bytes(SHAPE.page_bytes)
QUALITY = request("KV.QUALITY", "ns", "rh4")


class Meter:
    """Stands for the measuring: notes what it is given, and waits at a gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.given: list[int] = []
        self.num_running = self.num_running_max = 0

    def measure(
        self, pages: Sequence[memoryview], geometry: Geometry, codecs: Sequence[Codec]
    ) -> Any:
        self.num_running += 1
        self.num_running_max = max(self.num_running_max, self.num_running)
        assert {len(page) for page in pages} == {geometry.page_bytes}
        self.given.append(len(pages))
        self.gate.wait(60)
        self.num_running -= 1
        found = Quality(4.0, 0.1, 1.0, 0.2)
        return [[(found, found)] * geometry.layers for _ in codecs]


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    meter = Meter()
    monkeypatch.setattr(tuning, "_measure", meter.measure)
    yield meter
    meter.gate.set()


def put_pages(cold: Cold, count: int) -> list[bytes]:
    cold.cache.namespaces.put(Schema(b"ns", SHAPE))
    keys = [b"ns:%d" % number for number in range(count)]
    for key in keys:
        cold.cache.put(key, PAGE, Put("kvpage"))
    return keys


async def until(is_so: Callable[[], object]) -> None:
    with anyio.fail_after(60):
        for _ in iter(lambda: bool(is_so()), True):
            await anyio.sleep(0.002)


async def test_many_who_ask_at_once_are_measured_for_one_by_one(meter: Meter) -> None:
    async with cold_server() as cold:
        put_pages(cold, 12)
        wires = [FakeWire(cold.server) for _ in range(20)]
        for wire in wires:
            wire.feed(QUALITY)
        await until(lambda: meter.given)
        assert cold.cache.in_flight() == (0, meter.given[0])
        assert meter.given[0] * SHAPE.page_bytes <= cold.server.budget.each_max
        meter.gate.set()
        for wire in wires:
            assert len(await replies(wire, 1)) == 1
        assert meter.num_running_max == 1


async def test_who_leaves_while_others_are_measured_for_waits_no_more(meter: Meter) -> None:
    async with cold_server() as cold:
        put_pages(cold, 4)
        await cold.chill()
        first, second = FakeWire(cold.server), FakeWire(cold.server)
        first.feed(QUALITY)
        await until(lambda: meter.given)
        second.feed(QUALITY)
        second.lose()
        first.lose()
        meter.gate.set()
        await until(lambda: cold.cache.in_flight() == (0, 0))
        assert meter.given == [4]


async def test_a_page_that_became_another_value_while_it_was_loaded_is_not_measured(
    meter: Meter,
) -> None:
    async with cold_server() as cold:
        keys = put_pages(cold, 2)
        await cold.chill()
        cold.tier.reads.shut()
        wire, other = FakeWire(cold.server), FakeWire(cold.server)
        wire.feed(QUALITY)
        await until(lambda: cold.tier.reads.waiting)
        other.feed(request("SET", keys[0], b"x" * 70_001))
        cold.tier.reads.open()
        meter.gate.set()
        (found,) = await replies(wire, 1)
        assert found[found.index(b"pages") + 1] == 1
        assert meter.given == [1]


async def test_a_namespace_that_goes_in_the_same_turn_has_no_pages(meter: Meter) -> None:
    async with cold_server() as cold:
        put_pages(cold, 0)
        wire, other = FakeWire(cold.server), FakeWire(cold.server)
        other.feed(request("KV.SCHEMA", "DEL", "ns"))
        wire.feed(QUALITY)
        (found,) = await replies(wire, 1)
        assert "has no pages to measure" in str(found)
        assert not wire.is_aborted


async def test_pages_behind_many_other_keys_are_found(
    meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "STEP", 10)
    monkeypatch.setattr(tuning, "LOOK_KEYS_MAX", 20)
    meter.gate.set()
    async with cold_server() as cold:
        for number in range(100):
            cold.cache.put(b"other:%d" % number, b"x")
        put_pages(cold, 2)
        wire = FakeWire(cold.server)
        wire.feed(QUALITY)
        (found,) = await replies(wire, 1)
        assert found[found.index(b"pages") + 1] == 2


async def test_tails_and_parts_are_not_measured_even_when_they_are_as_long_as_pages(
    meter: Meter,
) -> None:
    meter.gate.set()
    async with cold_server() as cold:
        put_pages(cold, 2)
        page = b"ns:" + b"0" * 64
        for suffix in (b".g.full", b".s.mamba", b".logits"):
            cold.cache.put(page + suffix, PAGE, Put("kvpage", parent=page))
        tail = Put("kvpage", tokens=5)
        cold.cache.put(page, bytes(SHAPE.page_bytes // SHAPE.tokens * 5), tail)
        wire = FakeWire(cold.server)
        wire.feed(QUALITY)
        (found,) = await replies(wire, 1)
        assert found[found.index(b"pages") + 1] == 2
        assert meter.given == [2]


async def test_codecs_are_chosen_and_pages_of_other_namespaces_do_not_count(
    meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "LOOK_S", 0.01)
    meter.gate.set()
    auto: dict[str, Any] = {"codecs": ((b"nvme", b"auto"),), "error_max": 0.15}
    async with cold_server() as cold, anyio.create_task_group() as tasks:
        put_pages(cold, tuning.PAGES_MIN)
        namespaces = cold.cache.namespaces
        namespaces.put(Schema(b"ns", SHAPE, **auto))
        namespaces.put(Schema(b"empty", SHAPE, **auto))
        tasks.start_soon(tuning.tune, cold.server)
        await until(lambda: namespaces.chosen)
        namespaces.put(Schema(b"ns", SHAPE, **auto))  # as every worker does that starts
        await anyio.sleep(0.1)
        assert list(namespaces.chosen) == [b"ns"]
        assert len(meter.given) == 1
        tasks.cancel_scope.cancel()
