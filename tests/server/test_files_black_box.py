"""What a server with file tiers keeps over a stop, a crash and another start; seen by redis-py."""

import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import xxhash

from tests.server.conftest import check_log
from tests.server_process import ServerProcess

SIZES = [0, 1, 448, 449, 4095, 4096, 65_535, 65_536, 300_000, 1 << 20]
PAGES = 6
TIERS: dict[str, dict[str, object]] = {
    "io_uring": {"nvme_bytes": "64mb"},
    "threads": {"nvme_bytes": "64mb", "nvme_engine": "threads"},
    "disk": {"disk_bytes": "64mb"},
    "both": {"nvme_bytes": "64mb", "disk_bytes": "128mb"},
}
START_S = 120.0


def value(number: int, nbytes: int = 100_000) -> bytes:
    return random.Random(number).randbytes(nbytes)


def page_key(number: int) -> str:
    return f"model:{number:064x}"


class Restarted:
    """A server on directories of its own, started again and again."""

    def __init__(self, folder: Path, tiers: dict[str, object]) -> None:
        self.folder = folder
        self.settings: dict[str, object] = {"maxmemory": "32mb", **tiers}
        for tier in ("nvme", "disk"):
            if f"{tier}_bytes" in tiers:
                self.settings[f"{tier}_path"] = folder / tier
        self.start()

    def start(self, **changed: object) -> None:
        self.settings |= changed
        self.server = ServerProcess(**self.settings)
        self.client: Any = redis.Redis(port=self.server.port, protocol=3)

    def stop(self) -> None:
        self.client.close()
        check_log(self.server.log)
        assert self.server.stop() == 0

    def kill(self) -> None:
        self.client.close()
        check_log(self.server.log)
        self.server.stop(signal.SIGKILL)

    def restart(self, **changed: object) -> None:
        self.stop()
        self.start(**changed)

    def crash(self, **changed: object) -> None:
        self.kill()
        self.start(**changed)

    def do(self, *words: Any) -> Any:
        return self.client.execute_command(*words)

    def page(self, number: int, *options: Any) -> None:
        assert self.do("KV.PUT", page_key(number), value(number), *options) == b"OK"

    def info_of(self, key: str) -> dict[bytes, Any]:
        found = self.do("KV.INFO", key)
        assert isinstance(found, dict)
        return found


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[dict[str, object]], Restarted]]:
    made: list[Restarted] = []

    def start(tiers: dict[str, object]) -> Restarted:
        made.append(Restarted(tmp_path, tiers))
        return made[-1]

    yield start
    for each in made:
        each.client.close()
        each.server.stop(signal.SIGKILL)


@pytest.fixture(params=TIERS)
def kept(request: pytest.FixtureRequest, make: Callable[..., Restarted]) -> Restarted:
    return make(TIERS[request.param])


@pytest.fixture
def nvme(make: Callable[..., Restarted]) -> Restarted:
    return make(TIERS["io_uring"])


def test_values_of_every_size_survive_a_restart(kept: Restarted) -> None:
    for nbytes in SIZES:
        kept.client.set(f"plain:{nbytes}", value(nbytes, nbytes))
        kept.do("KV.PUT", f"page:{nbytes}", value(nbytes + 1, nbytes + 1))
    for _ in range(2):
        kept.restart()
        assert kept.client.dbsize() == 2 * len(SIZES)
        for nbytes in SIZES:
            assert kept.client.get(f"plain:{nbytes}") == value(nbytes, nbytes)
            assert kept.client.get(f"page:{nbytes}") == value(nbytes + 1, nbytes + 1)
            assert kept.client.strlen(f"plain:{nbytes}") == nbytes


def test_what_is_in_files_alone_is_there_for_every_command(kept: Restarted) -> None:
    kept.client.set("plain", value(1))
    kept.client.set("other", 41)
    kept.page(1)
    kept.restart()
    client = kept.client
    assert client.exists("plain", "other", page_key(1)) == 3
    assert client.type("plain") == b"string"
    assert client.type(page_key(1)) == b"kvpage"
    assert client.strlen("plain") == 100_000
    assert sorted(client.scan_iter()) == sorted([b"plain", b"other", page_key(1).encode()])
    assert client.ttl("plain") == -1
    assert client.mget("plain", "absent", "other") == [value(1), None, b"41"]
    assert client.set("other", 42, get=True) == b"41"
    assert client.getex("plain", px=100_000) == value(1)
    assert client.getdel("other") == b"42"
    assert client.memory_usage("plain") > 100_000


def test_times_to_live_survive_a_restart(kept: Restarted) -> None:
    kept.client.set("long", value(1), px=1_000_000)
    kept.client.set("changed", value(2), px=5)
    kept.client.set("short", value(3), px=1500)
    kept.page(5, "PX", 2_000_000)
    with kept.client.pipeline(transaction=False) as at_once:  # before either time has ended
        at_once.set("changed", value(2), px=500).pexpire("changed", 3_000_000)
        at_once.set("persisted", value(4), px=1500).persist("persisted")
        assert at_once.execute() == [True] * 4
    began = time.monotonic()
    kept.restart()
    assert 950_000 < kept.client.pttl("long") <= 1_000_000
    assert 2_950_000 < kept.client.pttl("changed") <= 3_000_000
    assert 1_950_000 < kept.client.pttl(page_key(5)) <= 2_000_000
    assert kept.client.pttl("persisted") == -1
    time.sleep(max(0, began + 1.6 - time.monotonic()))
    assert kept.client.get("short") is None
    kept.restart()
    assert kept.client.exists("short") == 0
    assert kept.client.get("changed") == value(2)
    assert kept.client.get("persisted") == value(4)


def test_pins_parents_and_all_that_describes_a_page_survive_a_restart(kept: Restarted) -> None:
    for number in range(PAGES):
        parent = ("PARENT", page_key(number - 1)) if number else ()
        kept.page(number, *parent, "TOKENS", 16 + number, "PRIORITY", number)
    kept.do("KV.PIN", page_key(2), 500_000)
    kept.do("KV.PIN", page_key(3), 500_000)
    kept.do("KV.UNPIN", page_key(3))
    kept.restart()
    for number in range(PAGES):
        found = kept.info_of(page_key(number))
        assert found[b"parent"] == (page_key(number - 1).encode() if number else None)
        assert found[b"children"] == (number < PAGES - 1)
        assert found[b"tokens"] == 16 + number
        assert found[b"priority"] == number
        assert found[b"bytes"] == 100_000
        assert found[b"type"] == b"kvpage"
    assert 450_000 < kept.info_of(page_key(2))[b"pinned_ms"] <= 500_000
    assert kept.info_of(page_key(3))[b"pinned_ms"] == 0
    keys = [page_key(number) for number in range(PAGES)]
    pages, letters, load_us = kept.do("KV.MATCH", PAGES + 1, *keys, page_key(99))
    assert pages == PAGES
    assert set(letters.decode()) <= set("nd")
    assert load_us > 0
    assert kept.do("KV.MGET", PAGES, *keys) == [value(number) for number in range(PAGES)]


SCHEMA = [
    "LAYERS",
    "2",
    "HEADS",
    "1",
    "DIM",
    "8",
    "TOKENS",
    "16",
    "DTYPE",
    "float16",
    "FINGERPRINT",
    "abc",
    "TTL",
    "900000",
]
SCHEMA_PAGE = bytes(range(256)) * 4


def test_schemas_survive_a_restart_and_a_crash(kept: Restarted) -> None:
    kept.do("KV.SCHEMA", "SET", "model", *SCHEMA, "DURABILITY", "durable")
    kept.do("KV.SCHEMA", "SET", "other", *SCHEMA)
    kept.do("KV.SCHEMA", "SET", "gone", *SCHEMA)
    kept.do("KV.SCHEMA", "DEL", "gone")
    before = kept.do("KV.SCHEMA", "GET", "model")
    assert kept.do("KV.PUT", page_key(1), SCHEMA_PAGE) == b"OK"
    for again in (kept.crash, kept.restart):
        again()
        assert kept.do("KV.SCHEMA", "GET", "model") == before
        assert sorted(kept.do("KV.SCHEMA", "LIST")) == [b"model", b"other"]
        with pytest.raises(redis.ResponseError, match="1024"):
            kept.do("KV.PUT", page_key(2), b"too short")
        assert kept.client.get(page_key(1)) == SCHEMA_PAGE, "the namespace is durable"
        assert 800_000 < kept.client.pttl(page_key(1)) <= 900_000
        half = kept.do("KV.GET", page_key(1), "LAYERS", 1, 1)
        assert half == SCHEMA_PAGE[512:]


@pytest.mark.parametrize("word", ["WRITTEN", "DURABLE"])
def test_an_acknowledged_page_survives_a_crash(kept: Restarted, word: str) -> None:
    for number in range(20):
        kept.page(number, word)
        assert kept.do("KV.PUT", f"mutable:{number}", value(number), word) == b"OK"
    for _ in range(2):
        kept.crash()
        for number in range(20):
            assert kept.client.get(page_key(number)) == value(number)
            assert kept.client.get(f"mutable:{number}") == value(number)


def test_the_setting_durability_holds_for_ordinary_values(kept: Restarted) -> None:
    kept.restart(durability="durable")
    kept.client.set("plain", value(1))
    kept.client.mset({"one": 1, "two": 2})
    kept.client.set("timed", b"x", ex=1000)
    kept.client.set("one", 10)
    kept.client.delete("two")
    kept.crash()
    assert kept.client.get("plain") == value(1)
    assert kept.client.mget("one", "two", "timed") == [b"10", None, b"x"]
    assert 900 < kept.client.ttl("timed") <= 1000


# What changes or removes a durable value, "100", of a key of its own, and what it leaves.
WRITES: dict[str, tuple[list[tuple[Any, ...]], bytes | None]] = {
    "set": ([("SET", "KEY", "new")], b"new"),
    "set-get": ([("SET", "KEY", "new", "GET")], b"new"),
    "set-xx": ([("SET", "KEY", "new", "XX")], b"new"),
    "setex": ([("SETEX", "KEY", 1000, "new")], b"new"),
    "psetex": ([("PSETEX", "KEY", 10**6, "new")], b"new"),
    "mset": ([("MSET", "a", "1", "KEY", "new")], b"new"),
    "getset": ([("GETSET", "KEY", "new")], b"new"),
    "del": ([("DEL", "KEY")], None),
    "unlink": ([("UNLINK", "KEY")], None),
    "getdel": ([("GETDEL", "KEY")], None),
    "expire": ([("PEXPIRE", "KEY", 1)], None),
    "expired": ([("EXPIRE", "KEY", -1)], None),
    "expireat": ([("EXPIREAT", "KEY", 1)], None),
    "getex": ([("GETEX", "KEY", "PX", 1)], None),
    "set-px": ([("SET", "KEY", "new", "PX", 1)], None),
    "put": ([("KV.PUT", "KEY", "new")], b"new"),
    "put-written": ([("KV.PUT", "KEY", "new", "WRITTEN")], b"new"),
    "put-durable": ([("KV.PUT", "KEY", "new", "DURABLE")], b"new"),
    "put-large": ([("KV.PUT", "KEY", value(5))], value(5)),
    "del-set": ([("DEL", "KEY"), ("SET", "KEY", "new")], b"new"),
    "del-setnx": ([("DEL", "KEY"), ("SETNX", "KEY", "new")], b"new"),
    "del-msetnx": ([("DEL", "KEY"), ("MSETNX", "KEY", "new", "KEY2", "b")], b"new"),
    "set-del": ([("SET", "KEY", "new"), ("DEL", "KEY")], None),
    "set-set": ([("SET", "KEY", "newer"), ("SET", "KEY", "new")], b"new"),
    "durable-del": ([("KV.PUT", "KEY", "new", "DURABLE"), ("DEL", "KEY")], None),
    "durable-set": ([("KV.PUT", "KEY", "newer", "DURABLE"), ("SET", "KEY", "new")], b"new"),
}


@pytest.mark.parametrize("how", ["as it is", "after a restart", "after a load", "in a pipeline"])
@pytest.mark.parametrize("tier", ["io_uring", "disk"])
def test_no_crash_brings_a_durable_value_back(
    tier: str, how: str, make: Callable[..., Restarted]
) -> None:
    kept = make(TIERS[tier])
    for name in WRITES:
        kept.do("KV.PUT", name, "100", "DURABLE")
    kept.do("KV.PUT", "bystander", value(1), "DURABLE")
    if how == "after a restart":
        kept.restart()
    if how == "after a load":
        kept.restart()
        assert kept.client.mget(WRITES) == kept.client.mget(WRITES) == [b"100"] * len(WRITES)
    pipe = kept.client.pipeline(transaction=False)
    for name, (commands, _) in WRITES.items():
        for words in commands:
            named = [word.replace("KEY", name) if isinstance(word, str) else word for word in words]
            (pipe.execute_command if how == "in a pipeline" else kept.do)(*named)
    pipe.execute()
    time.sleep(0.02)
    for again in (kept.crash, kept.restart):
        again()
        for name, (_, left) in WRITES.items():
            assert kept.client.get(name) in (left, None), name
        assert kept.client.get("bystander") == value(1)
        assert kept.client.get("put-durable") == b"new"


def test_a_flush_is_not_undone_by_a_crash(kept: Restarted) -> None:
    for number in range(30):
        kept.page(number, "DURABLE")
        kept.do("KV.PUT", f"mutable:{number}", value(number), "DURABLE")
    kept.client.flushall()
    kept.page(100, "DURABLE")
    for again in (kept.crash, kept.restart):
        again()
        assert kept.client.keys() == [page_key(100).encode()]
        assert kept.client.get(page_key(100)) == value(100)


@pytest.mark.alone  # it fills the machine
def test_more_than_memory_holds_is_kept_and_served(kept: Restarted) -> None:
    count = 500  # 50 MB for 32 MiB of memory and 128 MiB of files
    caps = {name: "128mb" for name in kept.settings if name in ("nvme_bytes", "disk_bytes")}
    kept.restart(reserve_timeout=120_000, shutdown_timeout=50, **caps)
    for number in range(count):
        kept.page(number, *([] if number % 2 else ["WRITTEN"]))
        # What has not been written within a second may be given up for the next.
        while number % 20 == 0 and kept.client.info("persistence")["kv_is_behind"]:
            time.sleep(0.01)
    for again in (None, kept.restart):
        if again is not None:
            again()
        assert kept.client.dbsize() == count
        for number in range(count):
            assert kept.client.get(page_key(number)) == value(number)


def test_a_pipeline_of_gets_from_files_keeps_its_order(kept: Restarted) -> None:
    for number in range(100):
        kept.page(number)
    kept.restart()
    order = [random.Random(7).randrange(120) for _ in range(400)]
    pipe = kept.client.pipeline(transaction=False)
    for number in order:
        pipe.get(page_key(number))
    expected = [value(number) if number < 100 else None for number in order]
    assert pipe.execute() == expected


def test_a_tier_may_come_and_go_between_two_starts(nvme: Restarted) -> None:
    for number in range(50):
        nvme.page(number)
    disk = {"disk_path": nvme.folder / "disk", "disk_bytes": "64mb"}
    nvme.restart(**disk)
    assert [nvme.client.get(page_key(number)) for number in range(50)] == list(
        map(value, range(50))
    )
    nvme.client.delete(page_key(0))
    nvme.page(60)
    nvme.restart(disk_path="", disk_bytes=0)
    assert nvme.client.get(page_key(0)) is None
    for number in [*range(1, 50), 60]:
        assert nvme.client.get(page_key(number)) in (value(number), None)


def test_a_smaller_cap_holds_from_the_next_start_on(kept: Restarted) -> None:
    for number in range(500):
        kept.page(number, "WRITTEN")
    caps = {name: "40mb" for name in kept.settings if name in ("nvme_bytes", "disk_bytes")}
    kept.restart(**caps)
    for tier in ("nvme", "disk"):
        if f"{tier}_bytes" in caps:
            deadline = time.monotonic() + 60
            while taken_bytes(kept.folder / tier) > 40 << 20:
                assert time.monotonic() < deadline, f"{taken_bytes(kept.folder / tier)} bytes"
                time.sleep(0.05)
    found = [kept.client.get(page_key(number)) for number in range(500)]
    assert any(found)
    assert all(got in (value(number), None) for number, got in enumerate(found))


def taken_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def refused(kept: Restarted) -> str:
    """Start another server on the same directories, which must refuse; return its one line."""
    words = [sys.executable, "-m", "respkv", "serve", "--port", "0", "--maxmemory", "32mb"]
    for tier in ("nvme", "disk"):
        if f"{tier}_bytes" in kept.settings:
            words += [f"--{tier}-path", str(kept.folder / tier), f"--{tier}-bytes", "64mb"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_second_server_on_a_directory_is_refused(kept: Restarted) -> None:
    kept.page(1, "DURABLE")
    line = refused(kept)
    tier = "nvme" if "nvme_bytes" in kept.settings else "disk"
    assert str(kept.folder / tier) in line
    assert str(kept.server.process.pid) in line
    assert kept.client.get(page_key(1)) == value(1)
    kept.crash()
    assert kept.client.get(page_key(1)) == value(1), "a lock dies with its owner"


def test_files_of_a_newer_version_are_refused_and_left_alone(kept: Restarted) -> None:
    kept.page(1, "DURABLE")
    kept.stop()
    tier = "nvme" if "nvme_bytes" in kept.settings else "disk"
    superblock = kept.folder / tier / "superblock"
    old = superblock.read_bytes()
    magic, version = struct.unpack_from("<8sI", old)
    front = struct.pack("<8sI12x", magic, version + 1)
    front += xxhash.xxh3_64_digest(front)[::-1]
    half = len(old) // 2
    superblock.write_bytes(front + old[32:half] + front + old[half + 32 :])
    before = {path: path.read_bytes() for path in kept.folder.rglob("segment-*")}
    line = refused(kept)
    assert f"format {version + 1}" in line
    assert str(kept.folder / tier) in line
    assert {path: path.read_bytes() for path in kept.folder.rglob("segment-*")} == before
    superblock.write_bytes(old)
    kept.start()
    assert kept.client.get(page_key(1)) == value(1)


def test_another_tiers_files_are_refused(make: Callable[..., Restarted], tmp_path: Path) -> None:
    kept = make(TIERS["disk"])
    kept.page(1, "DURABLE")
    kept.stop()
    (tmp_path / "disk").rename(tmp_path / "nvme")
    kept.settings = {"nvme_bytes": "64mb"}
    assert "disk" in refused(kept)


def test_a_stop_with_no_time_loses_no_acknowledged_page(kept: Restarted) -> None:
    kept.restart(shutdown_timeout=0)
    for start in (0, 200):
        for number in range(start, start + 200):
            kept.page(number, *(["DURABLE"] if number % 2 else []))
        kept.restart()
        for number in range(start, start + 200):
            got = kept.client.get(page_key(number))
            assert got == value(number) or (got is None and number % 2 == 0)


def test_the_io_engine_in_use_is_in_info(make: Callable[..., Restarted]) -> None:
    kept = make(TIERS["threads"])
    assert kept.server.info()["kv_nvme_engine"] == "threads"
    assert kept.server.info()["kv_nvme_state"] == "ok"
    kept.restart(nvme_engine="auto")
    assert kept.server.info()["kv_nvme_engine"] in ("io_uring", "threads")
