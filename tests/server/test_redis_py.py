"""redis-py as applications use it: sync and asyncio, RESP2 and RESP3."""

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
import redis
import redis.asyncio

from tests.conftest import StartServer
from tests.server_process import ServerProcess

BIG = 32 << 20


@pytest.fixture(params=[2, 3], ids=["RESP2", "RESP3"])
def protocol(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def client(server: ServerProcess, protocol: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=server.port, protocol=protocol) as opened:
        opened.flushall()
        yield opened


@pytest.fixture
def anyio_backend() -> str:
    """redis-py knows asyncio only."""
    return "asyncio"


@pytest.fixture
async def async_client(server: ServerProcess, protocol: int) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis(
        port=server.port, protocol=protocol, max_connections=150
    ) as opened:
        await opened.flushall()
        yield opened


def test_strings_and_ttls(client: Any) -> None:
    assert client.set("k", "v", ex=100)
    assert client.get("k") == b"v"
    assert client.set("k", "w", nx=True) is None
    assert client.set("k", "w", xx=True, get=True) == b"v"
    assert client.ttl("k") == -1
    assert client.expire("k", 100)
    assert client.expire("k", 50, nx=True) == 0
    assert 0 < client.ttl("k") <= 100
    assert 0 < client.pttl("k") <= 100_000
    assert client.expiretime("k") > 1_700_000_000
    assert client.persist("k")
    assert client.ttl("absent") == -2
    assert client.getex("k", px=5000) == b"w"
    assert client.getdel("k") == b"w"
    assert client.exists("k") == 0
    assert client.setnx("k", 1)
    assert client.getset("k", "2") == b"1"
    assert client.strlen("k") == 1
    assert client.type("k") == b"string"


def test_many_keys(client: Any) -> None:
    values = {f"key-{each}": f"value-{each}" for each in range(100)}
    assert client.mset(values)
    assert client.mget(list(values)) == [value.encode() for value in values.values()]
    assert client.mget("key-1", "absent") == [b"value-1", None]
    assert client.msetnx({"key-1": "x", "new": "y"}) in (0, False)
    assert client.dbsize() == 100
    assert set(client.scan_iter(count=7)) == {key.encode() for key in values}
    assert set(client.scan_iter(match="key-9?")) == {b"key-%d" % each for each in range(90, 100)}
    assert set(client.keys("key-*")) == {key.encode() for key in values}
    assert client.delete("key-1", "key-2", "absent") == 2
    assert client.unlink("key-3") == 1
    assert client.touch("key-4", "absent") == 1
    assert client.randomkey().startswith(b"key-")
    assert client.memory_usage("key-4") > 0
    assert client.object("encoding", "key-4") == b"embstr"
    assert client.flushdb()


def test_a_pipeline_answers_in_order(client: Any) -> None:
    with client.pipeline(transaction=False) as pipe:
        for each in range(2000):
            pipe.set(f"k{each}", b"v" * each)
            pipe.strlen(f"k{each}")
        pipe.get("absent")
        replies = pipe.execute()
    assert replies[1::2] == list(range(2000))
    assert replies[-1] is None
    with client.pipeline(transaction=False) as pipe:
        pipe.set("k", "v").execute_command("BOGUS").get("k")
        replies = pipe.execute(raise_on_error=False)
    assert replies[0] is True
    assert isinstance(replies[1], redis.ResponseError)
    assert replies[2] == b"v"


def test_a_value_of_32_mib(client: Any) -> None:
    value = os.urandom(BIG)
    assert client.set("big", value)
    assert client.get("big") == value
    assert client.mget("big", "absent", "big") == [value, None, value]
    assert client.strlen("big") == BIG
    assert client.delete("big") == 1


def test_what_a_dashboard_asks(client: Any, server: ServerProcess, protocol: int) -> None:
    client.client_setname("dashboard")
    assert client.client_getname() in (b"dashboard", "dashboard")
    mine = client.client_id()
    listed = {int(each["id"]): each for each in client.client_list()}
    assert listed[mine]["name"] == "dashboard"
    assert listed[mine]["resp"] == str(protocol)
    assert listed[mine]["lib-name"].startswith("redis-py")
    assert client.client_info()["id"] == mine
    config = client.config_get("max*")
    assert config["maxmemory"] == str(256 << 20)
    assert config["maxmemory-policy"]
    client.set("k", "v", ex=100)
    info = client.info()
    assert info["role"] == "master"
    assert info["loading"] == 0
    assert info["redis_version"].startswith("7.")
    assert info["used_memory"] <= info["maxmemory"] + (64 << 20)
    assert info["db0"] == {"keys": 1, "expires": 1, "avg_ttl": info["db0"]["avg_ttl"]}
    assert client.info("replication")["role"] == "master"
    assert set(client.info("memory")) >= {"used_memory", "used_memory_rss", "maxmemory"}
    assert client.module_list() == []
    seconds, micros = client.time()
    assert seconds > 1_700_000_000
    assert 0 <= micros < 1_000_000
    assert len(client.command()) == client.command_count()


def test_settings_change_and_are_put_back(client: Any) -> None:
    before = client.config_get("timeout")["timeout"]
    assert client.config_set("timeout", 300)
    assert client.config_get("timeout") == {"timeout": "300"}
    assert client.config_set("timeout", before)
    with pytest.raises(redis.ResponseError, match="CONFIG SET failed"):
        client.config_set("timeout", "soon")
    assert client.config_resetstat()


def test_a_lost_connection_is_found_by_the_health_check(server: ServerProcess) -> None:
    with (
        redis.Redis(port=server.port, health_check_interval=1) as client,
        redis.Redis(port=server.port) as other,
    ):
        mine = client.client_id()
        assert other.client_kill_filter(_id=str(mine)) == 1
        assert client.ping()
        assert client.client_id() != mine


def test_a_password_in_the_url(start_server: StartServer, protocol: int) -> None:
    server = start_server(requirepass="päss word")
    url = f"redis://:p%C3%A4ss%20word@127.0.0.1:{server.port}/0?protocol={protocol}"
    with redis.Redis.from_url(url) as client:
        assert client.set("k", "v")
    with redis.Redis.from_url(url.replace("word", "wort")) as client:
        with pytest.raises(redis.AuthenticationError):
            client.get("k")


def test_a_unix_socket(server: ServerProcess, protocol: int) -> None:
    with redis.Redis(unix_socket_path=server.unixsocket, protocol=protocol) as client:
        assert client.set("k", "v")
        assert client.get("k") == b"v"


@pytest.mark.anyio
async def test_asyncio_strings_ttls_and_pipelines(async_client: Any) -> None:
    assert await async_client.set("k", "v", ex=100)
    assert await async_client.get("k") == b"v"
    assert 0 < await async_client.ttl("k") <= 100
    assert await async_client.mset({"a": 1, "b": 2})
    assert await async_client.mget("a", "absent", "b") == [b"1", None, b"2"]
    assert {key async for key in async_client.scan_iter(count=1)} == {b"k", b"a", b"b"}
    async with async_client.pipeline(transaction=False) as pipe:
        for each in range(500):
            pipe.set(f"k{each}", each).get(f"k{each}")
        replies = await pipe.execute()
    assert replies[1::2] == [b"%d" % each for each in range(500)]
    assert (await async_client.info())["loading"] == 0
    assert await async_client.client_list()
    assert await async_client.config_get("maxmemory")


@pytest.mark.anyio
async def test_asyncio_150_connections_and_a_32_mib_value(async_client: Any) -> None:
    """LMCache's redis:// connector opens as many."""
    value = os.urandom(BIG)
    assert await async_client.set("big", value)
    assert await async_client.get("big") == value

    async def write_and_read(number: int) -> None:
        assert await async_client.set(f"k{number}", b"%d" % number * 1000)
        assert await async_client.get(f"k{number}") == b"%d" % number * 1000

    async with anyio.create_task_group() as tasks:
        for each in range(150):
            tasks.start_soon(write_and_read, each)
    assert await async_client.dbsize() == 151
