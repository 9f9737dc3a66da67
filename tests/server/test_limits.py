"""Limits hold before memory is taken: claimed lengths, counts, clients, descriptors, idle time."""

import resource
import select
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from respkv.server.body import LAND_MIN
from tests.conftest import StartServer
from tests.server.conftest import Connect, check_log
from tests.server.raw import Closed, Raw, error_of, pipeline, request
from tests.server.watching import cpu_s, descriptors_of, number_of, wait_until, worst_ping_s
from tests.server_process import ServerProcess

MIB = 1 << 20


@pytest.mark.parametrize(
    "head",
    [
        b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$536870911\r\n",
        b"*3\r\n$6\r\nKV.PUT\r\n$1\r\nk\r\n$536870911\r\n",
        b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$536870911\r\n" + b"x" * 10_000,
        b"*2\r\n$4\r\nECHO\r\n$536870911\r\n" + b"x" * 10_000,
        b"*65536\r\n$4\r\nMGET\r\n$65535\r\n",
        b"*65536\r\n" + b"$1\r\nk\r\n" * 1000,
    ],
    ids=[
        "SET",
        "KV.PUT",
        "SET and 10 KB",
        "ECHO and 10 KB",
        "a million arguments",
        "a thousand of them",
    ],
)
def test_claimed_lengths_take_no_memory_and_evict_nothing(
    head: bytes, server: ServerProcess, raw: Raw
) -> None:
    """Goal B4: 200 connections announce 512 MB each."""
    raw.ask("SET", "kept", b"v" * MIB)
    before, fields = server.resident_bytes, server.info()
    with ExitStack() as stack:
        for _ in range(200):
            each = stack.enter_context(Raw(server.connect()))
            each.socket.sendall(head)
        worst = worst_ping_s(raw, 0.2)
        grown = server.resident_bytes - before
        assert server.info()["evicted_keys"] == fields["evicted_keys"]
        assert number_of(server, "kv_arena_used_bytes") <= int(fields["kv_arena_used_bytes"])
    assert grown < 32 * MIB
    assert worst < 10
    most = int(fields["connected_clients"])
    wait_until(server, "connected_clients", lambda number: number <= most)


def test_a_slow_value_takes_a_slot_only_once_some_of_it_has_come(
    raw: Raw, server: ServerProcess
) -> None:
    with Raw(server.connect()) as slow:
        slow.socket.sendall(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n" % MIB + b"x" * (LAND_MIN - 1))
        time.sleep(0.05)
        assert server.info()["kv_landings"] == "0"
        slow.socket.sendall(b"x")
        deadline = time.monotonic() + 60
        while server.info()["kv_landings"] != "1":
            assert time.monotonic() < deadline
        slow.socket.sendall(b"x" * (MIB - LAND_MIN) + b"\r\n")
        assert slow.next() == b"OK"
    assert raw.ask("GET", "k") == b"x" * MIB


def test_very_many_tiny_arguments(server: ServerProcess, raw: Raw) -> None:
    """Goal B5: as many as max-args are served, one more is refused; others hardly wait."""
    before = server.resident_bytes
    with Raw(server.connect()) as greedy:
        greedy.socket.sendall(b"*65536\r\n$6\r\nEXISTS\r\n" + b"$1\r\nk\r\n" * 65535)
        worst = worst_ping_s(raw, 0.5)
        assert greedy.next() == 0
    assert worst < 10
    assert server.resident_bytes - before < 32 * MIB
    for head in (b"*65537\r\n", b"*1000000\r\n"):
        with Raw(server.connect()) as greedy:
            greedy.socket.sendall(head + b"$1\r\nk\r\n" * 10)
            assert error_of(greedy.next()) == "ERR Protocol error: invalid multibulk length"


@pytest.mark.parametrize(
    "head", [b"*2147483648\r\n", b"*1000000000\r\n$1\r\n", b"*1\r\n*2000000000\r\n"]
)
def test_a_claimed_count_stops_nobody(head: bytes, server: ServerProcess, raw: Raw) -> None:
    with Raw(server.connect()) as rude:
        rude.socket.sendall(head)
        assert worst_ping_s(raw, 0.2) < 10


@pytest.mark.parametrize(
    "words",
    [
        ["ECHO", None],
        ["PING", None],
        ["GET", None],
        ["SET", None, "v"],
        ["SET", "k", "v", None],
        ["SET", "k", "v", "EX", None],
        ["EXISTS", "k", None],
        ["DEL", None, "k"],
        ["MSET", "k", "v", None, "v"],
        ["CLIENT", "SETNAME", None],
        ["CONFIG", "SET", "maxmemory", None],
        ["KV.PUT", None, "x"],
        ["KV.MATCH", "1", None],
        ["KV.SCHEMA", "SET", None, *["x"] * 10],
        [None],
        ["bogus", None],
    ],
    ids=lambda words: "-".join(map(str, words[:4])),
)
def test_a_large_argument_that_is_no_value_is_refused_when_it_is_announced(
    words: list[str | None], limited: ServerProcess
) -> None:
    """Over query-buffer-limit, of which only values in slots are free."""
    at = words.index(None)
    head = request(*["" if word is None else word for word in words])
    head = b"\r\n".join(head.split(b"\r\n")[: 1 + 2 * at]) + b"\r\n$%d\r\n" % (4 * MIB)
    with Raw(limited.connect()) as raw:
        raw.socket.sendall(head + b"x" * 100)
        assert raw.wait_closed() == b"-ERR Protocol error: too big request\r\n"
    with Raw(limited.connect()) as raw:
        assert raw.ask("DBSIZE") == 0


@pytest.mark.parametrize("nbytes", [60_000, 100_000])
def test_many_arguments_are_refused_when_their_sum_is_too_large(
    nbytes: int, limited: ServerProcess
) -> None:
    before = limited.resident_bytes
    with Raw(limited.connect()) as raw:
        raw.socket.sendall(request("EXISTS", *[b"y" * nbytes] * (MIB // nbytes + 1))[:-2])
        assert raw.wait_closed() == b"-ERR Protocol error: too big request\r\n"
    with Raw(limited.connect()) as raw:
        assert raw.ask("SET", "k", b"x" * (4 * MIB)) == b"OK", "a value lands in its slot"
        assert raw.ask("FLUSHALL") == b"OK"
    assert limited.resident_bytes - before < 16 * MIB


@pytest.fixture(scope="module")
def limited() -> Iterator[ServerProcess]:
    running = ServerProcess(query_buffer_limit="1mb")
    yield running
    check_log(running.log)
    assert running.stop() == 0


def test_the_length_limit_follows_config_set(start_server: StartServer) -> None:
    server = start_server(proto_max_bulk_len="1mb")
    with Raw(server.connect()) as raw:
        assert raw.ask("SET", "k", b"x" * MIB) == b"OK"
        assert raw.ask("CONFIG", "SET", "proto-max-bulk-len", 2 * MIB) == b"OK"
        assert raw.ask("SET", "k", b"x" * (2 * MIB)) == b"OK"
        raw.socket.sendall(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n" % (2 * MIB + 1))
        assert error_of(raw.next()) == "ERR Protocol error: invalid bulk length"


def test_too_many_clients_are_told_and_let_in_later(start_server: StartServer) -> None:
    """Goal B9."""
    server = start_server(maxclients=10)
    with ExitStack() as stack:
        inside = [stack.enter_context(Raw(server.connect())) for _ in range(10)]
        assert [each.ask("PING") for each in inside] == [b"PONG"] * 10
        for _ in range(5):
            with Raw(server.connect()) as outside:
                assert outside.wait_closed() == b"-ERR max number of clients reached\r\n"
        inside[0].close()
        deadline = time.monotonic() + 60
        while True:
            late = stack.enter_context(Raw(server.connect()))
            late.send("INFO", "stats")
            if not isinstance(reply := late.next(), Exception):
                break
            assert time.monotonic() < deadline
    assert b"rejected_connections:" in reply
    assert int(reply.split(b"rejected_connections:")[1].split()[0]) >= 5


def test_without_descriptors_it_neither_ends_nor_spins(start_server: StartServer) -> None:
    """Goal B9: EMFILE."""
    server = start_server()
    pid = server.process.pid
    with Raw(server.connect()) as inside:
        assert inside.ask("PING") == b"PONG"
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors_of(server) + 5, limits[1]))
        outside = [Raw(server.connect()) for _ in range(40)]
        time.sleep(0.2)
        before = cpu_s(server)
        time.sleep(1)
        assert cpu_s(server) - before < 0.5, "it spins"
        assert inside.ask("PING") == b"PONG"
        for each in outside:
            each.close()
        deadline = time.monotonic() + 60
        while True:
            try:
                with Raw(server.connect()) as late:
                    assert late.ask("PING") == b"PONG"
                break
            except Closed:
                assert time.monotonic() < deadline


def test_idle_connections_are_closed_and_busy_ones_not(start_server: StartServer) -> None:
    server = start_server(timeout=2)
    with ExitStack() as stack:
        idle, half, busy = (stack.enter_context(Raw(server.connect())) for _ in range(3))
        half.socket.sendall(b"*2\r\n$3\r\nGET\r\n")
        start = time.monotonic()
        waiting = {idle.socket, half.socket}
        while waiting or time.monotonic() < start + 3:
            assert busy.ask("PING") == b"PONG"
            assert time.monotonic() < start + 60
            waiting -= {*select.select(waiting, [], [], 0.05)[0]}
        assert idle.wait_closed() == half.wait_closed() == b""
        assert (
            int(busy.ask("INFO", "stats").split(b"idle_timeout_disconnections:")[1].split()[0]) == 2
        )
        assert busy.ask("CONFIG", "SET", "timeout", 0) == b"OK"


def test_a_thousand_connections_held_half_in_a_command(server: ServerProcess, raw: Raw) -> None:
    """Goal B8, scaled: at most 64 KiB each, others are served, all come back."""
    parts = [
        b"",
        b"*",
        b"*3\r\n$3\r\nSET\r\n",
        b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$100\r\nxxx",
        b"*2\r\n$4\r\nECHO\r\n$100000\r\n" + b"x" * 5000,
        b"SET k " + b"v" * 3000,
    ]
    before, descriptors = server.resident_bytes, descriptors_of(server)
    most = number_of(server, "connected_clients")  # others may have left some open
    with ExitStack() as stack:
        for each in range(1000):
            held = stack.enter_context(Raw(server.connect()))
            held.socket.sendall(parts[each % len(parts)])
        worst = worst_ping_s(raw, 0.5)
        per_connection = (server.resident_bytes - before) / 1000
        assert 1002 <= number_of(server, "connected_clients") <= 1000 + most
    assert per_connection < 64 * 1024
    assert worst < 10
    wait_until(server, "connected_clients", lambda number: number <= most)
    assert descriptors_of(server) <= descriptors + 1


@pytest.mark.parametrize(
    "pattern",
    [
        b"*" * 10_000 + b"x",
        b"a*" * 5_000,
        b"[" * 60_000,
        b"?" * 60_000,
        b"\\" * 60_000,
        b"*?" * 20_000,
    ],
    ids=["stars", "a*", "[", "?", "backslashes", "*?"],
)
def test_a_costly_pattern_costs_little(pattern: bytes, raw: Raw, connect: Connect) -> None:
    """Goal B6: linear, and others are served in between."""
    names = [b"a" * 50 + b"%d" % each for each in range(5000)]
    raw.ask("MSET", *[word for name in names for word in (name, b"v")])
    asking = connect()
    calls: list[list[str | bytes]] = [
        ["KEYS", pattern],
        ["SCAN", "0", "COUNT", "100000", "MATCH", pattern],
    ]
    for words in calls:
        asking.socket.sendall(request(*words))
        worst = worst_ping_s(raw, 0.05)
        before = time.monotonic()
        reply: Any = asking.next()
        assert time.monotonic() - before < 10
        assert worst < 10
        if isinstance(reply, list):
            found = reply if words[0] == "KEYS" else reply[1]
            assert found == [] or set(found) <= set(names)


def test_long_pipelines_of_unknown_commands_stay_in_step(raw: Raw) -> None:
    raw.socket.sendall(pipeline([["bogus", "x" * 200]] * 20_000 + [["PING"]]))
    for _ in range(20_000):
        assert raw.next_raw().startswith(b"-ERR unknown command 'bogus'")
    assert raw.next() == b"PONG"


def test_used_memory_is_what_the_process_uses(start_server: StartServer) -> None:
    """Goal E2: within 32 MiB of the resident set once the memory is full."""
    server = start_server(maxmemory="64mb")
    with Raw(server.connect()) as raw:
        for size in (20, 300, 5000, 100_000, MIB):
            count = min(24 * MIB // size, 40_000)
            requests = [("SET", f"{size}-{each}", b"v" * size) for each in range(count)]
            for start in range(0, count, 2000):
                assert set(raw.ask_all(requests[start : start + 2000])) == {b"OK"}
        info = server.info()
    used, resident = int(info["used_memory"]), server.resident_bytes
    assert abs(resident - used) < 32 * MIB, (used, resident)
    assert resident < (64 + 96) * MIB
    assert abs(int(info["used_memory_rss"]) - resident) < 8 * MIB
