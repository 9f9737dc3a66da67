"""A tier's directory that is left out of a run does not bring back what ended in it."""

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from respkv.client import Client
from respkv.server.run_marks import UNMARKED, Mark, decode, encode, next_mark, read_marks, stale
from tests.server_process import ServerProcess

PAGE = b"ns:" + b"ab" * 32
BOTH = ("nvme", "disk")
Start = Callable[..., ServerProcess]


def get(client: Client, key: bytes) -> bytes | None:
    found = client.get(key)
    return None if found is None else bytes(found)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server with some of two tiers; an earlier one is stopped."""
    started: list[ServerProcess] = []

    def begin(*tiers: str, number: int = signal.SIGTERM) -> ServerProcess:
        if started:
            started[-1].stop(number)
        settings: dict[str, object] = {}
        for tier in tiers:
            settings |= {f"{tier}_path": tmp_path / tier, f"{tier}_bytes": "64mb"}
        started.append(ServerProcess(maxmemory="16mb", **settings))
        return started[-1]

    yield begin
    if started[-1].process.poll() is None:
        log = started[-1].log
        started[-1].stop()
        assert "Traceback" not in log, log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_deleted_while_a_directory_was_left_out_stays_away(
    start: Start, number: int
) -> None:
    with Client(start("disk").url) as client:
        for key in (b"deleted", b"overwritten", PAGE):
            client.put(key, b"old" * 1000, durability="durable")
    with Client(start("nvme", number=number).url) as client:
        client.put(b"overwritten", b"new" * 1000, durability="durable")
        client.put(b"mine", b"m" * 1000, durability="durable")
    for stale_count in ("2", "0"):  # and it does not come back at the next start either
        server = start(*BOTH, number=number)
        with Client(server.url) as client:
            assert get(client, b"deleted") is None
            assert get(client, b"overwritten") == b"new" * 1000
            assert get(client, b"mine") == b"m" * 1000
            assert get(client, PAGE) == b"old" * 1000
            client.put(b"after", b"a" * 1000, durability="durable")
            assert client.info()["kv_disk_stale"] == stale_count
            assert ("left out" in server.log) == (stale_count != "0")
    with Client(start(*BOTH, number=number).url) as client:
        assert get(client, b"after") == b"a" * 1000


def test_a_start_that_fails_is_no_run(start: Start, tmp_path: Path) -> None:
    with Client(start(*BOTH).url) as client:
        client.put(b"k", b"v" * 1000, durability="durable")
    start("nvme").stop(signal.SIGKILL)
    (tmp_path / "nvme").rename(tmp_path / "away")
    (tmp_path / "nvme").write_text("not a directory")
    with pytest.raises(AssertionError, match="it is a file"):
        start(*BOTH)
    (tmp_path / "nvme").unlink()
    (tmp_path / "away").rename(tmp_path / "nvme")
    marks = read_marks([(tier, str(tmp_path / tier)) for tier in BOTH])
    assert stale(marks) == {1}


def test_a_directory_that_is_new_or_was_emptied_misses_nothing(
    start: Start, tmp_path: Path
) -> None:
    with Client(start("nvme").url) as client:
        client.put(b"k", b"v" * 1000, durability="durable")
    server = start(*BOTH)
    with Client(server.url) as client:
        assert get(client, b"k") == b"v" * 1000
    server.stop()
    shutil.rmtree(tmp_path / "disk")
    with Client(start(*BOTH).url) as client:
        assert get(client, b"k") == b"v" * 1000


def test_a_tier_without_a_mark_beside_one_with_a_mark_has_missed_a_run(
    start: Start, tmp_path: Path
) -> None:
    server = start(*BOTH)
    with Client(server.url) as client:
        client.put(b"k", b"v" * 1000, durability="durable")
    server.stop()
    (tmp_path / "nvme" / "run").write_bytes(b"respkv run 1 0123 4567\n")
    server = start(*BOTH)
    with Client(server.url) as client:
        assert get(client, b"k") is None
    assert "the file run in" in server.log
    assert "tier nvme was left out of the last run: 1 values that may be old" in server.log


def test_the_last_run_is_the_one_that_started_last() -> None:
    one, other, two = Mark(1, "a"), Mark(1, "b"), Mark(2, "c")
    assert stale([UNMARKED]) == stale([one]) == stale([one, one]) == stale([UNMARKED] * 2) == set()
    assert stale([one, two]) == {0}
    assert stale([UNMARKED, one]) == {0}
    assert stale([two, None]) == {1}
    assert stale([None, None]) == {0, 1}
    assert len(stale([one, other])) == 1  # each has missed the run of the other
    assert next_mark([one, two, None], 100).started_ms == 100
    assert next_mark([one, two, None], 0).started_ms == 3  # the clock was set back
    assert next_mark([], 5).name != next_mark([], 5).name


def test_a_mark_with_any_wrong_byte_is_none() -> None:
    data = encode(Mark(17, "0123456789abcdef"))
    assert decode(data) == Mark(17, "0123456789abcdef")
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            assert decode(bytes(flipped)) is None
    rng = random.Random(1)
    for length in (0, 1, 17, 5000):
        assert decode(rng.randbytes(length)) is None
    for at in range(len(data)):
        assert decode(data[:at]) is None
    assert decode(data + b"x") is None
