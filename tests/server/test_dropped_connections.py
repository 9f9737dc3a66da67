"""A connection that breaks anywhere leaves nothing behind: no lease, no landing, no borrowed slot.

After each test the server's own integrity check must have run, by its janitor, and found nothing.
"""

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.server.conftest import check_log
from tests.server.raw import Raw, pipeline, request
from tests.server.watching import wait_for
from tests.server_process import ServerProcess

MIB = 1 << 20
HELD = ("kv_leases", "kv_landings", "kv_sending", "kv_quarantined")


@pytest.fixture(scope="module")
def checked() -> Iterator[ServerProcess]:
    """Return a server that checks its integrity every second that it is idle."""
    running = ServerProcess(shm="rw", maxmemory="64mb", check_interval=1, reserve_timeout=1000)
    yield running
    check_log(running.log)
    assert running.stop() == 0


@pytest.fixture
def server(checked: ServerProcess) -> Iterator[ServerProcess]:
    yield checked
    wait_for(checked, "connected_clients", 1)
    for field in HELD:
        wait_for(checked, field, 0)
    with Raw(checked.connect()) as raw:
        assert raw.ask("FLUSHALL") == b"OK"
    wait_for(checked, "kv_arena_used_bytes", 0)
    wait_for_check(checked)
    check_log(checked.log)


def wait_for_check(server: ServerProcess) -> None:
    """Wait, without disturbing it, until the server has checked itself once more."""
    before = int(server.info()["kv_checks"])
    deadline = time.monotonic() + 60
    while int(server.info()["kv_checks"]) == before:
        assert time.monotonic() < deadline, "no integrity check while idle"
        time.sleep(1.2)


def long_pipeline() -> bytes:
    page = b"p" * 1000
    small: list[tuple[str | bytes | int, ...]] = [
        ("HELLO", 3),
        ("SET", "k", "v", "EX", 100),
        ("MSET", "a", 1, "b", b"x" * 500),
        (
            "KV.SCHEMA",
            "SET",
            "ns",
            *["LAYERS", "2", "HEADS", "2", "DIM", "4", "TOKENS", "8", "DTYPE", "int8"],
        ),
        ("KV.PUT", "page", page, "PARENT", "above", "PX", 50_000),
        ("KV.RESERVE", "other", 4096),
        ("KV.LEASE", 2, "page", "absent", "MS", 5000),
        ("KV.MGET", 3, "page", "k", "absent"),
        ("KV.MATCH", 2, "page", "other"),
        ("KEYS", "*"),
        ("GETSET", "k", b"w" * 600),
        ("KV.COMMIT", 1),
        ("EXPIRE", "k", 50, "NX"),
        ("CLIENT", "REPLY", "SKIP"),
        ("SCAN", 0, "MATCH", "*", "COUNT", 100),
        ("KV.INFO", "page"),
        ("BOGUS", "x"),
        ("DEL", "k", "a", "b"),
    ]
    return pipeline(small)


def test_dropped_at_every_byte_of_a_long_pipeline(server: ServerProcess) -> None:
    stream = long_pipeline()
    assert len(stream) > 1000
    for stop in range(len(stream) + 1):
        with Raw(server.connect()) as raw:
            raw.socket.sendall(stream[:stop])


def test_dropped_in_the_middle_of_large_values(server: ServerProcess) -> None:
    big = b"x" * 200_000
    stream = pipeline(
        [
            ("SET", "k", big),
            ("KV.PUT", "page", big, "TOKENS", 8),
            ("MSET", "a", big, "b", "small", "c", big),
            ("GET", "k"),
            ("GETSET", "k", big),
            ("SET", "k", big, "GET"),
            ("KV.PUT", "page", big, "NX"),
        ]
    )
    chosen = random.Random(1).sample(range(len(stream)), 300)
    for stop in [*chosen, *range(len(stream) - 40, len(stream))]:
        with Raw(server.connect()) as raw:
            raw.socket.sendall(stream[:stop])


def test_dropped_while_replies_are_on_their_way(server: ServerProcess) -> None:
    choice = random.Random(2)
    with Raw(server.connect()) as raw:
        for each in range(8):
            raw.ask("SET", f"k{each}", b"v" * (2 * MIB))
    keys = [f"k{each}" for each in range(8)]
    for _ in range(60):
        with Raw(server.connect()) as raw:
            raw.socket.sendall(
                pipeline(
                    choice.choices([("GET", "k1"), ("MGET", *keys), ("KV.MGET", 8, *keys)], k=4)
                )
            )
            for _ in range(choice.randrange(6)):
                raw.socket.recv(choice.randrange(1, 300_000))


def test_dropped_while_waiting_for_room(server: ServerProcess) -> None:
    """Everything is leased, so puts and reservations wait; then their clients go."""
    with ExitStack() as stack:
        holder = stack.enter_context(Raw(server.connect()))
        count = 0
        while True:
            key = f"page{count}"
            if holder.ask("KV.PUT", key, b"p" * (2 * MIB)) != b"OK":
                break
            if not isinstance(lease := holder.ask("KV.LEASE", 1, key, "MS", 50_000), list):
                break
            assert lease[1] is not None
            count += 1
        assert count > 10
        waiting = [stack.enter_context(Raw(server.connect())) for _ in range(20)]
        for each, raw in enumerate(waiting):
            if each % 2:
                raw.send("KV.RESERVE", f"r{each}", 2 * MIB)
            else:
                raw.socket.sendall(request("SET", f"s{each}", b"x" * (2 * MIB))[: MIB + each])
        time.sleep(0.2)
        for raw in waiting[:10]:
            raw.close()
        assert holder.ask("PING") == b"PONG"
    # The holder has gone, too: the rest find room, and find out that nobody waits for it.


def test_dropped_with_leases_and_reservations(server: ServerProcess) -> None:
    with Raw(server.connect()) as raw:
        raw.ask("KV.PUT", "page", b"p" * MIB)
    for each in range(50):
        with Raw(server.connect()) as raw:
            raw.send("KV.LEASE", 2, "page", "absent")
            raw.send("KV.RESERVE", f"r{each}", 3 * MIB)
            if each % 2:
                raw.next()
                raw.next()
            if each % 3 == 0:
                raw.send("KV.COMMIT", 2 * each + 2)


def test_dropped_by_a_reset_instead_of_an_end(server: ServerProcess) -> None:
    """With SO_LINGER 0 closing sends RST, as a crash of the client's machine may."""
    import socket
    import struct

    with Raw(server.connect()) as raw:
        raw.ask("SET", "big", b"v" * (8 * MIB))
    for each in range(40):
        raw = Raw(server.connect())
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream = pipeline([("GET", "big"), ("KV.LEASE", 1, "big"), ("SET", "k", b"x" * 300_000)])
        raw.socket.sendall(stream[: -1 - each * 7000])
        raw.close()
