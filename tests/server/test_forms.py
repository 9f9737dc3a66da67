"""Pages asked for in another form: who holds what, and what the client is told when things change."""

import threading
from collections.abc import Callable

import anyio
import ml_dtypes
import numpy as np
import pytest

from respkv.engine.entry import Put
from respkv.engine.namespaces import Schema
from respkv.kernels.container import read_head
from respkv.page import Geometry
from tests.fakes import FakeWire
from tests.server.cold import MIB, Cold, cold_server, replies, settle
from tests.server.raw import pipeline, request

pytestmark = pytest.mark.anyio

SHAPE = Geometry(2, 4, 64, 64, "bfloat16")  # pages of 128 KiB
PAGE = np.linspace(-1, 1, SHAPE.page_bytes // 2).astype(ml_dtypes.bfloat16).tobytes()
WIDE = np.frombuffer(PAGE, ml_dtypes.bfloat16).astype(np.float32).tobytes()


def put_pages(cold: Cold, count: int, shape: Geometry = SHAPE) -> list[bytes]:
    """Store equal pages of a namespace; return their keys."""
    cold.cache.namespaces.put(Schema(b"ns", shape))
    keys = [b"ns:%d" % number for number in range(count)]
    for key in keys:
        cold.cache.put(key, PAGE, Put("kvpage"))
    return keys


async def until(is_so: Callable[[], object]) -> None:
    with anyio.fail_after(60):
        for _ in iter(lambda: bool(is_so()), True):
            await anyio.sleep(0.002)


async def test_a_client_that_leaves_while_pages_are_prepared_leaves_no_share_behind() -> None:
    async with cold_server() as cold:
        keys = put_pages(cold, 4)
        await cold.chill()
        cold.tier.reads.shut()
        wire = FakeWire(cold.server)
        wire.feed(request("KV.MGET", 4, *keys, "AS", "float32"))
        await until(lambda: len(cold.tier.reads.waiting) >= 3)
        assert cold.server.budget.used
        cold.tier.reads.let(keys[0])
        await settle()
        await until(lambda: len(wire.sent) > len(WIDE))
        wire.lose()
        await settle()
        assert cold.server.budget.used == 0


async def test_a_muted_array_leaves_nothing_on_the_wire() -> None:
    async with cold_server() as cold:
        keys = put_pages(cold, 3)
        wire = FakeWire(cold.server)
        for form in ("raw", "float32"):
            mget = ("KV.MGET", 3, *keys, "AS", form)
            wire.feed(pipeline([("CLIENT", "REPLY", "SKIP"), mget, ("PING",)]))
            assert await replies(wire, 1) == [b"PONG"]


async def test_a_schema_that_goes_meanwhile_makes_its_pages_absent_and_breaks_no_array() -> None:
    async with cold_server() as cold:
        keys = put_pages(cold, 2)
        cold.tier.reads.shut()
        await cold.chill(keys[0])
        wire = FakeWire(cold.server)
        wire.feed(pipeline([("KV.MGET", 2, *keys, "AS", "raw"), ("PING",)]))
        await settle()
        cold.cache.namespaces.drop(b"ns")
        cold.tier.reads.open()
        pages, pong = await replies(wire, 2)
        assert (len(pages), pages[0], pong) == (2, None, b"PONG")


async def test_a_page_in_memory_stays_there_for_an_array_until_it_is_sent() -> None:
    async with cold_server() as cold:
        keys = put_pages(cold, 2)
        await cold.chill(keys[0])
        cold.tier.reads.shut()
        wire = FakeWire(cold.server)
        wire.feed(request("KV.MGET", 2, *keys, "AS", "raw"))
        await until(lambda: cold.tier.reads.waiting)
        await cold.server.mover.drain(60)  # type: ignore[union-attr]
        cold.cache.demote(cold.cache.entries[keys[1]])
        cold.tier.reads.open()
        ((first, second),) = await replies(wire, 1)
        assert first[-len(PAGE) :] == second[-len(PAGE) :] == PAGE


@pytest.mark.parametrize("form", ["raw", "float32"])
async def test_what_was_overwritten_while_it_was_loaded_is_no_page_of_its_old_shape(
    form: str,
) -> None:
    async with cold_server() as cold:
        (key,) = put_pages(cold, 1)
        await cold.chill()
        cold.tier.reads.shut()
        wire, other = FakeWire(cold.server), FakeWire(cold.server)
        wire.feed(request("KV.GET", key, "AS", form))
        await until(lambda: cold.tier.reads.waiting)
        other.feed(request("SET", key, b"x" * 70_001))
        cold.tier.reads.open()
        (answer,) = await replies(wire, 1)
        assert "AS needs a page" in str(answer)


async def test_a_page_of_a_new_shape_has_the_head_of_that() -> None:
    async with cold_server() as cold:
        (key,) = put_pages(cold, 1)
        await cold.chill()
        cold.tier.reads.shut()
        wire = FakeWire(cold.server)
        wire.feed(request("KV.GET", key, "AS", "raw"))
        await until(lambda: cold.tier.reads.waiting)
        cold.cache.namespaces.drop(b"ns")
        shape = Geometry(4, 4, 64, 32, "bfloat16")
        cold.cache.namespaces.put(Schema(b"ns", shape))
        cold.tier.reads.open()
        (answer,) = await replies(wire, 1)
        assert read_head(answer).geometry == shape


async def test_a_deadline_is_for_what_has_to_be_loaded_and_the_load_goes_on() -> None:
    async with cold_server() as cold:
        keys = put_pages(cold, 2)
        await cold.chill(keys[0])
        cold.tier.reads.shut()
        wire = FakeWire(cold.server)
        gets = [("KV.GET", key, "AS", "float32", "DEADLINE", 0) for key in keys]
        mget = request("KV.MGET", 2, *keys, "DEADLINE", 1, "AS", "float32")
        wire.feed(pipeline(gets) + mget)
        found = await replies(wire, 3)
        assert found == [None, WIDE, [None, WIDE]]
        cold.tier.reads.open()
        await until(lambda: not cold.is_cold(keys[0]))
        await settle()
        assert not cold.is_cold(keys[0]), "it stays for whoever asks again"


async def test_what_conversions_make_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cold_server(maxmemory=9 * MIB) as cold:
        keys = put_pages(cold, 8)
        gate = threading.Event()
        begun: list[int] = []

        def slow(payload: memoryview, source: str, target: str) -> memoryview:
            begun.append(len(payload))
            gate.wait(60)
            return memoryview(bytes(2 * len(payload)))

        monkeypatch.setattr("respkv.kernels.dtypes.convert", slow)
        wire = FakeWire(cold.server)
        wire.feed(request("KV.MGET", 8, *keys, "AS", "float32"))
        await until(lambda: begun)
        made = 2 * SHAPE.page_bytes
        assert cold.server.budget.used >= made
        assert cold.server.budget.used % made == 0
        gate.set()
        (pages,) = await replies(wire, 1)
        assert len(pages) == 8


async def test_what_is_said_twice_is_refused() -> None:
    async with cold_server() as cold:
        (key,) = put_pages(cold, 1)
        wire = FakeWire(cold.server)
        shape = ("LAYERS", 2, "HEADS", 4, "DIM", 64, "TOKENS", 64, "DTYPE", "bfloat16")
        codecs = ("CODEC", "cpu", "raw", "CODEC", "CPU", "raw")
        wire.feed(request("KV.GET", key, "AS", "raw", "AS", "float32"))
        wire.feed(request("KV.GET", key, "LAYERS", 0, 1, "LAYERS", 1, 1))
        wire.feed(request("KV.SCHEMA", "SET", "ns", *shape, *codecs))
        first, second, third = map(str, await replies(wire, 3))
        assert "unexpected option 'AS'" in first
        assert "unexpected option 'LAYERS'" in second
        assert "CODEC cpu is given twice" in third
