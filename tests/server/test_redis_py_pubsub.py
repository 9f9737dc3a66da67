"""redis-py's pub/sub objects against this server: sync and asyncio, RESP2 and RESP3."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio

from tests.server_process import ServerProcess

KEY = "ns:" + "ab" * 32
TIMEOUT_S = 60.0


@pytest.fixture(params=[2, 3], ids=["RESP2", "RESP3"])
def protocol(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def client(server: ServerProcess, protocol: int) -> Iterator[Any]:
    with redis.Redis(port=server.port, protocol=protocol) as opened:
        opened.flushall()
        yield opened


@pytest.fixture
def anyio_backend() -> str:
    """redis-py knows asyncio only."""
    return "asyncio"


@pytest.fixture
async def async_client(server: ServerProcess, protocol: int) -> AsyncIterator[Any]:
    async with redis.asyncio.Redis(port=server.port, protocol=protocol) as opened:
        await opened.flushall()
        yield opened


def message(kind: str, pattern: bytes | None, channel: bytes, data: object) -> dict[str, object]:
    return {"type": kind, "pattern": pattern, "channel": channel, "data": data}


def test_messages_and_patterns_arrive(client: Any) -> None:
    with client.pubsub() as listening:
        listening.subscribe("news", "other")
        listening.psubscribe("n*")
        got = [listening.get_message(timeout=TIMEOUT_S) for _ in range(3)]
        assert [(each["type"], each["data"]) for each in got] == [
            *[("subscribe", 1), ("subscribe", 2), ("psubscribe", 3)]
        ]
        assert client.publish("news", "hello") == 2
        assert client.publish("nobody", "hello") == 1
        assert client.publish("silence", "hello") == 0
        assert [listening.get_message(timeout=TIMEOUT_S) for _ in range(3)] == [
            message("message", None, b"news", b"hello"),
            message("pmessage", b"n*", b"news", b"hello"),
            message("pmessage", b"n*", b"nobody", b"hello"),
        ]
        assert listening.get_message(timeout=0.01) is None
        listening.unsubscribe("other")
        assert listening.get_message(timeout=TIMEOUT_S)["type"] == "unsubscribe"
        assert client.pubsub_numsub("news", "other") == [(b"news", 1), (b"other", 0)]
        assert client.pubsub_numpat() == 1
        assert client.pubsub_channels() == [b"news"]
        listening.ping()
        assert listening.get_message(timeout=TIMEOUT_S)["type"] == "pong"


def test_handlers_are_called_in_a_thread(client: Any) -> None:
    got: list[dict[str, Any]] = []
    with client.pubsub() as listening:
        listening.subscribe(**{"kv:events:ns": got.append})
        while client.pubsub_numsub("kv:events:ns") != [(b"kv:events:ns", 1)]:
            pass
        thread = listening.run_in_thread(sleep_time=0.01)
        try:
            client.execute_command("KV.PUT", KEY, b"x" * 100)
            client.delete(KEY)
            while len(got) < 2:
                pass
        finally:
            thread.stop()
            thread.join()
    kinds = [json.loads(each["data"])["event"] for each in got]
    assert kinds == ["stored", "removed"]


def test_many_messages_keep_their_order(client: Any) -> None:
    with client.pubsub(ignore_subscribe_messages=True) as listening:
        listening.subscribe("many")
        while not client.publish("many", "start"):
            pass
        with client.pipeline(transaction=False) as pipeline:
            for number in range(3000):
                pipeline.publish("many", number)
            assert pipeline.execute() == [1] * 3000
        numbers: list[int] = []
        while len(numbers) < 3000:
            found = listening.get_message(timeout=TIMEOUT_S)
            if found is not None and found["data"] != b"start":
                numbers.append(int(found["data"]))
    assert numbers == list(range(3000))


@pytest.mark.anyio
async def test_the_asynchronous_client_listens_too(async_client: Any) -> None:
    async with async_client.pubsub(ignore_subscribe_messages=True) as listening:
        await listening.subscribe("news")
        await listening.psubscribe("kv:events:*")
        while await async_client.pubsub_numpat() == 0:
            pass
        assert await async_client.publish("news", "hello") == 1
        await async_client.execute_command("KV.PUT", KEY, b"x" * 100)
        got: list[Any] = []
        async for each in listening.listen():
            got.append(each)
            if len(got) == 2:
                break
        assert got[0] == message("message", None, b"news", b"hello")
        assert got[1]["channel"] == b"kv:events:ns"
        assert json.loads(got[1]["data"])["key"] == KEY
        await listening.unsubscribe()
        await listening.punsubscribe()
