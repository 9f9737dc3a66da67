"""What each client library sends when it connects is answered as that library needs it.

The commands are those that the libraries were seen to send, or that their sources name; redis-cli,
redis-benchmark and redis-py are tested as programs.
"""

from typing import Any

import hiredis
import pytest

from respkv.wire.commands import COMMANDS
from tests.conftest import StartServer
from tests.server.conftest import Connect
from tests.server.raw import Raw, error_of

MAINT = ["CLIENT", "MAINT_NOTIFICATIONS", "ON", "moving-endpoint-type", "auto"]


def hello_of(reply: Any) -> dict[bytes, Any]:
    """Return the map of a HELLO, which RESP2 writes flat."""
    if isinstance(reply, list):
        reply = dict(zip(reply[::2], reply[1::2], strict=True))
    assert isinstance(reply, dict), reply
    assert {b"server", b"version", b"proto", b"id", b"mode", b"role", b"modules"} <= reply.keys()
    assert reply[b"server"] == b"redis"
    assert reply[b"role"] == b"master"
    assert reply[b"mode"] == b"standalone"
    return reply


def check_ok(raw: Raw, *requests: list[str]) -> None:
    replies = raw.ask_all(requests)
    assert replies == [b"OK"] * len(requests), replies


def fields_of(reply: bytes) -> dict[str, str]:
    lines = [line for line in reply.decode().split("\r\n") if line and not line.startswith("#")]
    return dict(line.split(":", 1) for line in lines)


def test_redis_py_8_and_coredis(raw: Raw) -> None:
    assert hello_of(raw.ask("HELLO", "3"))[b"proto"] == 3
    error_of(raw.ask(*MAINT))
    check_ok(
        raw,
        ["CLIENT", "SETNAME", "worker-1"],
        ["CLIENT", "SETINFO", "LIB-NAME", "redis-py"],
        ["CLIENT", "SETINFO", "LIB-VER", "8.1.0"],
        ["SELECT", "0"],
    )


def test_valkey_glide(raw: Raw) -> None:
    hello_of(raw.ask("HELLO", "3"))
    check_ok(
        raw,
        ["SELECT", "0"],
        ["CLIENT", "SETNAME", "glide"],
        ["CLIENT", "SETINFO", "LIB-NAME", "GlidePySync"],
        ["CLIENT", "SETINFO", "LIB-VER", "2.5.3"],
    )
    assert fields_of(raw.ask("INFO", "REPLICATION"))["role"] == "master"


def test_ioredis_writes_lower_case_and_waits_for_loading_0(raw: Raw) -> None:
    hello_of(raw.ask("hello", "3"))
    check_ok(
        raw,
        ["select", "0"],
        ["client", "setname", "io"],
        ["client", "SETINFO", "LIB-NAME", "ioredis"],
        ["client", "SETINFO", "LIB-VER", "6.0.0"],
    )
    assert fields_of(raw.ask("info"))["loading"] == "0"
    assert raw.ask("quit") == b"OK"
    assert raw.wait_closed() == b""


def test_iovalkey_speaks_resp2_and_asks_for_info_first(raw: Raw) -> None:
    assert raw.raw("info").startswith(b"$")
    assert fields_of(raw.ask("info"))["loading"] == "0"


def test_node_redis(raw: Raw) -> None:
    hello_of(raw.ask("HELLO", "3", "SETNAME", "node"))
    assert raw.ask("CLIENT", "GETNAME") == b"node"
    check_ok(
        raw,
        ["SELECT", "0"],
        ["CLIENT", "SETINFO", "LIB-VER", "6.3.0"],
        ["CLIENT", "SETINFO", "LIB-NAME", "node-redis"],
    )
    error_of(raw.ask(*MAINT))


def test_go_redis_pipelines_what_follows_hello(raw: Raw) -> None:
    hello_of(raw.ask("HELLO", "3"))
    replies = raw.ask_all(
        [
            ["SELECT", "0"],
            ["READONLY"],
            ["CLIENT", "SETNAME", "go"],
            ["CLIENT", "MAINT_NOTIFICATIONS", "ON", "MOVING-ENDPOINT-TYPE", "none"],
            ["CLIENT", "SETINFO", "LIB-NAME", "go-redis(,go1.23.1)"],
            ["CLIENT", "SETINFO", "LIB-VER", "9.22.0"],
        ]
    )
    assert [reply == b"OK" for reply in replies] == [True, False, True, False, True, True]


def test_go_redis_authenticates_in_hello_and_falls_back_to_auth(
    start_server: StartServer, connect: Connect
) -> None:
    server = start_server(requirepass="pw")
    raw = connect(server)
    hello_of(raw.ask("HELLO", "3", "AUTH", "default", "pw", "SETNAME", "go"))
    assert raw.ask("CLIENT", "GETNAME") == b"go"
    raw = connect(server)
    assert error_of(raw.ask("HELLO", "3")).startswith("NOAUTH HELLO must be called")
    assert raw.ask("AUTH", "default", "pw") == b"OK"
    assert raw.ask("PING") == b"PONG"


def test_jedis_sends_its_name_and_does_not_wait(raw: Raw) -> None:
    raw.send("HELLO", "3")
    raw.send("CLIENT", "SETNAME", "jedis")
    raw.send("CLIENT", "SETINFO", "LIB-NAME", "jedis")
    raw.send("CLIENT", "SETINFO", "LIB-VER", "7.5.0")
    hello_of(raw.next())
    assert [raw.next() for _ in range(3)] == [b"OK"] * 3


def test_lmcache_resp_gets_the_exact_bytes(start_server: StartServer, connect: Connect) -> None:
    """Its parser knows these replies and no others."""
    server = start_server(requirepass="pw")
    raw = connect(server)
    assert raw.raw("AUTH", "default", "pw") == b"+OK\r\n"
    value = bytes(range(256)) * 4096
    assert raw.raw("SET", "model@1@0@abc", value) == b"+OK\r\n"
    assert raw.raw("EXISTS", "model@1@0@abc") == b":1\r\n"
    assert raw.raw("EXISTS", "model@1@0@def") == b":0\r\n"
    assert raw.raw("GET", "model@1@0@abc") == b"$1048576\r\n" + value + b"\r\n"
    assert raw.raw("DEL", "model@1@0@abc") == b":1\r\n"
    assert raw.raw("GET", "model@1@0@abc") == b"$-1\r\n"


def test_hello_in_resp2_is_a_flat_array(raw: Raw) -> None:
    assert raw.raw("HELLO").startswith(b"*14\r\n")
    assert raw.raw("HELLO", "2").startswith(b"*14\r\n")
    assert raw.raw("HELLO", "3").startswith(b"%7\r\n")
    assert raw.raw("HELLO").startswith(b"%7\r\n")


@pytest.mark.parametrize("protocol", [2, 3])
def test_an_exporter_and_a_browser_are_never_cut_off(protocol: int, raw: Raw) -> None:
    """redis_exporter and RedisInsight try what may be absent: that must be an error, not an end."""
    hello_of(raw.ask("HELLO", protocol))
    check_ok(raw, ["CLIENT", "SETNAME", "redis_exporter"], ["SET", "k", "v"])
    info = fields_of(raw.ask("INFO", "ALL"))
    assert info["db0"].startswith("keys=1,expires=0,avg_ttl=")
    assert {"redis_version", "connected_clients", "used_memory", "uptime_in_seconds"} <= set(info)
    assert raw.ask("CONFIG", "GET", "*")
    assert raw.ask("CONFIG", "GET", "databases") in ([b"databases", b"1"], {b"databases": b"1"})
    assert len(raw.ask("COMMAND")) == len(COMMANDS)
    for request in (
        ["SLOWLOG", "LEN"],
        ["SLOWLOG", "GET", "128"],
        ["LATENCY", "LATEST"],
        ["LATENCY", "HISTOGRAM"],
        ["COMMANDLOG", "LEN", "slow"],
        ["CLUSTER", "INFO"],
        ["SENTINEL", "MASTERS"],
        ["ACL", "LIST"],
        ["ACL", "WHOAMI"],
        ["MONITOR"],
        ["CLIENT", "TRACKING", "ON"],
    ):
        assert isinstance(raw.ask(*request), hiredis.ReplyError), request
    assert raw.ask("GETRANGE", "k", "0", "10") == b"v"
    assert raw.ask("MODULE", "LIST") == []
    assert raw.ask("PUBSUB", "CHANNELS") == []
    assert raw.ask("MEMORY", "USAGE", "k") > 0
    assert raw.ask("TYPE", "k") == b"string"
    assert b"id=" in raw.ask("CLIENT", "LIST")
    assert raw.ask("PING") == b"PONG"


def test_out_of_scope_types_are_refused_in_clear_words(raw: Raw) -> None:
    for request in (
        ["LPUSH", "k", "v"],
        ["HSET", "k", "f", "v"],
        ["SADD", "k", "v"],
        ["ZADD", "k", "1", "v"],
        ["XADD", "k", "*", "f", "v"],
        ["EVAL", "return 1", "0"],
        ["SSUBSCRIBE", "c"],
    ):
        assert error_of(raw.ask(*request)).startswith(f"ERR unknown command '{request[0]}'")
