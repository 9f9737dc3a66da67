"""Several objects and processes with one store: puts, deletions, evictions, restarts, crashes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from respkv.client import Client
from respkv.embedded import open_sync
from respkv.errors import ConfigError
from respkv.semantic import SemanticCache
from tests.conftest import StartServer
from tests.semantic.conftest import OpenCache
from tests.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
EAST, NORTH = [1, 0, 0, 0], [0, 1, 0, 0]


def eventually(holds: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 60
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_two_objects_see_each_others_puts_replacements_and_deletions(
    open_cache: OpenCache,
) -> None:
    one, other = open_cache(), open_cache()
    assert other.get(EAST) is None
    for round_ in range(20):
        one.put([1, round_, 0, 0], f"{round_}", key="moving")
        found = other.get([1, round_, 0, 0], threshold=0.9999999)
        assert found is not None, f"round {round_}"
        assert found.payload == f"{round_}"
    assert other.delete("moving")
    assert one.get([1, 19, 0, 0]) is None
    assert eventually(lambda: one.stats().entries == other.stats().entries == 0)


def test_a_cleared_tenant_is_seen_by_all(open_cache: OpenCache) -> None:
    one, other = open_cache(), open_cache()
    one.put(EAST, "east")
    assert other.get(EAST) is not None
    one.clear()
    assert other.get(EAST) is None


def test_a_flush_is_seen_by_all() -> None:
    with open_sync(maxmemory="64mb", prefault=False) as engine:
        with SemanticCache(engine, dim=4) as one, SemanticCache(engine, dim=4) as other:
            one.put(EAST, "east")
            assert other.get(EAST) is not None
            engine.command("FLUSHALL")
            assert other.get(EAST) is None
            assert other.stats().entries == 0
            other.put(EAST, "again")
            assert one.get(EAST) is not None
        with SemanticCache(engine, dim=5) as another:
            with pytest.raises(ConfigError, match="dim=4, not dim=5"):
                another.get([1, 2, 3, 4, 5])


def test_what_the_server_evicts_leaves_the_index(start_server: StartServer) -> None:
    server = start_server(maxmemory="16mb")
    with SemanticCache(server.url, dim=4, max_payload_bytes=1 << 20) as answers:
        for number in range(60):
            answers.put([1, number, 0, 0], bytes(1 << 19), key=str(number))
        kept = answers.search(EAST, 99)
        assert 5 <= len(kept) < 35
        assert eventually(lambda: len(answers.search(EAST, 99)) and answers.stats().entries < 35)
        assert answers.stats().entries == len(answers.search(EAST, 99))


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_restart_with_files_keeps_the_entries(
    start_server: StartServer, tmp_path: Path, end: signal.Signals
) -> None:
    settings = {"nvme_path": tmp_path / "nvme", "nvme_bytes": "64mb", "maxmemory": "32mb"}
    server = start_server(**settings)
    random = numpy.random.default_rng(3)
    vectors = random.standard_normal((40, 4))
    with SemanticCache(server.url, dim=4, durability="written") as answers:
        for number, vector in enumerate(vectors):
            answers.put(vector, bytes([number]) * 20_000, tenant=f"t{number % 2}")
        before = [answers.search(vector, 5, tenant="t1") for vector in vectors[:10]]
    server.process.send_signal(end)
    server.process.wait(60)
    again = start_server(**settings)
    with SemanticCache(again.url, dim=4, durability="written") as answers:
        assert [answers.search(vector, 5, tenant="t1") for vector in vectors[:10]] == before
        assert answers.stats().entries == 40


def test_an_object_finds_everything_after_its_connection_was_cut(
    server: ServerProcess, namespace: str
) -> None:
    with Client(server.url) as client:
        one = SemanticCache(server.url, namespace, dim=4)
        other = SemanticCache(server.url, namespace, dim=4)
        assert one.get(EAST) is None
        client.command("CLIENT", "KILL", "TYPE", "PUBSUB")
        other.put(EAST, "east")
        assert one.get(EAST) is not None
        assert one.stats().rescans == 2
        one.close()
        other.close()


WRITER = """
import sys
from respkv.embedded import open_sync
from respkv.errors import ConfigError
from respkv.semantic import SemanticCache
url, namespace, number = sys.argv[1:]
answers = SemanticCache(url, namespace, dim=4, max_entries=30)
print("ready", flush=True)
step = 0
while True:
    step += 1
    answers.put([1, int(number), step % 100, step % 13], f"{number}:{step}" * 2000)
"""


def test_killed_writers_leave_whole_entries_and_no_more_than_may_be(
    server: ServerProcess, namespace: str
) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, server.url, namespace, str(number)],
            cwd=ROOT,
            env=os.environ,
            stdout=subprocess.PIPE,
        )
        for number in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
        with SemanticCache(server.url, namespace, dim=4, max_entries=30) as answers:
            assert eventually(lambda: len(answers.search(EAST, 99)) >= 25)
            for writer in writers:
                writer.kill()
                writer.wait()
            found = answers.search(EAST, 99)
            for hit in found:
                assert isinstance(hit.payload, str)
                head = hit.payload[: len(hit.payload) // 2000]
                assert hit.payload == head * 2000
            # Each writer may have died with one too many in the store; the next put lets them go.
            assert len(found) <= 32
            answers.put(NORTH, "last")
            assert len(answers.search(EAST, 99)) <= 30
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            if writer.stdout is not None:
                writer.stdout.close()


def test_a_forked_child_listens_for_itself(server: ServerProcess, namespace: str) -> None:
    with SemanticCache(server.url, namespace, dim=4) as answers:
        answers.put(EAST, "east")
        child = os.fork()
        if child == 0:  # pragma: no cover: another process
            status = 1
            try:
                answers.put(NORTH, "from the child")
                status = 0 if answers.get(EAST) is not None else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        found = answers.get(NORTH)
        assert found is not None
        assert found.payload == "from the child"
