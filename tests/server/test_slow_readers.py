"""Clients that do not read: bounded memory, others served, and what they held comes back."""

import time
from contextlib import ExitStack

from tests.conftest import StartServer
from tests.server.raw import Raw, pipeline, request
from tests.server.watching import wait_for, wait_until, worst_ping_s

MIB = 1 << 20


def test_unread_gets_cost_no_memory_and_delay_nobody(start_server: StartServer) -> None:
    """Goal B7, scaled: 8 clients ask 50 times for 4 MiB each and read nothing."""
    server = start_server(maxmemory="128mb")
    value = bytes(range(256)) * (4 * MIB // 256)
    with Raw(server.connect()) as healthy:
        keys = [f"k{each}" for each in range(8)]
        for key in keys:
            assert healthy.ask("SET", key, value) == b"OK"
        before = server.resident_bytes
        with ExitStack() as stack:
            for key in keys:
                slow = stack.enter_context(Raw(server.connect()))
                slow.socket.sendall(request("GET", key) * 50)
            wait_for(server, "kv_sending", 8)
            worst = worst_ping_s(healthy, 1.0)
            grown = server.resident_bytes - before
            assert healthy.ask("GET", "k0") == value
            assert healthy.ask("SET", "k9", value) == b"OK", "there is room for others"
        wait_for(server, "kv_sending", 0)
        assert grown < 64 * MIB
        assert worst < 10
        assert healthy.ask("FLUSHALL") == b"OK"
        wait_for(server, "kv_arena_used_bytes", 0)
        print(f"RSS +{grown / MIB:.1f} MiB, worst PING {worst * 1000:.1f} ms")


def test_a_reader_that_takes_nothing_is_disconnected_and_counted(start_server: StartServer) -> None:
    server = start_server(output_timeout=1)
    with Raw(server.connect()) as raw, Raw(server.connect()) as slow:
        raw.ask("SET", "big", b"x" * (16 * MIB))
        start = time.monotonic()
        slow.socket.sendall(request("GET", "big") * 10)
        wait_for(server, "connected_clients", 2)
        assert time.monotonic() - start > 0.5
        assert int(server.info()["client_output_buffer_limit_disconnections"]) == 1
        wait_for(server, "kv_sending", 0)
        assert raw.ask("PING") == b"PONG"


def test_a_reader_that_is_slow_but_reads_is_served_to_the_end(start_server: StartServer) -> None:
    server = start_server(output_timeout=2)
    value = bytes(range(256)) * (24 * MIB // 256)
    with Raw(server.connect()) as raw, Raw(server.connect()) as slow:
        raw.ask("SET", "big", value)
        slow.socket.sendall(request("GET", "big") + request("PING"))
        end = time.monotonic() + 4
        taken = bytearray()
        while time.monotonic() < end:
            taken += slow.socket.recv(65536)
            time.sleep(0.02)
        assert len(taken) < len(value)
        while not taken.endswith(b"+PONG\r\n"):
            part = slow.socket.recv(MIB)
            assert part, "it was disconnected"
            taken += part
        assert bytes(taken) == b"$%d\r\n%b\r\n+PONG\r\n" % (len(value), value)


def test_the_output_limit_cuts_off_who_asks_for_more(start_server: StartServer) -> None:
    server = start_server(client_output_buffer_limit="1mb", output_timeout=60)
    with Raw(server.connect()) as raw, Raw(server.connect()) as slow:
        raw.ask("SET", "big", b"x" * (24 * MIB))
        slow.socket.sendall(request("GET", "big"))
        wait_for(server, "connected_clients", 2)
        assert int(server.info()["client_output_buffer_limit_disconnections"]) == 1
        wait_for(server, "kv_sending", 0)


def test_small_answers_that_nobody_reads_are_bounded_too(start_server: StartServer) -> None:
    server = start_server()
    with Raw(server.connect()) as raw, ExitStack() as stack:
        raw.ask("SET", "k", b"v" * 400)
        before = server.resident_bytes
        for _ in range(4):
            slow = stack.enter_context(Raw(server.connect()))
            slow.socket.settimeout(0.2)
            try:
                while True:
                    slow.socket.sendall(request("GET", "k") * 5000)
            except TimeoutError:
                pass  # it has stopped reading, as it should
        assert server.resident_bytes - before < 32 * MIB
        assert raw.ask("GET", "k") == b"v" * 400


def test_who_reads_late_gets_everything_in_order(start_server: StartServer) -> None:
    server = start_server()
    with Raw(server.connect()) as raw:
        values = [bytes([each]) * MIB for each in range(16)]
        for each, value in enumerate(values):
            raw.ask("SET", f"k{each}", value)
        requests: list[tuple[str | int, ...]] = [
            *(("GET", f"k{each}") for each in range(16)),
            ("MGET", *(f"k{each}" for each in range(16))),
            ("KV.MGET", 16, *(f"k{each}" for each in range(16))),
            ("KEYS", "nothing"),
            ("STRLEN", "k3"),
        ]
        raw.socket.sendall(pipeline(requests))
        time.sleep(0.3)
        assert [raw.next() for _ in range(16)] == values
        assert raw.next() == values
        assert raw.next() == values
        assert raw.next() == []
        assert raw.next() == MIB


def test_a_streamed_reply_is_of_one_moment(start_server: StartServer) -> None:
    """MGET holds what it found: writers and evictions meanwhile change nothing in it."""
    server = start_server(maxmemory="64mb")
    with Raw(server.connect()) as slow, Raw(server.connect()) as writer:
        values = [bytes([each]) * (2 * MIB) for each in range(12)]
        keys = [f"k{each}" for each in range(12)]
        for key, value in zip(keys, values, strict=True):
            assert writer.ask("SET", key, value) == b"OK"
        slow.socket.sendall(request("KV.MGET", 12, *keys))
        wait_until(server, "kv_sending", lambda number: number >= 8)
        for key in keys:
            writer.ask("SET", key, b"overwritten" * 1000)
        writer.ask("DEL", *keys[::2])
        for each in range(40):
            writer.ask("SET", f"other{each}", b"y" * MIB)
        writer.ask("FLUSHALL")
        assert slow.next() == values
        wait_for(server, "kv_sending", 0)
        wait_for(server, "kv_arena_used_bytes", 0)
