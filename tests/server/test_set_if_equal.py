"""SET with IFEQ, Valkey's compare-and-set: in one step, whatever the size and wherever the value is."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from respkv.client import Client
from respkv.errors import ServerError
from tests.conftest import StartServer
from tests.server_process import ServerProcess


@pytest.mark.parametrize("size", [0, 5, 448, 449, 100_000], ids=str)
def test_a_value_is_stored_only_over_the_one_that_is_named(
    size: int, server: ServerProcess
) -> None:
    old, new = b"a" * size, b"b" * size
    with Client(server.url) as client:
        client.delete("k")
        assert client.command("SET", "k", new, "IFEQ", old) is None
        assert client.exists("k") == 0
        client.set("k", old)
        assert client.command("SET", "k", new, "IFEQ", old + b"x") is None
        assert client.command("SET", "k", new, "IFEQ", old, "PX", 100_000) == b"OK"
        assert bytes(client.get("k") or b"") == new
        assert 0 < int(str(client.command("PTTL", "k"))) <= 100_000
        if size:
            assert client.command("SET", "k", b"c", "IFEQ", old) is None
        for expected in (new, b"c"):
            before = client.command("SET", "k", b"c", "IFEQ", new, "GET")
            assert isinstance(before, bytes | memoryview)
            assert bytes(before) == expected
        assert bytes(client.get("k") or b"") == b"c"


@pytest.mark.parametrize("words", ["NX IFEQ a", "IFEQ a XX", "IFEQ a IFEQ a", "IFEQ"], ids=str)
def test_if_equal_goes_with_no_other_condition_and_needs_a_value(
    words: str, server: ServerProcess
) -> None:
    with Client(server.url) as client, pytest.raises(ServerError, match="syntax error"):
        client.command("SET", "k", "v", *words.split())


def test_of_many_who_count_at_once_nobody_is_lost(server: ServerProcess) -> None:
    with Client(server.url) as client:
        client.set("count", 0)

        def count(_: int) -> None:
            while True:
                seen = int(bytes(client.get("count") or b""))
                if client.command("SET", "count", seen + 1, "IFEQ", seen) is not None:
                    return

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(count, range(200)))
        assert bytes(client.get("count") or b"") == b"200"


def test_a_value_that_is_only_in_a_file_is_compared_too(
    start_server: StartServer, tmp_path: object
) -> None:
    settings = {"nvme_path": f"{tmp_path}/nvme", "nvme_bytes": "64mb", "shm": "off"}
    server = start_server(**settings)
    value = b"v" * 10_000
    with Client(server.url) as client:
        client.set("k", value)
    server.process.terminate()
    assert server.process.wait(60) == 0
    again = start_server(**settings)
    with Client(again.url) as client:
        assert client.command("SET", "k", b"w", "IFEQ", b"x" * 10_000) is None
        assert client.command("SET", "k", b"w", "IFEQ", value) == b"OK"
        assert bytes(client.get("k") or b"") == b"w"
