"""What both faces do, against the real redis-server."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from respkv.client.requests import NOT_OFFERED
from respkv.errors import ConfigError, ConnectionLost, ServerError, TimedOut
from tests.redis_server import RedisServer

Connect = Callable[..., Any]

MIB = 1 << 20


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """Return bytes of which no two stretches are alike, so that a misplaced one shows."""
    words = bytes((index * 7 + index // 251 + seed) % 256 for index in range(65521))
    return (words * (nbytes // len(words) + 1))[:nbytes]


@pytest.mark.parametrize("protocol", [2, 3])
def test_values_come_back_as_they_were(connect: Connect, redis: RedisServer, protocol: int) -> None:
    client = connect(redis.url, protocol=protocol)
    client.ping()
    assert client.set("key", "value") is True
    assert client.set("key", "other", nx=True) is False
    assert client.command("GET", b"key") == b"value"
    assert client.command("GET", "nothing") is None
    assert client.command("INCR", "number") == 1
    assert (client.exists("key", "number", "nothing"), client.delete("key", "nothing")) == (2, 1)
    client.command("HSET", "hash", "field", 1.5)
    expected: Any = {b"field": b"1.5"} if protocol == 3 else [b"field", b"1.5"]
    assert client.command("HGETALL", "hash") == expected
    assert client.info("server")["tcp_port"] == str(redis.port)
    assert "connected_clients" in client.info()


def test_a_key_may_expire(connect: Connect, redis: RedisServer) -> None:
    client = connect(redis.url)
    client.set("key", "value", px_ms=60_000)
    assert 0 < client.command("PTTL", "key") <= 60_000


@pytest.mark.parametrize("where", ["url", "tcp_url"])
def test_32_mib_go_out_and_come_back(connect: Connect, redis: RedisServer, where: str) -> None:
    client = connect(getattr(redis, where))
    payload = pattern(32 * MIB)
    client.set("big", memoryview(payload))
    page = client.command("GET", "big")
    assert isinstance(page, memoryview)
    assert page == payload
    memory = bytearray(33 * MIB)
    assert client.command("GET", "big", into=memory).obj is memory
    assert memory[: 32 * MIB] == payload
    assert not any(memory[32 * MIB :])


def test_a_small_value_lands_in_the_callers_memory_too(
    connect: Connect, redis: RedisServer
) -> None:
    client = connect(redis.url)
    client.set("key", "value")
    memory = bytearray(8)
    assert bytes(client.command("GET", "key", into=memory)) == b"value"
    assert memory == b"value\0\0\0"
    assert client.command("GET", "nothing", into=memory) is None


def test_memory_that_is_too_small_is_an_error_and_the_connection_stays_good(
    connect: Connect, redis: RedisServer
) -> None:
    client = connect(redis.url, pool_max=1)
    client.set("big", bytes(MIB))
    before = client.command("CLIENT", "ID")
    for _ in range(2):
        with pytest.raises(ValueError, match="into has 10 bytes, the reply 1048576"):
            client.command("GET", "big", into=bytearray(10))
    assert client.command("ECHO", "in step") == b"in step"
    assert client.command("CLIENT", "ID") == before + 1, "CLIENT parts, GET does not"


def test_several_large_values_in_one_reply(connect: Connect, redis: RedisServer) -> None:
    client = connect(redis.url)
    values = [pattern(MIB, seed) for seed in range(5)]
    for index, value in enumerate(values):
        client.set(f"k{index}", value)
    got = client.command("MGET", "k0", "k1", "none", "k2", "k3", "k4")
    assert got[2] is None
    assert [bytes(page) for page in got if page is not None] == values
    script = "return {redis.call('get', KEYS[1]), {redis.call('get', KEYS[2]), 7}}"
    first, (second, seven) = client.command("EVAL", script, 2, "k0", "k1")
    assert (first, second, seven) == (values[0], values[1], 7)


def test_a_servers_error_has_its_word_and_its_message(connect: Connect, redis: RedisServer) -> None:
    client = connect(redis.url)
    client.command("LPUSH", "list", "x")
    with pytest.raises(ServerError) as caught:
        client.command("INCR", "list")
    assert caught.value.word == "WRONGTYPE"
    assert "wrong kind of value" in caught.value.message
    with pytest.raises(ServerError, match="unknown command"):
        client.match(["key"])


def test_a_pipeline_answers_in_order(connect: Connect, redis: RedisServer) -> None:
    client = connect(redis.url)
    pipeline = client.pipeline()
    for index in range(5000):
        pipeline.command("SET", index, index).command("GET", index)
    assert pipeline.execute()[1::2] == [str(index).encode() for index in range(5000)]
    assert pipeline.execute() == [], "it forgets what it has sent"


def test_an_error_in_a_pipeline_is_raised_after_all_was_read_or_returned(
    connect: Connect, redis: RedisServer
) -> None:
    client = connect(redis.url, pool_max=1)
    client.set("key", "text")
    pipeline = client.pipeline()
    pipeline.command("INCR", "key").command("SET", "after", "1")
    with pytest.raises(ServerError, match="not an integer"):
        pipeline.execute()
    assert client.command("GET", "after") == b"1"
    pipeline.command("INCR", "key").command("PING")
    error, pong = pipeline.execute(raise_on_error=False)
    assert isinstance(error, ServerError)
    assert pong == b"PONG"


def test_a_transaction_may_go_in_a_pipeline(connect: Connect, redis: RedisServer) -> None:
    client = connect(redis.url)
    pipeline = client.pipeline()
    pipeline.command("MULTI").command("INCR", "n").command("LPUSH", "n", 1).command("EXEC")
    *queued, results = pipeline.execute()
    assert queued == [b"OK", b"QUEUED", b"QUEUED"]
    assert results[0] == 1
    assert isinstance(results[1], ServerError)


@pytest.mark.parametrize("where", ["url", "tcp_url"])
def test_large_payloads_both_ways_at_once_do_not_deadlock(
    connect: Connect, redis: RedisServer, where: str
) -> None:
    # More than the sockets and the server's input buffer hold, in both directions.
    client = connect(getattr(redis, where), timeout_s=60)
    payload = pattern(4 * MIB)
    pipeline = client.pipeline()
    for _ in range(12):
        pipeline.command("ECHO", payload)
    assert all(reply == payload for reply in pipeline.execute())


def test_a_call_that_times_out_leaves_no_answer_to_the_next(
    connect: Connect, redis: RedisServer
) -> None:
    client = connect(redis.url, pool_max=1, timeout_s=60)
    begun = time.monotonic()
    with pytest.raises(TimedOut, match=str(redis.path)):
        client.within(0.2).command("BLPOP", "nothing", 0)
    assert time.monotonic() - begun < 30
    redis.cli("LPUSH", "nothing", "late")
    assert client.command("ECHO", "mine") == b"mine"


def test_a_server_that_hangs_is_timed_out(connect: Connect, redis: RedisServer) -> None:
    client, hasty = connect(redis.url), connect(redis.url, timeout_s=0.2)
    client.ping()
    with redis.hanging():
        for each in (hasty, client.within(0.2)):
            with pytest.raises(TimedOut):
                each.ping()
    client.ping()


def test_a_push_is_not_taken_for_a_reply(connect: Connect, redis: RedisServer) -> None:
    client = connect(redis.url)
    pipeline = client.pipeline()
    pipeline.command("CLIENT", "TRACKING", "ON")
    for _ in range(3):
        pipeline.command("GET", "key").command("SET", "key", "value").command("ECHO", "x")
    assert pipeline.execute()[1:] == [None, b"OK", b"x", *[b"value", b"OK", b"x"] * 2]


@pytest.mark.parametrize("name", sorted(NOT_OFFERED))
def test_a_command_that_takes_over_its_connection_is_refused(
    connect: Connect, redis: RedisServer, name: bytes
) -> None:
    client = connect(redis.url)
    with pytest.raises(ValueError, match="takes over"):
        client.command(name.decode().lower(), "x")
    with pytest.raises(ValueError, match="takes over"):
        client.pipeline().command(name, "x")


def test_state_left_on_a_connection_is_nobody_elses(connect: Connect, redis: RedisServer) -> None:
    client = connect(redis.url, pool_max=1)
    client.set("key", "here")
    assert client.command("SELECT", 3) == b"OK"
    assert client.command("GET", "key") == b"here"
    assert client.command("MULTI") == b"OK"
    assert client.command("GET", "key") == b"here"


def test_calls_share_no_more_connections_than_allowed(connect: Connect, redis: RedisServer) -> None:
    client = connect(redis.url, pool_max=3, name="bounded")
    failures: list[BaseException] = []

    def work(name: int) -> None:
        try:
            for index in range(40):
                text = f"{name}:{index}".encode()
                assert client.command("ECHO", text) == text
                client.command("INCR", "count")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert client.command("GET", "count") == b"320"
    assert 1 <= redis.cli("CLIENT", "LIST").count("name=bounded") <= 3


def test_a_call_waits_for_its_turn(connect: Connect, redis: RedisServer) -> None:
    client = connect(redis.url, pool_max=1)
    with ThreadPoolExecutor(2) as threads:
        holding = threads.submit(client.command, "BLPOP", "queue", 0)
        while "cmd=blpop" not in redis.cli("CLIENT", "LIST"):
            time.sleep(0.01)
        waiting = threads.submit(client.ping)
        time.sleep(0.1)
        assert not waiting.done()
        redis.cli("LPUSH", "queue", "x")
        assert holding.result(60) == [b"queue", b"x"]
        waiting.result(60)


def test_idle_connections_are_reused_last_in_first_out(
    connect: Connect, redis: RedisServer
) -> None:
    client = connect(redis.url, name="lifo")
    for _ in range(10):
        client.ping()
    assert redis.cli("CLIENT", "LIST").count("name=lifo") == 1


def test_a_closed_client_answers_no_more(connect: Connect, redis: RedisServer) -> None:
    client = connect(redis.url, name="closing")
    client.ping()
    client.close()
    with pytest.raises(ConnectionLost, match="closed"):
        client.ping()
    assert "name=closing" not in redis.cli("CLIENT", "LIST")


def test_a_client_within_a_time_has_the_same_connections_and_waits_no_longer(
    connect: Connect, redis: RedisServer
) -> None:
    client = connect(redis.url, timeout_s=60)
    other = client.within(50)
    for each in (client, other, client, other):
        each.ping()
    assert len(client._core.pool._open) == 1
    hasty = client.within(0.1)
    with redis.hanging(), pytest.raises(TimedOut):
        hasty.ping()
    assert client.command("ECHO", "patient") == b"patient"
    assert connect(redis.url, timeout_s=5).within(60)._core.settings.timeout_s == 5
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="timeout_s"):
            client.within(seconds)
    client.close()
    with pytest.raises(ConnectionLost):
        hasty.ping()
