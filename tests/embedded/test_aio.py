"""The embedded engine in the event loop that opens it, asyncio's and trio's."""

import time
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

import respkv
from respkv.client import AsyncClient
from respkv.embedded import AsyncEmbeddedCache
from respkv.errors import CacheError, ConfigError, ConnectionLost, ServerError
from tests.client.pages import payload

pytestmark = pytest.mark.anyio

MIB = 1 << 20


def small(**settings: object) -> AsyncEmbeddedCache:
    return respkv.open(**{"maxmemory": "16mb", "prefault": False, **settings})  # type: ignore[arg-type]


async def test_it_is_a_client() -> None:
    async with small() as cache:
        assert isinstance(cache, AsyncClient)
        await cache.put("page", payload(1, 5 * MIB))
        assert bytes(await cache.get("page") or b"") == payload(1, 5 * MIB)
        async with cache.lease(["page"]) as lease:
            assert bytes(lease.pages[0] or b"") == payload(1, 5 * MIB)
        async with cache.reserve("other", 1000) as slot:
            slot.view[:] = payload(2, 1000)
            assert await slot.commit() is True
        assert bytes(await cache.get("other") or b"") == payload(2, 1000)
    with pytest.raises(ConnectionLost, match="closed"):
        await cache.ping()


async def test_a_call_before_it_is_open_says_so() -> None:
    with pytest.raises(ConnectionLost, match="not open yet: async with"):
        await small().ping()


async def test_it_is_opened_once_and_closing_it_before_does_nothing() -> None:
    cache = small()
    await cache.close()
    async with cache:
        await cache.ping()
        with pytest.raises(CacheError, match=r"was opened before; respkv\.open makes another"):
            await cache.__aenter__()
        await cache.ping()
    with pytest.raises(CacheError, match="was opened before"):
        async with cache:
            raise AssertionError("it was opened")


async def test_a_wrong_setting_is_told_before_anything_is_opened() -> None:
    with pytest.raises(ConfigError, match="did you mean maxmemory"):
        respkv.open(maxmemry="1gb")


async def test_what_cannot_start_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="nvme-path"):
        async with small(nvme_path=tmp_path / "no" / "where", nvme_bytes="16mb"):
            raise AssertionError("it was opened")


async def test_an_error_of_the_block_is_not_wrapped() -> None:
    async def fail() -> None:
        async with small() as cache:
            await cache.ping()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()


async def test_a_cancelled_block_still_writes_what_only_memory_held(tmp_path: Path) -> None:
    settings = {"nvme_path": tmp_path / "nvme", "nvme_bytes": "32mb"}
    with anyio.move_on_after(30) as scope:
        async with small(**settings) as cache:
            await cache.put("page", payload(1, MIB))
            scope.cancel()
            await anyio.sleep(10)
    assert scope.cancelled_caught
    async with small(**settings) as cache:
        assert bytes(await cache.get("page") or b"") == payload(1, MIB)


async def test_the_disk_tier_needs_asyncio(tmp_path: Path, anyio_backend: str) -> None:
    settings = {"disk_path": tmp_path / "disk", "disk_bytes": "64mb"}
    if anyio_backend == "trio":
        with pytest.raises(ConfigError, match="use open_sync"):
            await small(**settings).__aenter__()
        return
    async with small(**settings) as cache:
        await cache.put("page", payload(1, MIB))
    async with small(**settings) as cache:
        assert bytes(await cache.get("page") or b"") == payload(1, MIB)


async def test_a_call_that_is_cancelled_leaves_the_engine_good() -> None:
    async with small(reserve_timeout=20_000) as cache:
        await cache.put("first", payload(1, 8 * MIB))
        async with cache.lease(["first"]):
            with anyio.move_on_after(0.05) as scope:
                await cache.put("second", payload(2, 8 * MIB))
            assert scope.cancelled_caught
        await cache.put("second", payload(3, 8 * MIB))
        assert bytes(await cache.get("second") or b"") == payload(3, 8 * MIB)
        assert int((await cache.info())["kv_landings"]) == 0


async def test_tasks_share_it_and_have_turns() -> None:
    async with respkv.open(maxmemory="128mb", prefault=False) as cache:
        turns = 0
        is_over = False

        async def count() -> None:
            nonlocal turns
            while not is_over:
                turns += 1
                await anyio.lowlevel.checkpoint()

        async def work(number: int) -> None:
            for turn in range(10):
                value = payload(number * 10 + turn, 1000 * (1 + number * turn))
                await cache.put(f"page-{number}-{turn}", value)
                assert bytes(await cache.get(f"page-{number}-{turn}") or b"") == value

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            async with anyio.create_task_group() as workers:
                for number in range(8):
                    workers.start_soon(work, number)
            before = turns
            await cache.put("large", payload(1, 32 * MIB))
            await cache.get("large")
            assert turns >= before + 8, "others have a turn after every few MiB"
            is_over = True


async def test_messages_come() -> None:
    async with small() as cache, cache.listen("news") as messages:
        assert await messages.next(0.01) is None
        assert await cache.command("PUBLISH", "news", "x" * 200_000) == 1
        found = await messages.next(10)
        assert found is not None
        assert found.data == b"x" * 200_000


async def test_long_pipelines_do_not_wait_for_themselves() -> None:
    async with small() as cache:
        pipeline = cache.pipeline()
        for number in range(500):
            pipeline.command("SET", f"key{number}", payload(number, 20_000))
            pipeline.command("GET", f"key{number}")
        replies = await pipeline.execute()
        assert replies[1::2] == [payload(number, 20_000) for number in range(500)]


@pytest.mark.parametrize("seconds", [0, 0.001, 0.01, 0.03])
async def test_opening_may_be_cancelled_at_any_time(seconds: float, tmp_path: Path) -> None:
    settings = {"nvme_path": tmp_path / "nvme", "nvme_bytes": "16mb"}
    with anyio.move_on_after(seconds) as scope:
        async with small(**settings):
            await anyio.sleep(10)
    assert scope.cancelled_caught
    async with small(**settings) as cache:
        await cache.ping()


async def test_close_ends_it_early_and_leaving_does_no_harm() -> None:
    async with small() as cache:
        await cache.ping()
        await cache.close()
        await cache.close()
        with pytest.raises(ConnectionLost):
            await cache.ping()


async def test_a_crash_is_told_and_cancels_nobody() -> None:
    async def crash() -> None:
        raise ZeroDivisionError("a bug")

    async def use() -> None:
        async with small() as cache:
            server = cache._engine.server
            assert server is not None
            server.spawn(crash)
            with anyio.fail_after(60):
                await cache._ended.wait()
            with pytest.raises(ConnectionLost):
                await cache.ping()

    with pytest.raises(CacheError, match="has crashed") as caught:
        await use()
    assert isinstance(caught.value.__cause__, BaseExceptionGroup)


async def test_a_half_read_answer_does_not_delay_the_end() -> None:
    began = time.monotonic()
    async with small(shutdown_timeout=100) as cache:
        await cache.schema_set("half", layers=4, heads=2, dim=16, tokens=256, dtype="float16")
        await cache.seq.put("half", list(range(1024)), bytes(4 * 2 * 1024 * 2 * 16 * 2))
        layers = await cache.seq.get("half", list(range(1024)))
        await layers.__anext__()
    assert time.monotonic() - began < 60, "as long as shutdown-timeout lets an answer leave: 100 s"
    with pytest.raises(ConnectionLost):
        await layers.__anext__()


async def test_an_error_of_a_command_is_a_server_error() -> None:
    async with small() as cache:
        await cache.schema_set("m", layers=1, heads=1, dim=16, tokens=16, dtype="float16")
        with pytest.raises(ServerError, match="KVSCHEMA"):
            await cache.put("m:" + "0" * 64, b"too short")
