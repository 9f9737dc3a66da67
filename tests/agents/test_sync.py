"""Working memory over a server and over an engine in this process."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import msgspec
import pytest

from respkv.agents import WorkingMemory
from respkv.client import Client
from respkv.errors import ConfigError, ConnectionLost, PageCorrupt
from tests.agents.conftest import OpenMemory
from tests.conftest import StartServer
from tests.server_process import ServerProcess

ROOT = Path(__file__).parents[2]


def test_values_are_kept_as_they_were_given(open_memory: OpenMemory) -> None:
    memory = open_memory()
    assert memory.get("plan") is None
    assert memory.get("plan", 5) == 5
    plan = {"steps": ["look", "think"], "cost": 1.5, "image": b"\x00\xff", "done": False, "n": None}
    memory.set("plan", plan)
    memory.set("title", "ä")
    assert open_memory().get("plan") == plan
    assert memory.names() == ["plan", "title"]
    assert memory.snapshot() == {"plan": plan, "title": "ä"}
    assert memory.delete("plan")
    assert not memory.delete("plan")
    assert memory.clear()
    assert not memory.clear()
    assert memory.names() == []


def test_lists_grow_at_their_end_and_lose_their_beginning(open_memory: OpenMemory) -> None:
    memory = open_memory(max_items=4)
    assert memory.list("log") == []
    assert memory.append("log", "a", "b") == 2
    assert memory.append("log", {"c": b"d"}) == 3
    assert memory.append("log", 4, 5) == 4
    assert memory.list("log") == ["b", {"c": b"d"}, 4, 5]
    assert memory.list("log", 2) == [4, 5]
    assert memory.list("log", 0) == []
    assert memory.list("log", 99) == memory.list("log")
    memory.set("title", "x")
    for wrong in (lambda: memory.append("title", 1), lambda: memory.list("title")):
        with pytest.raises(TypeError, match="'title' is a str, not a list"):
            wrong()


def test_update_is_one_step(open_memory: OpenMemory) -> None:
    memory = open_memory()
    assert memory.update("count", lambda count: count + 1, 0) == 1
    assert memory.update("count", lambda count: count + 1, 0) == 2

    def fail(_: Any) -> Any:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        memory.update("count", fail)
    assert memory.get("count") == 2


def test_the_size_of_a_session_is_bounded(open_memory: OpenMemory) -> None:
    memory = open_memory(max_bytes=2000)
    memory.set("a", "x" * 900)
    with pytest.raises(ValueError, match=r"the session would have 20\d\d bytes; max_bytes is 2000"):
        memory.set("b", b"y" * 1100)
    for number in range(100):
        memory.append("log", f"{number:03}" * 20)
    kept = memory.list("log")
    assert 10 <= len(kept) < 20
    assert kept[-1] == "099" * 20
    assert memory.get("a") == "x" * 900
    with pytest.raises(ValueError, match="max_bytes is 2000"):
        memory.append("log", b"y" * 1200)
    assert memory.list("log") == kept


def test_every_call_begins_the_time_to_live_anew(open_memory: OpenMemory, session: str) -> None:
    memory = open_memory(ttl_s=5000)
    memory.set("a", 1)
    for call in (
        lambda: memory.get("a"),
        memory.touch,
        memory.names,
        lambda: memory.append("l", 1),
    ):
        assert memory._cache.command("PEXPIRE", memory._core.key, 1_000_000) == 1
        assert call()
        assert 1_000_000 < cast(int, memory._cache.command("PTTL", memory._core.key)) <= 5_000_000
    brief = open_memory(ttl_s=0.05)
    brief.set("a", 1)
    time.sleep(0.1)
    assert memory.snapshot() == {}
    assert not memory.touch()
    lasting = open_memory(ttl_s=None)
    lasting.set("a", 1)
    assert lasting.touch()
    assert lasting._cache.command("PTTL", lasting._core.key) == -1


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a", "b-c"), ("a-b", "c")), (("a:b", "c"), ("a", "b:c")), (("a", "*"), ("a", "?"))],
    ids=str,
)
def test_sessions_are_apart_whatever_is_in_their_names(
    open_memory: OpenMemory, one: tuple[str, str], other: tuple[str, str], session: str
) -> None:
    first = open_memory(*one, namespace=session)
    second = open_memory(*other, namespace=session)
    first.set("secret", 1)
    assert second.snapshot() == {}
    second.clear()
    assert first.get("secret") == 1
    assert open_memory(*one, namespace="others").snapshot() == {}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({1, 2}, None),
        pytest.param(object(), "a value is made of None, bool", id="object"),
        (1 << 70, "a value is made of None, bool"),
        ("\ud800", "a value is made of None, bool"),
        pytest.param(datetime(2026, 1, 1), "list and dict, not datetime", id="time"),
        pytest.param(UUID(int=5), "list and dict, not UUID", id="uuid"),
        pytest.param([{"a": Decimal("1.5")}], "list and dict, not Decimal", id="decimal"),
        pytest.param(msgspec.Raw(b"\xc1"), "list and dict, not Raw", id="raw"),
        pytest.param(
            {(1, 2): 3}, r"a key of a dict is none of the last two, not \(1, 2\)", id="key"
        ),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_an_error(
    open_memory: OpenMemory, value: Any, said: str | None
) -> None:
    memory = open_memory()
    memory.set("a", 1)
    if said is None:  # msgpack has no sets: they come back as lists
        memory.set("b", value)
        assert sorted(memory.get("b")) == [1, 2]
        return
    for wrong in (lambda: memory.set("a", value), lambda: memory.append("l", value)):
        with pytest.raises(TypeError, match=said):
            wrong()
    assert memory.snapshot() == {"a": 1}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"agent": ""}, ValueError, "agent has 1 to 1024 bytes, not 0"),
        ({"session": "x" * 1025}, ValueError, "session has 1 to 1024 bytes, not 1025"),
        ({"session": 5}, TypeError, "session is a str, not int"),
        ({"agent": "\ud800"}, ValueError, "no text that can be written as UTF-8"),
        ({"ttl_s": 0}, ConfigError, "ttl_s = 0: accepted are more than 0"),
        ({"ttl_s": float("nan")}, ConfigError, "ttl_s = nan"),
        ({"max_items": 0}, ConfigError, "max_items = 0"),
        ({"max_items": 2.5}, ConfigError, "max_items = 2.5: accepted are whole numbers"),
        ({"max_bytes": "1mb"}, ConfigError, "max_bytes = '1mb': accepted are whole numbers"),
        ({"ttl_s": "1h"}, ConfigError, "ttl_s = '1h': accepted are"),
        ({"namespace": 3}, ConfigError, "namespace = 3"),
        ({"namespace": "a:b"}, ConfigError, "namespace = 'a:b'"),
        ({"cache": 5}, TypeError, "cache is a Client"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    settings: Any = {"cache": "respkv://127.0.0.1:1", "agent": "a", "session": "s"} | options
    with pytest.raises(error, match=said):
        WorkingMemory(**settings)


def test_what_is_nested_without_end_is_an_error(open_memory: OpenMemory) -> None:
    memory, twice, deep = open_memory(), [0], [0]
    twice += [twice, twice]  # type: ignore[list-item]
    for _ in range(200):
        deep = [deep]  # type: ignore[list-item]
    for value in (twice, deep):
        with pytest.raises(ValueError, match="at most 100 lists and dicts in each other"):
            memory.set("a", value)
    assert memory.names() == []


def test_a_session_that_is_not_there_is_not_made_by_deleting_from_it(
    open_memory: OpenMemory,
) -> None:
    memory = open_memory()
    assert not memory.delete("nothing")
    assert not memory.touch()
    assert not memory.clear()
    memory.set("a", 1)
    assert memory.delete("a")
    assert memory.touch()


def test_threads_lose_nothing(open_memory: OpenMemory) -> None:
    memory = open_memory()

    def work(number: int) -> None:
        memory.append("log", number)
        memory.update("sum", lambda total: total + number, 0)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(60)))
    assert sorted(memory.list("log")) == list(range(60))
    assert memory.get("sum") == sum(range(60))


APPENDER = """
import sys
from respkv.agents import WorkingMemory
url, session, number = sys.argv[1:]
memory = WorkingMemory(url, "planner", session)
print("ready", flush=True)
sys.stdin.readline()
for step in range(40):
    memory.append("log", [int(number), step])
"""


def test_appends_of_many_processes_are_all_there_each_ones_in_its_order(
    server: ServerProcess, session: str
) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDER, server.url, session, str(number)],
            cwd=ROOT,
            env=os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for number in range(4)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        writer.communicate(b"go\n", timeout=120)
        assert writer.returncode == 0
    with WorkingMemory(server.url, "planner", session) as memory:
        log = memory.list("log")
    for number in range(4):
        assert [step for writer, step in log if writer == number] == list(range(40))


def test_a_session_survives_a_restart_with_files(start_server: StartServer, tmp_path: Path) -> None:
    settings = {"nvme_path": tmp_path / "nvme", "nvme_bytes": "64mb", "maxmemory": "32mb"}
    server = start_server(**settings)
    with WorkingMemory(server.url, "a", "s") as memory:
        for number in range(30):
            memory.append("log", f"{number}" * 500)
        before = memory.list("log")
        assert server.stop() == 0
        with pytest.raises(ConnectionLost):
            memory.append("log", "x")
    again = start_server(**settings)
    with WorkingMemory(again.url, "a", "s") as memory:
        assert memory.list("log") == before
        assert memory.append("log", "x") == 31


def test_a_value_that_is_no_session_is_told_and_left_alone(
    server: ServerProcess, session: str
) -> None:
    with Client(server.url) as client, WorkingMemory(client, "a", session) as memory:
        memory.set("a", 1)
        client.set(memory._core.key, "what is this")
        calls: list[Callable[[], object]] = [memory.names, lambda: memory.set("a", 2)]
        for call in calls:
            with pytest.raises(PageCorrupt, match="is no session"):
                call()
        assert bytes(client.get(memory._core.key) or b"") == b"what is this"
        assert memory.clear()
        assert memory.names() == []
