"""What only the asynchronous face has: tasks, cancellation, more than one loop."""

from collections.abc import Awaitable, Callable

import anyio
import anyio.lowlevel
import pytest

from respkv.client import AsyncClient
from respkv.errors import TimedOut
from tests.redis_server import RedisServer

pytestmark = pytest.mark.anyio


async def test_tasks_share_a_client(redis: RedisServer) -> None:
    async with AsyncClient(redis.url, pool_max=4) as client:

        async def work(name: int) -> None:
            for index in range(20):
                text = f"{name}:{index}".encode()
                assert await client.command("ECHO", text) == text

        async with anyio.create_task_group() as tasks:
            for name in range(20):
                tasks.start_soon(work, name)


async def cancelled(call: Callable[[], Awaitable[object]], seconds: float) -> bool:
    with anyio.move_on_after(seconds) as scope:
        await call()
    return scope.cancelled_caught


async def test_a_cancelled_call_leaves_no_answer_to_the_next(redis: RedisServer) -> None:
    async with AsyncClient(redis.url, pool_max=1, name="cancelled") as client:
        await client.ping()
        assert await cancelled(lambda: client.command("BLPOP", "queue", 5), 0.1)
        assert "name=cancelled" not in redis.cli("CLIENT", "LIST"), "its connection is closed"
        redis.cli("LPUSH", "queue", "late")
        assert await client.command("ECHO", "mine") == b"mine"


async def test_a_call_may_be_cancelled_at_any_time_and_gives_its_seat_back(
    redis: RedisServer,
) -> None:
    payload = bytes(range(256)) * 16384
    async with AsyncClient(redis.url, pool_max=2, timeout_s=60) as client:
        for step in range(40):
            await cancelled(lambda: client.set("key", payload), step * 0.0003)
            await cancelled(lambda: client.command("GET", "key"), step * 0.0003)
            pipeline = client.pipeline().command("SET", "key", payload).command("GET", "key")
            await cancelled(pipeline.execute, step * 0.0003)
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(client.command, "BLPOP", "queue", 60)
            with anyio.fail_after(60):
                # Both seats are there.
                while redis.cli("CLIENT", "LIST").count("cmd=blpop") < 2:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            redis.cli("LPUSH", "queue", "1", "2")
        assert await client.command("ECHO", "mine") == b"mine"


async def test_a_scope_that_is_cancelled_already_sends_nothing(redis: RedisServer) -> None:
    async with AsyncClient(redis.url) as client:
        await client.ping()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await client.set("key", "value")
        assert await client.exists("key") == 0


async def test_waiting_for_a_seat_can_be_cancelled_and_times_out(redis: RedisServer) -> None:
    async with AsyncClient(redis.url, pool_max=1, timeout_s=60) as client:
        await client.ping()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.command, "BLPOP", "queue", 60)
            await anyio.sleep(0.1)
            assert await cancelled(client.ping, 0.1)
            redis.cli("LPUSH", "queue", "x")
        await client.ping()
        seats = client._core.pool.seats
        await seats.acquire()
        with pytest.raises(TimedOut, match="all 1 connections stayed in use"):
            await client.within(0.3).ping()
        seats.release()
        await client.ping()


def test_a_client_may_go_from_one_loop_to_the_next(redis: RedisServer) -> None:
    client = AsyncClient(redis.url, name="wanderer")

    async def use() -> None:
        await client.ping()

    anyio.run(use)
    anyio.run(use)
    assert redis.cli("CLIENT", "LIST").count("name=wanderer") == 1
    anyio.run(client.close)


async def test_other_tasks_run_while_calls_are_answered_at_once(redis: RedisServer) -> None:
    turns = seen = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with AsyncClient(redis.url) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        for _ in range(50):
            await client.ping()
        seen = turns
        tasks.cancel_scope.cancel()
    # Both are in every round of the scheduler that a call takes, each call takes at least one, and
    # in the last of them either may be the first. A client that keeps the loop lets nobody count.
    assert seen >= 49
