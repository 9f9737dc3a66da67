"""Leases and reservations of both faces, against a respkv server with shared memory."""

import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from respkv.client import AsyncClient, Client, as_bytes, as_numpy, as_torch
from respkv.embedded import AsyncEmbeddedCache, EmbeddedCache
from respkv.errors import ConfigError, LeaseGone, ProtocolError, ServerError, TimedOut
from tests.client.pages import NBYTES, SHAPE, chain, declare, payload
from tests.client.peer import Answer, Peer
from tests.server_process import ServerProcess

Connect = Callable[..., Any]
StartServer = Callable[..., ServerProcess]


@pytest.fixture
def other(client: Any, server: ServerProcess) -> Iterator[Any]:
    """Return a second client that looks on; an embedded engine has only the one."""
    if isinstance(getattr(client, "target", client), EmbeddedCache | AsyncEmbeddedCache):
        yield client
        return
    with Client(server.url) as looking:
        yield looking


def read(lease: Any) -> bytes:
    """Return a copy of the first page of a lease."""
    return bytes(lease.pages[0])


def test_a_lease_shows_pages_in_the_servers_memory(client: Any, namespace: str) -> None:
    first, second = chain(namespace, 2)
    client.put(first, payload(1))
    with client.lease([first, second], ms=60_000) as lease:
        page, missing = lease.pages
        assert missing is None
        assert page.readonly
        assert page == payload(1)
        assert as_numpy(page, "float16", SHAPE).tobytes() == payload(1)
        assert as_bytes(as_torch(page, "float16", SHAPE)) == payload(1)
    with pytest.raises(ValueError, match="released"):
        page[0]


def test_an_array_of_a_leased_page_stays_mapped_after_the_lease_and_the_client(
    server: ServerProcess, namespace: str
) -> None:
    (key,) = chain(namespace, 1)
    with Client(server.url) as client:
        client.put(key, payload(1))
        with client.lease([key]) as lease:
            (page,) = lease.pages
            assert page is not None
            array = as_numpy(page, "float16", SHAPE)
            tensor = as_torch(page, "float16", SHAPE)
    del client, lease, page
    assert array.nbytes == tensor.nbytes == NBYTES
    assert bytes(as_bytes(array)) == bytes(as_bytes(tensor)), "whatever it is, it can be read"


def wait_until_lapsed(client: Any) -> None:
    """Wait until the server, which looks ten times a second, has found that no lease is in force."""
    deadline = time.monotonic() + 60
    while client.info("kv")["kv_leases"] != "0":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lease_that_lapsed_is_told_on_leaving(client: Any, other: Client, namespace: str) -> None:
    (key,) = chain(namespace, 1)
    client.put(key, payload(1))
    with pytest.raises(LeaseGone, match="void"):
        with client.lease([key], ms=50):
            wait_until_lapsed(other)
    client.ping()


def test_a_readers_own_error_is_not_hidden_by_a_lapsed_lease(
    client: Any, other: Client, namespace: str
) -> None:
    (key,) = chain(namespace, 1)
    client.put(key, payload(1))

    def fail_late() -> None:
        with client.lease([key], ms=50):
            wait_until_lapsed(other)
            raise KeyError

    with pytest.raises(KeyError):
        fail_late()


def test_a_lease_whose_connection_broke_is_gone(
    connect: Connect, start_server: StartServer
) -> None:
    own = start_server(shm="ro")
    client = connect(own.url, reconnect_max=0)
    client.put("page", payload(1))

    def read_late() -> None:
        with client.lease(["page"]) as lease:
            own.stop()
            assert read(lease) == payload(1), "late, but never a fault"

    with pytest.raises(LeaseGone, match="broke"):
        read_late()


def test_a_leased_page_stays_while_others_come(namespace: str, start_server: StartServer) -> None:
    own = start_server(shm="ro", maxmemory="32mb")
    with Client(own.url) as client:
        client.put("leased", payload(1, 1 << 20))
        with client.lease(["leased"], ms=60_000) as lease:
            for index in range(80):
                client.put(f"page{index}", payload(2, 1 << 20))
            assert read(lease) == payload(1, 1 << 20)


def test_a_page_is_written_in_the_servers_memory(
    client: Any, other: Client, namespace: str
) -> None:
    declare(client, namespace)
    (key,) = chain(namespace, 1)
    with client.reserve(key, NBYTES, ms=60_000) as slot:
        assert slot.view.nbytes == NBYTES
        slot.view[:] = payload(5)
        assert other.exists(key) == 0, "nobody sees it before it is committed"
        assert slot.commit(tokens=4) is True
        assert bytes(other.get(key) or b"") == payload(5)
        with pytest.raises(LeaseGone, match="before"):
            slot.commit()
    assert client.get(key) == payload(5)


def test_a_tensor_is_written_in_the_servers_memory(client: Any, namespace: str) -> None:
    (key,) = chain(namespace, 1)
    tensor = torch.randn(SHAPE).to(torch.bfloat16)
    with client.reserve(key, tensor.nbytes) as slot:
        as_torch(slot.view, "bfloat16", SHAPE).copy_(tensor)
        slot.commit()
    assert torch.equal(as_torch(client.get(key), "bfloat16", SHAPE), tensor)


def test_leaving_without_commit_leaves_nothing(client: Any, namespace: str) -> None:
    (key,) = chain(namespace, 1)
    with client.reserve(key, NBYTES) as slot:
        slot.view[:4] = b"half"
    assert client.exists(key) == 0
    with pytest.raises(KeyError):
        with client.reserve(key, NBYTES) as slot:
            raise KeyError
    assert client.exists(key) == 0


def test_a_commit_that_comes_too_late_publishes_nothing(
    client: Any, other: Client, namespace: str
) -> None:
    (key,) = chain(namespace, 1)
    with client.reserve(key, NBYTES, ms=50) as slot:
        slot.view[:] = payload(1)
        wait_until_lapsed(other)
        with pytest.raises(LeaseGone, match="50 ms"):
            slot.commit()
    assert client.exists(key) == 0


def test_a_commit_of_a_page_that_is_there_says_so(client: Any, namespace: str) -> None:
    (key,) = chain(namespace, 1)
    client.put(key, payload(1))
    with client.reserve(key, NBYTES) as slot:
        slot.view[:] = payload(1)
        assert slot.commit(nx=True) is False


def test_a_refused_commit_can_be_left(client: Any, namespace: str) -> None:
    (key,) = chain(namespace, 1)
    with client.reserve(key, NBYTES) as slot:
        with pytest.raises(ServerError, match="PARENT"):
            slot.commit(parent=key)
    assert client.exists(key) == 0
    client.put(key, payload(1))


def test_a_reservation_of_the_wrong_size_is_refused(client: Any, namespace: str) -> None:
    declare(client, namespace)
    with pytest.raises(ServerError) as caught:
        with client.reserve(chain(namespace, 1)[0], NBYTES + 1):
            raise AssertionError("it must not be entered")
    assert caught.value.word == "KVSCHEMA"


def test_a_lease_keeps_its_connection_and_the_pool_is_bounded(
    connect: Connect, server: ServerProcess, namespace: str
) -> None:
    client = connect(server.url, pool_max=1)
    (key,) = chain(namespace, 1)
    client.put(key, payload(1))
    with client.lease([key]):
        with pytest.raises(TimedOut, match="all 1 connections stayed in use"):
            client.within(0.3).ping()
    client.ping()


def test_without_shared_memory_the_error_says_what_to_start(
    connect: Connect, start_server: StartServer
) -> None:
    client = connect(start_server().url)
    client.put("page", payload(1))
    for entered in (client.lease(["page"]), client.reserve("other", NBYTES)):
        with pytest.raises(ServerError, match=r"off; start the server .* --shm rw$"):
            with entered:
                raise AssertionError("it must not be entered")
    assert client.get("page") == payload(1)


def test_shared_memory_for_reading_only_says_so(
    connect: Connect, start_server: StartServer
) -> None:
    client = connect(start_server(shm="ro").url)
    client.put("page", payload(1))
    with client.lease(["page"]) as lease:
        assert read(lease) == payload(1)
    with pytest.raises(ConfigError, match="--shm rw"):
        with client.reserve("other", NBYTES):
            raise AssertionError("it must not be entered")


def test_a_server_that_started_again_is_not_read_through_its_old_memory(
    connect: Connect, start_server: StartServer, tmp_path: Path
) -> None:
    place = {"shm": "rw", "shm_path": str(tmp_path / "arena"), "unixsocket": str(tmp_path / "s")}
    first = start_server(**place)
    client = connect(f"unix://{tmp_path}/s")
    client.put("page", payload(1))
    with client.lease(["page"]) as lease:
        assert read(lease) == payload(1)
    first.stop()
    start_server(**place)
    client.put("page", payload(2))
    with client.lease(["page"]) as lease:
        assert read(lease) == payload(2)


def test_threads_lease_and_write_together(server: ServerProcess, namespace: str) -> None:
    failures: list[BaseException] = []
    with Client(server.url, pool_max=4) as client:

        def work(name: int) -> None:
            try:
                for turn in range(10):
                    key = f"{namespace}-{name}-{turn}"
                    with client.reserve(key, NBYTES) as slot:
                        slot.view[:] = payload(name)
                        slot.commit()
                    with client.lease([key]) as lease:
                        assert read(lease) == payload(name)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.anyio
async def test_a_cancelled_reader_lets_go_of_its_lease(
    server: ServerProcess, namespace: str
) -> None:
    (key,) = chain(namespace, 1)
    async with AsyncClient(server.url, pool_max=1, timeout_s=60) as client:
        await client.put(key, payload(1))
        with anyio.move_on_after(0.1) as scope:
            async with client.lease([key], ms=60_000):
                await anyio.sleep(60)
        assert scope.cancelled_caught
        with anyio.move_on_after(0.1) as scope:
            async with client.reserve(f"{namespace}-x", NBYTES, ms=60_000):
                await anyio.sleep(60)
        assert scope.cancelled_caught
        assert bytes(await client.get(key) or b"") == payload(1)
        with anyio.fail_after(60):  # the server sees the end of a connection in its own time
            while await holders(client, key) != 1:  # noqa: ASYNC110
                await anyio.sleep(0.01)


async def holders(client: AsyncClient, key: bytes) -> object:
    """Return how many hold a page, the cache among them."""
    reply = await client.command("KV.INFO", key)
    assert isinstance(reply, dict)
    return reply[b"holders"]


def test_a_forked_child_holds_no_lease_and_the_parents_stays(
    server: ServerProcess, namespace: str
) -> None:
    script = """
import os, sys
from respkv.client import Client
from respkv.errors import LeaseGone
client = Client(sys.argv[1])
key = sys.argv[2]
client.put(key, b"page" * 100000)
with client.lease([key]) as lease:
    pid = os.fork()
    if pid == 0:
        try:
            lease.__exit__(None, None, None)
        except LeaseGone:
            os._exit(7 if bytes(client.get(key)[:4]) == b"page" else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
client.close()
"""
    line = [sys.executable, "-c", script, server.url, f"{namespace}-forked"]
    subprocess.run(line, check=True, timeout=120)


@pytest.mark.parametrize(
    ("answers", "raised", "named"),
    [
        ({b"KV.LEASE": b"*1\r\n:1\r\n"}, ProtocolError, "1 keys, 0 places"),
        ({b"KV.LEASE": b"*2\r\n:1\r\n*2\r\n:-60\r\n:5\r\n"}, ProtocolError, "not within"),
        ({b"KV.LEASE": b"*2\r\n:1\r\n*2\r\n:8\r\n:-5\r\n"}, ProtocolError, "not within"),
        ({b"KV.LEASE": b"*2\r\n:1\r\n*2\r\n:60\r\n:5\r\n"}, ProtocolError, "not within"),
        ({b"KV.LEASE": b"*2\r\n:1\r\n*2\r\n+a\r\n:5\r\n"}, ProtocolError, "not a place"),
        ({b"KV.LEASE": b"+OK\r\n"}, ProtocolError, "answered with bytes"),
        ({b"KV.LEASE": b"-OOM no room\r\n"}, ServerError, "no room"),
        ({b"KV.LEASE": b"*2\r\n:1\r\n*2\r\n:0\r\n:5\r\n", b"KV.RELEASE": None}, LeaseGone, "broke"),
    ],
    ids=[
        "too few",
        "before",
        "less than none",
        "outside",
        "no place",
        "no array",
        "refused",
        "broken",
    ],
)
def test_a_lease_that_is_answered_wrongly_is_not_held(
    connect: Connect,
    tmp_path: Path,
    answers: dict[bytes, bytes | None],
    raised: type[Exception],
    named: str,
) -> None:
    with Peer(tmp_path / "s", _arena_peer(tmp_path, answers)) as peer:
        client = connect(peer.url)
        with pytest.raises(raised, match=named), client.lease(["key"]):
            pass
        client.ping()
        client.close()


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (b"*2\r\n:1\r\n*2\r\n:0\r\n:5\r\n", "something else"),
        (b"*3\r\n:1\r\n$0\r\n\r\n$0\r\n\r\n", "something else"),
        (b"*2\r\n:1\r\n$15\r\n" + bytes(15) + b"\r\n", "something else"),
        (b"*2\r\n:1\r\n$32\r\n" + bytes(32) + b"\r\n", "1 keys, 2 places"),
        (b"*2\r\n:1\r\n$16\r\n" + struct.pack("<qq", 60, 5) + b"\r\n", "not within"),
        (b"*2\r\n:1\r\n$16\r\n" + struct.pack("<qq", -1, 5) + b"\r\n", "not within"),
    ],
    ids=["plain", "two", "uneven", "too many", "outside", "before"],
)
def test_a_packed_lease_that_is_answered_wrongly_is_not_held(
    connect: Connect, tmp_path: Path, answer: bytes, named: str
) -> None:
    answers = {b"KV.LEASE": answer}
    with Peer(tmp_path / "s", _arena_peer(tmp_path, answers, packs=True)) as peer:
        client = connect(peer.url)
        with pytest.raises(ProtocolError, match=named), client.lease(["key"]):
            pass
        client.ping()
        client.close()


def test_a_lease_says_where_pages_are_in_the_servers_memory(client: Any, namespace: str) -> None:
    keys = chain(namespace, 3)
    for number in (0, 2):
        client.put(keys[number], payload(number))
    with client.lease(keys) as lease:
        assert lease.memory.readonly
        assert lease.places[1] is None
        for number in (0, 2):
            offset, nbytes = lease.places[number]
            assert lease.memory[offset : offset + nbytes] == payload(number)
        assert lease.memory is lease.memory
        whole = lease.memory
        assert [page is None for page in lease.pages] == [False, True, False]
    assert lease.places == []
    with pytest.raises(ValueError, match="released"):
        whole[0]


def test_a_server_that_does_not_pack_is_asked_plainly(connect: Connect, tmp_path: Path) -> None:
    asked = list[list[bytes]]()
    answers = {b"KV.LEASE": b"*3\r\n:1\r\n*2\r\n:8\r\n:5\r\n$-1\r\n", b"KV.RELEASE": b":1\r\n"}
    known = _arena_peer(tmp_path, answers)

    def answer(args: list[bytes]) -> bytes | None:
        asked.append(args)
        return known(args)

    with Peer(tmp_path / "s", answer) as peer:
        client = connect(peer.url)
        with client.lease(["key", "other"]) as lease:
            assert lease.places == [(8, 5), None]
        client.close()
    assert asked[1] == [b"KV.LEASE", b"2", b"key", b"other"]


def test_a_commit_that_the_server_calls_lapsed_is_lease_gone(
    connect: Connect, tmp_path: Path
) -> None:
    answers = {b"KV.RESERVE": b"*2\r\n:1\r\n:8\r\n", b"KV.COMMIT": b"-KVLEASE it lapsed\r\n"}
    with Peer(tmp_path / "s", _arena_peer(tmp_path, answers)) as peer:
        client = connect(peer.url)
        with client.reserve("key", 16) as slot:
            slot.view[:] = b"x" * 16
            with pytest.raises(LeaseGone, match="it lapsed"):
                slot.commit()
        client.close()
    assert peer.seen == [b"KV.ATTACH", b"KV.RESERVE", b"KV.COMMIT"], "nothing left to abort"


def _arena_peer(
    folder: Path, answers: Mapping[bytes, bytes | None], *, packs: bool = False
) -> Answer:
    path = folder / "arena"
    path.write_bytes(bytes(64))
    attach = b"*4\r\n$%d\r\n%b\r\n:64\r\n:1\r\n+rw\r\n" % (len(bytes(path)), bytes(path))
    if packs:
        attach = b"*6" + attach[2:] + b"$-1\r\n$6\r\npacked\r\n"
    known = {b"PING": b"+PONG\r\n", b"KV.ATTACH": attach, **answers}
    return lambda args: known[args[0]]
