"""Servers with file tiers over sockets: what they tell, what they refuse, what their clients see."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis as redis_py

from respkv.client import AsyncClient, Client
from respkv.errors import ServerError
from respkv.server import schema_files
from tests.server.raw import Raw, error_of, pipeline
from tests.server_process import ServerProcess

MIB = 1 << 20
PAGE = 2048
SHAPE = {"layers": 2, "heads": 2, "dim": 16, "tokens": 4, "dtype": "float32"}
Start = Callable[..., ServerProcess]
KINDS: dict[str, dict[str, object]] = {
    "io_uring": {"nvme_path": "a", "nvme_bytes": "256mb", "nvme_engine": "io_uring"},
    "threads": {"nvme_path": "a", "nvme_bytes": "256mb", "nvme_engine": "threads"},
    "disk": {"disk_path": "a", "disk_bytes": "256mb"},
}


def keys_of(count: int) -> list[bytes]:
    return [b"ns:" + bytes([number]).hex().encode() * 32 for number in range(count)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers whose tiers are in this test's folder; stop them afterwards."""
    started: list[ServerProcess] = []

    def begin(**settings: object) -> ServerProcess:
        for name in ("nvme_path", "disk_path"):
            if name in settings:
                settings[name] = tmp_path / str(settings[name])
        started.append(ServerProcess(maxmemory="16mb", promote="never", **settings))
        return started[-1]

    yield begin
    logs = [each.log for each in started if each.process.poll() is None]
    for each in started:
        each.stop()
    for log in logs:
        assert "Traceback" not in log, log


@pytest.fixture(params=KINDS)
def tiered(request: pytest.FixtureRequest, start: Start) -> ServerProcess:
    return start(**KINDS[request.param])


def letter_of(server: ServerProcess) -> str:
    return "n" if "kv_nvme_state" in server.info() else "d"


def page_of(number: int) -> memoryview:
    return memoryview(bytes([number]) * MIB)


def fill(client: Client, count: int = 48) -> None:
    """Store pages of 1 MiB that are three times as much as memory holds; the first are cold then."""
    for number, key in enumerate(keys_of(count)):
        assert client.put(key, bytes([number]) * MIB)


def test_pages_beyond_memory_are_read_by_every_command(tiered: ServerProcess) -> None:
    keys = keys_of(48)
    with Client(tiered.url) as client:
        fill(client)
        found = client.match(keys)
        assert found.pages == 48
        assert found.tiers.startswith(letter_of(tiered) * 30)
        assert found.tiers.endswith("c")
        assert found.load_us > 1000
        for number in (0, 47, 1):
            assert client.get(keys[number]) == page_of(number)
        pages = client.mget(keys)
        assert [page and page[0] for page in pages] == list(range(48))
        assert all(page is not None and len(page) == MIB for page in pages)
        into = [bytearray(MIB) for _ in range(3)]
        client.mget(keys[5:8], into=into)
        assert [buffer[MIB - 1] for buffer in into] == [5, 6, 7]
        assert client.exists(*keys) == 48
        with Client(tiered.url) as other:
            assert other.command("GET", keys[3]) == bytes([3]) * MIB
        assert client.get(b"ns:absent") is None


def test_a_deadline_is_kept_and_a_prefetch_is_there_for_it(tiered: ServerProcess) -> None:
    keys = keys_of(48)
    with Client(tiered.url) as client:
        fill(client)
        assert client.get(keys[0], deadline_ms=0) is None
        assert client.mget([keys[47], keys[1]], deadline_ms=0)[1] is None
        assert client.get(keys[2], deadline_ms=60_000) == page_of(2)
        assert client.prefetch([keys[5], keys[6], b"ns:no"]) == 2
        deadline = time.monotonic() + 60
        while client.match(keys[5:7]).tiers != "cc":
            assert time.monotonic() < deadline
        assert client.get(keys[5], deadline_ms=0) == page_of(5)
        assert client.prefetch([keys[5]]) == 0


def test_the_other_face_of_the_client_has_the_same_words(tiered: ServerProcess) -> None:
    async def talk() -> None:
        async with AsyncClient(tiered.url) as client:
            await client.schema_set("ns", **SHAPE, durability="written")  # type: ignore[arg-type]
            found = await client.schema_get("ns")
            assert found is not None
            assert found["durability"] == "written"
            key = keys_of(1)[0]
            page = memoryview(b"x" * PAGE)
            assert await client.put(key, page, durability="durable")
            assert await client.get(key, deadline_ms=1000) == page
            assert await client.mget([key], deadline_ms=1000) == [page]
            assert await client.prefetch([key]) == 0
            assert (await client.match([key])).tiers == "c"

    anyio.run(talk)


def test_redis_py_reads_what_only_files_have(tiered: ServerProcess) -> None:
    client: Any
    with redis_py.Redis(port=tiered.port) as client:
        for number in range(30):
            client.set(f"k{number}", bytes([number]) * MIB)
        assert client.info("persistence")["kv_cold"] > 10
        pipe = client.pipeline(transaction=False)
        for number in range(30):
            pipe.get(f"k{number}")
        assert [value[0] for value in pipe.execute()] == list(range(30))
        assert [value[0] for value in client.mget([f"k{number}" for number in range(30)])] == list(
            range(30)
        )
        assert client.getset("k0", b"new") == bytes([0]) * MIB
        assert client.getdel("k1") == bytes([1]) * MIB
        assert client.set("k2", b"x", get=True) == bytes([2]) * MIB
        assert client.strlen("k3") == MIB
        assert client.object("encoding", "k3") == b"raw"
        assert 300 < client.memory_usage("k3") < 3000
        assert client.exists("k1", "k2") == 1
        client.flushall()
        assert client.dbsize() == 0
        assert client.get("k5") is None


def test_what_is_told_about_a_cold_page(tiered: ServerProcess) -> None:
    key = keys_of(1)[0]
    tier = {"n": b"nvme", "d": b"disk"}[letter_of(tiered)]
    with Client(tiered.url) as client:
        fill(client)
        info: Any = client.command("KV.INFO", key)
        assert (info[b"tier"], info[b"tiers"], info[b"level"]) == (tier, [tier], b"memory")
        explained: Any = client.command("KV.EXPLAIN", key)
        assert explained[0] == b"cold"
        assert tier in explained[1]
        tiers: Any = client.command("KV.TIERS")
        cpu, file_tier = tiers
        assert cpu[b"name"] == b"cpu"
        assert (file_tier[b"name"], file_tier[b"state"]) == (tier, b"ok")
        assert file_tier[b"pages"] >= 30
        assert 0 < file_tier[b"used_bytes"] <= 256 * MIB == file_tier[b"capacity_bytes"]
        stats: Any = client.command("KV.STATS")
        assert stats[b"cold"] >= 30
        assert stats[tier + b"_state"] == b"ok"
        info_text = client.info()
        assert int(info_text["kv_dirty_bytes"]) >= 0
        # The bytes of a page are all alike here: a codec makes next to nothing of them.
        least = 1.0 if tier == b"nvme" else 0.0
        assert float(info_text[f"kv_{tier.decode()}_write_amplification"]) >= least


# -- schemas ----------------------------------------------------------------------------------------


def test_a_schema_is_saved_before_its_answer_in_every_tier(start: Start, tmp_path: Path) -> None:
    server = start(nvme_path="a", nvme_bytes="64mb", disk_path="b", disk_bytes="64mb")
    with Client(server.url) as client:
        client.schema_set("ns", **SHAPE, fingerprint=b"\x00\xff", durability="durable")  # type: ignore[arg-type]
        client.schema_set("other", **SHAPE, ttl_ms=5000)  # type: ignore[arg-type]
        saved = [(tmp_path / name / "schemas.json").read_bytes() for name in "ab"]
        assert saved[0] == saved[1]
        _, schemas = schema_files.decode(saved[0])
        assert [schema.namespace for schema in schemas] == [b"ns", b"other"]
        client.command("KV.SCHEMA", "DEL", "other")
    server.stop(signal.SIGKILL)
    (tmp_path / "a" / "schemas.json").unlink()
    server = start(nvme_path="a", nvme_bytes="64mb", disk_path="b", disk_bytes="64mb")
    with Client(server.url) as client:
        assert client.schema_list() == ["ns"]
        found = client.schema_get("ns")
        assert found is not None
        assert (found["fingerprint"], found["durability"]) == (b"\x00\xff", "durable")
        with pytest.raises(ServerError, match="KVSCHEMA"):
            client.put("ns:x", b"too short")


def test_damaged_schemas_are_counted_said_and_ignored(start: Start, tmp_path: Path) -> None:
    server = start(nvme_path="a", nvme_bytes="64mb", disk_path="b", disk_bytes="64mb")
    with Client(server.url) as client:
        client.schema_set("ns", **SHAPE)  # type: ignore[arg-type]
    server.stop()
    path = tmp_path / "a" / "schemas.json"
    path.write_bytes(path.read_bytes().replace(b'"layers": 2', b'"layers": 3'))
    server = start(nvme_path="a", nvme_bytes="64mb", disk_path="b", disk_bytes="64mb")
    with Client(server.url) as client:
        found = client.schema_get("ns")
        assert found is not None
        assert found["layers"] == 2
        assert client.info()["kv_schemas_damaged"] == "1"
    assert "schemas.json of tier nvme is ignored" in server.log


# -- refusals ---------------------------------------------------------------------------------------


def refusal(*words: object) -> str:
    """Return the one line with which a server says why it does not start."""
    command = [sys.executable, "-m", "respkv", "serve", "--port", "0", "--maxmemory", "16mb"]
    done = subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("respkv: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0].removeprefix("respkv: ")


@pytest.mark.parametrize("name", ["nvme", "disk"])
def test_a_directory_that_cannot_be_had_is_one_line(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    option, size = f"--{name}-path", (f"--{name}-bytes", "64mb")
    assert (
        refusal(option, file, *size) == f"{name}-path {file}: it is a file; a directory is needed"
    )
    deep = tmp_path / "no" / "such"
    assert refusal(option, deep, *size) == (
        f"{name}-path {deep}: there is no {tmp_path / 'no'} to make it in"
    )
    assert not (tmp_path / "no").exists()


def test_only_the_last_level_of_a_path_is_made(start: Start, tmp_path: Path) -> None:
    start(nvme_path="new", nvme_bytes="64mb")
    assert (tmp_path / "new" / "superblock").exists()


def test_a_directory_in_use_names_who_uses_it(start: Start, tmp_path: Path) -> None:
    server = start(nvme_path="a", nvme_bytes="64mb")
    text = refusal("--nvme-path", tmp_path / "a", "--nvme-bytes", "64mb")
    assert str(server.process.pid) in text
    assert str(tmp_path / "a") in text
    with Client(server.url) as client:
        assert client.set("k", "v")


def test_the_log_tells_where_each_tier_is_and_what_the_end_wrote(
    start: Start, tmp_path: Path
) -> None:
    server = start(nvme_path="a", nvme_bytes="64mb", disk_path="b", disk_bytes="512tb")
    assert f"tier nvme in {tmp_path / 'a'} (" in server.log
    assert f"tier disk in {tmp_path / 'b'} (aiofiles), up to 512tb: recovered 0" in server.log
    assert "damaged" not in server.log
    (warning,) = (line for line in server.log.splitlines() if "WARNING disk-bytes" in line)
    assert str(tmp_path / "b") in warning
    with Client(server.url) as client:
        client.set("k", "v")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert "stopped: 1 values written in " in server.log.splitlines()[-1]


def test_another_tiers_directory_is_named_with_the_refusal(start: Start, tmp_path: Path) -> None:
    start(nvme_path="a", nvme_bytes="64mb").stop()
    both = ("--nvme-path", tmp_path / "c", "--nvme-bytes", "64mb")
    text = refusal(*both, "--disk-path", tmp_path / "a", "--disk-bytes", "64mb")
    assert str(tmp_path / "a") in text
    assert "belong to the tier nvme" in text


def test_schemas_of_a_newer_version_are_refused(start: Start, tmp_path: Path) -> None:
    start(nvme_path="a", nvme_bytes="64mb").stop()
    body = json.loads(schema_files.encode(7, []))
    body["version"] = 2
    del body["checksum"]
    body["checksum"] = schema_files.checksum(body)
    (tmp_path / "a" / "schemas.json").write_text(json.dumps(body))
    text = refusal("--nvme-path", tmp_path / "a", "--nvme-bytes", "64mb")
    assert "schemas.json has version 2, this server reads up to 1" in text


def test_words_that_need_a_tier_are_refused_without_one(raw: Raw) -> None:
    for word in ("WRITTEN", "DURABLE"):
        expected = f"ERR {word} needs a tier that survives a restart; this server has none"
        assert error_of(raw.ask("KV.PUT", "k", "x", word)) == expected
        shape = ("LAYERS", 1, "HEADS", 1, "DIM", 1, "TOKENS", 1, "DTYPE", "int8")
        asked = raw.ask("KV.SCHEMA", "SET", "ns9", *shape, "DURABILITY", word)
        assert error_of(asked) == expected
    assert raw.ask("KV.GET", "none", "DEADLINE", 0) is None
    assert raw.ask("KV.PREFETCH", 2, "a", "b") == 0
    assert raw.ask("KV.PREFETCH", 1, "a", "TO", "CPU") == 0
    assert error_of(raw.ask("KV.PREFETCH", 1, "a", "TO", "tape")).startswith("ERR TO tape")


@pytest.mark.parametrize(
    "words",
    [("WRITTEN", "DURABLE"), ("DURABLE", "DURABLE"), ("NX", "WRITTEN", "NX"), ("DURABILITY",)],
)
def test_levels_that_contradict_are_refused(words: tuple[str, ...], start: Start) -> None:
    server = start(nvme_path="a", nvme_bytes="64mb")
    with Raw(server.connect()) as raw:
        assert error_of(raw.ask("KV.PUT", "k", "x", *words)).startswith("ERR syntax error")


# -- stopping ---------------------------------------------------------------------------------------


def test_what_waits_for_a_commit_is_answered_before_a_stop(tiered: ServerProcess) -> None:
    with Raw(tiered.connect()) as raw:
        puts = [("KV.PUT", f"k{number}", b"x" * 1000, "DURABLE") for number in range(200)]
        raw.socket.sendall(pipeline(puts))
        deadline = time.monotonic() + 60
        with Client(tiered.url) as client:
            while not client.exists("k199"):
                assert time.monotonic() < deadline
        tiered.process.send_signal(signal.SIGTERM)
        assert raw.wait_closed() == b"+OK\r\n" * 200
    assert tiered.process.wait(timeout=60) == 0


def test_a_warm_start_has_what_was_in_memory(start: Start) -> None:
    server = start(nvme_path="a", nvme_bytes="64mb")
    with Raw(server.connect()) as raw:
        for number in range(100):
            assert raw.ask("SET", f"k{number}", b"v" * 5000) == b"OK"
    assert server.stop() == 0
    server = start(nvme_path="a", nvme_bytes="64mb")
    with Raw(server.connect()) as raw:
        assert raw.ask("DBSIZE") == 100
        assert raw.ask("MGET", *(f"k{number}" for number in range(100))) == [b"v" * 5000] * 100
    assert "recovered 100 keys in " in server.log
