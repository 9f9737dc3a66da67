"""KV.ATTACH, LEASE and RESERVE: pages read and written in place through the arena's file."""

import mmap
import os
import struct
import time
from collections.abc import Iterator

import pytest

from tests.conftest import StartServer
from tests.server.conftest import Connect
from tests.server.raw import Raw, error_of
from tests.server.watching import number_of, wait_for
from tests.server_process import ServerProcess

MIB = 1 << 20


def map_arena(raw: Raw) -> mmap.mmap:
    """Map the server's arena as KV.ATTACH describes it."""
    path, nbytes, version, mode, *_ = raw.ask("KV.ATTACH")
    assert version == 1
    with open(os.fsdecode(path), "r+b") as file:
        assert os.fstat(file.fileno()).st_size == nbytes
        access = mmap.ACCESS_WRITE if mode == b"rw" else mmap.ACCESS_READ
        return mmap.mmap(file.fileno(), nbytes, access=access)


@pytest.fixture
def arena(raw: Raw) -> Iterator[mmap.mmap]:
    with map_arena(raw) as mapped:
        yield mapped


@pytest.mark.parametrize("nbytes", [449, 1000, 70_000, MIB, 5 * MIB + 1])
def test_a_lease_shows_where_the_page_is(nbytes: int, raw: Raw, arena: mmap.mmap) -> None:
    pages = {f"p{each}": bytes([each]) * nbytes for each in range(3)}
    for key, page in pages.items():
        raw.ask("KV.PUT", key, page)
    lease, *places = raw.ask("KV.LEASE", 4, *pages, "absent")
    assert places[3] is None
    for (offset, length), page in zip(places[:3], pages.values(), strict=True):
        assert offset % 64 == 0
        assert arena[offset : offset + length] == page
    assert raw.ask("KV.RELEASE", lease) == 1
    assert raw.ask("KV.RELEASE", lease) == 0


def test_places_come_packed_if_asked(raw: Raw) -> None:
    assert b"packed" in raw.ask("KV.ATTACH")[5:]
    keys = [f"packed{number}" for number in range(40)]
    for number, key in enumerate(keys):
        if number % 3:
            raw.ask("KV.PUT", key, bytes(1000 + number))
    lease, *places = raw.ask("KV.LEASE", len(keys), *keys)
    other, packed = raw.ask("KV.LEASE", len(keys), *keys, "MS", "60000", "packed")
    found = list(struct.iter_unpack("<qq", packed))
    assert found == [(-1, -1) if place is None else tuple(place) for place in places]
    assert [length for _, length in found[:3]] == [-1, 1001, 1002]
    assert raw.ask("KV.RELEASE", lease) == raw.ask("KV.RELEASE", other) == 1
    for words in (["PACKED", "PACKED"], ["TIER", "gpu", "PACKED"]):
        assert "PACKED" in error_of(raw.ask("KV.LEASE", 1, "packed1", *words))


def test_a_small_page_is_leased_and_a_small_plain_value_is_not(raw: Raw, arena: mmap.mmap) -> None:
    raw.ask("KV.PUT", "page", b"tiny")
    raw.ask("SET", "small", b"tiny")
    raw.ask("SET", "large", b"L" * 5000)
    _, (offset, length), small, large = raw.ask("KV.LEASE", 3, "page", "small", "large")
    assert arena[offset : offset + length] == b"tiny"
    assert small is None, "it is on the heap, so it has no place in the arena"
    assert arena[large[0] : large[0] + large[1]] == b"L" * 5000


@pytest.mark.parametrize("ending", ["DEL", "SET", "KV.PUT", "FLUSHALL", "evict", "expire"])
def test_leased_bytes_stay_whatever_becomes_of_the_key(
    ending: str, start_server: StartServer, connect: Connect
) -> None:
    server = start_server(shm="ro", maxmemory="32mb")
    raw, other = connect(server), connect(server)
    page = os.urandom(MIB)
    raw.ask("KV.PUT", "p", page)
    lease, (offset, length) = raw.ask("KV.LEASE", 1, "p", "MS", 60_000)
    if ending == "DEL":
        other.ask("DEL", "p")
    elif ending in ("SET", "KV.PUT"):
        other.ask(ending, "p", b"new" * 400_000)
    elif ending == "FLUSHALL":
        other.ask("FLUSHALL")
    elif ending == "expire":
        other.ask("PEXPIRE", "p", 1)
        time.sleep(0.3)
    for each in range(80):
        assert other.ask("SET", f"k{each}", b"o" * MIB) == b"OK"
    with map_arena(raw) as arena:
        assert arena[offset : offset + length] == page
    assert raw.ask("KV.RELEASE", lease) == 1


def test_a_lease_lapses_and_its_owner_is_told(raw: Raw, server: ServerProcess) -> None:
    raw.ask("KV.PUT", "p", b"x" * 1000)
    before = number_of(server, "kv_lapsed")
    lease, _ = raw.ask("KV.LEASE", 1, "p", "MS", 1)
    wait_for(server, "kv_leases", 0)
    assert raw.ask("KV.RELEASE", lease) == 0
    assert number_of(server, "kv_lapsed") == before + 1
    assert raw.ask("PING") == b"PONG", "a reader is not disconnected"


def test_leases_belong_to_their_connection(
    raw: Raw, connect: Connect, server: ServerProcess
) -> None:
    raw.ask("KV.PUT", "p", b"x" * 1000)
    other = connect()
    lease, _ = raw.ask("KV.LEASE", 1, "p")
    assert other.ask("KV.RELEASE", lease) == 0
    assert number_of(server, "kv_leases") == 1
    raw.close()
    wait_for(server, "kv_leases", 0)
    reserved, _ = other.ask("KV.RESERVE", "q", 1000)
    third = connect()
    assert third.ask("KV.ABORT", reserved) == 0
    assert error_of(third.ask("KV.COMMIT", reserved)).startswith("KVLEASE ")
    assert other.ask("KV.COMMIT", reserved) == b"OK"


@pytest.mark.parametrize("nbytes", [1, 448, 5000, MIB, MIB + 1, 9 * MIB])
def test_a_reserved_page_is_written_in_place_and_seen_once_committed(
    nbytes: int, raw: Raw, arena: mmap.mmap, connect: Connect
) -> None:
    """Over 1 MiB the checksum is taken in a thread."""
    page = os.urandom(nbytes)
    lease, offset = raw.ask("KV.RESERVE", "p", nbytes)
    assert offset % 64 == 0
    arena[offset : offset + nbytes] = page
    assert connect().ask("EXISTS", "p") == 0
    reply = raw.ask(
        "KV.COMMIT", lease, "TOKENS", 16, "PX", 60_000, "PARENT", "before", "PRIORITY", 2
    )
    assert reply == b"OK"
    assert connect().ask("KV.GET", "p") == page
    assert 30_000 < raw.ask("PTTL", "p") <= 60_000
    assert error_of(raw.ask("KV.COMMIT", lease)).startswith("KVLEASE ")
    assert raw.ask("KV.ABORT", lease) == 0


def test_an_aborted_reservation_leaves_nothing(raw: Raw, server: ServerProcess) -> None:
    used = number_of(server, "kv_arena_used_bytes")  # slots of writers that others had cut off
    lease, _ = raw.ask("KV.RESERVE", "p", MIB)
    assert number_of(server, "kv_arena_used_bytes") >= MIB
    assert raw.ask("KV.ABORT", lease) == 1
    assert number_of(server, "kv_arena_used_bytes") <= used
    assert error_of(raw.ask("KV.COMMIT", lease)).startswith("KVLEASE ")
    assert raw.ask("EXISTS", "p") == 0


def test_a_commit_over_a_page_that_came_meanwhile(
    raw: Raw, arena: mmap.mmap, connect: Connect
) -> None:
    for options, left in ((["NX"], b"theirs"), ([], b"mine")):
        lease, offset = raw.ask("KV.RESERVE", "p", 4)
        arena[offset : offset + 4] = b"mine"
        connect().ask("KV.PUT", "p", b"theirs")
        assert raw.ask("KV.COMMIT", lease, *options) == (None if options else b"OK")
        assert raw.ask("KV.GET", "p") == left


def test_an_overdue_writer_is_disconnected_and_its_slot_put_aside(
    start_server: StartServer, connect: Connect
) -> None:
    """It may still write there, so for a while nobody else gets that place."""
    server = start_server(shm="rw", maxmemory="16mb")
    writer, raw = connect(server), connect(server)
    lease, offset = writer.ask("KV.RESERVE", "p", MIB, "MS", 100)
    assert writer.wait_closed() == b""
    info = server.info()
    assert info["overdue_writer_disconnections"] == "1"
    assert info["kv_quarantined"] == "1"
    assert info["kv_leases"] == "0"
    places = set()
    for each in range(10):
        places.add(raw.ask("KV.RESERVE", f"r{each}", MIB)[1])
    assert offset not in places
    assert raw.ask("EXISTS", "p") == 0
    assert error_of(raw.ask("KV.COMMIT", lease)).startswith("KVLEASE ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["KV.LEASE", "1", "p", "MS", "0"], "MS must be at least 1"),
        (["KV.LEASE", "1", "p", "MS", "60001"], "more than lease-max"),
        (["KV.LEASE", "1", "p", "MS"], "syntax error, a value is missing"),
        (["KV.LEASE", "1", "p", "BOGUS", "1"], "unexpected option 'BOGUS'"),
        (["KV.RESERVE", "p", "0"], "nbytes must be at least 1"),
        (["KV.RESERVE", "p", "-1"], "nbytes must be at least 1"),
        (["KV.RESERVE", "p", "x"], "value is not an integer"),
        (["KV.RESERVE", "p", "1", "MS", "0"], "MS must be at least 1"),
        (["KV.RESERVE", "p", "1", "MS", "60001"], "more than lease-max"),
        (["KV.RESERVE", "p", "600000000"], "more than proto-max-bulk-len"),
        (["KV.RESERVE", "p", "400000000"], "OOM "),
        (["KV.RESERVE", "k" * 513, "10"], "at most 512 bytes"),
        (["KV.COMMIT", "x"], "value is not an integer"),
        (["KV.COMMIT", "999999"], "KVLEASE "),
        (["KV.RELEASE", "x"], "value is not an integer"),
        (["KV.ABORT", ""], "value is not an integer"),
    ],
)
def test_a_wrong_call_is_told_why(
    words: list[str], said: str, raw: Raw, server: ServerProcess
) -> None:
    assert said in error_of(raw.ask(*words))
    assert number_of(server, "kv_leases") == 0


def test_a_wrong_commit_option_leaves_the_reservation(raw: Raw, arena: mmap.mmap) -> None:
    lease, offset = raw.ask("KV.RESERVE", "p", 4)
    arena[offset : offset + 4] = b"page"
    assert "BOGUS" in error_of(raw.ask("KV.COMMIT", lease, "BOGUS"))
    assert raw.ask("KV.COMMIT", lease) == b"OK"
    read, _ = raw.ask("KV.LEASE", 1, "p")
    assert error_of(raw.ask("KV.COMMIT", read)).startswith("KVLEASE ")


def test_shared_memory_can_be_off_or_read_only(start_server: StartServer, connect: Connect) -> None:
    off = connect(start_server(shm="off"))
    for words in (["KV.ATTACH"], ["KV.LEASE", "1", "p"], ["KV.RESERVE", "p", "10"]):
        assert "shared memory is off" in error_of(off.ask(*words))
    read_only = connect(start_server(shm="ro"))
    read_only.ask("KV.PUT", "p", b"x" * 1000)
    assert read_only.ask("KV.ATTACH")[3] == b"ro"
    lease, (offset, length) = read_only.ask("KV.LEASE", 1, "p")
    with map_arena(read_only) as arena:
        assert arena[offset : offset + length] == b"x" * 1000
        with pytest.raises(TypeError):
            arena[offset] = 1
    assert "read-only" in error_of(read_only.ask("KV.RESERVE", "p", "10"))
    assert read_only.ask("KV.RELEASE", lease) == 1


def test_a_thousand_pages_in_one_lease(raw: Raw, server: ServerProcess, arena: mmap.mmap) -> None:
    keys = [f"p{each}" for each in range(1000)]
    raw.ask_all([("KV.PUT", key, key.encode() * 100) for key in keys])
    lease, *places = raw.ask("KV.LEASE", 1000, *keys)
    for key, (offset, length) in zip(keys, places, strict=True):
        assert arena[offset : offset + length] == key.encode() * 100
    assert len({offset for offset, _ in places}) == 1000
    assert number_of(server, "kv_leases") == 1
    assert raw.ask("KV.RELEASE", lease) == 1


def test_a_writer_that_is_killed_cannot_write_into_the_next_page(
    start_server: StartServer, connect: Connect
) -> None:
    """The server closes the connection, but its process lives and has the mapping."""
    server = start_server(shm="rw", maxmemory="16mb")
    writer, other = connect(server), connect(server)
    number = writer.ask("CLIENT", "ID")
    _, offset = writer.ask("KV.RESERVE", "a", MIB)
    assert other.ask("CLIENT", "KILL", "ID", number) == 1
    places = [other.ask("KV.RESERVE", f"b{each}", MIB)[1] for each in range(8)]
    assert offset not in places
