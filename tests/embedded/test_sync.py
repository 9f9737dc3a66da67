"""The embedded engine for blocking code: what it does beyond what tests/client shows of it, too."""

import gc
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread
import numpy
import pytest

import respkv
from respkv.client import Client
from respkv.embedded import EmbeddedCache
from respkv.errors import (
    CacheError,
    ConfigError,
    ConnectionLost,
    OutOfMemory,
    ServerError,
    TierError,
)
from tests.client.pages import declare, payload

MIB = 1 << 20


def small(**settings: object) -> EmbeddedCache:
    return respkv.open_sync(**{"maxmemory": "16mb", "prefault": False, **settings})  # type: ignore[arg-type]


def test_it_is_a_client(cache: EmbeddedCache) -> None:
    assert isinstance(cache, Client)
    cache.ping()
    assert cache.set("key", "value") is True
    assert cache.command("GET", "key") == b"value"
    assert cache.info()["process_id"] == str(os.getpid())
    with pytest.raises(ServerError, match="unknown command"):
        cache.command("NONSENSE")


def test_what_it_is_opened_with_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"maxmemory = 'much': accepted are"):
        respkv.open_sync(maxmemory="much")
    with pytest.raises(ConfigError, match="pool_max is 0"):
        respkv.open_sync(pool_max=0)


def test_calls_after_closing_say_so() -> None:
    cache = small()
    cache.ping()
    cache.close()
    cache.close()
    with pytest.raises(ConnectionLost, match="closed"):
        cache.ping()


def test_what_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(CacheError, match="nvme-path"):
        small(nvme_path=tmp_path / "no" / "where", nvme_bytes="16mb")
    with pytest.raises(CacheError, match="lower maxmemory"):
        small(maxmemory="1000tb")
    assert not set(threading.enumerate()) - before


def test_no_port_is_opened(cache: EmbeddedCache) -> None:
    inodes = _own_sockets()
    listening = {
        words[9]
        for name in ("tcp", "tcp6")
        for words in map(str.split, Path(f"/proc/self/net/{name}").read_text().splitlines()[1:])
        if words[3] == "0A"
    }
    assert not inodes & listening
    named = [line.split() for line in Path("/proc/self/net/unix").read_text().splitlines()[1:]]
    assert not inodes & {words[6] for words in named if len(words) > 7}
    assert cache.info()["tcp_port"] == "0"


def _own_sockets() -> set[str]:
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(path)
        except FileNotFoundError:  # of the listing itself
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def test_the_process_is_left_as_it_is(tmp_path: Path) -> None:
    def state() -> list[object]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        root = logging.getLogger()
        return [
            *map(signal.getsignal, numbers),
            *(gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
            *(root.level, list(root.handlers), list(logging.getLogger("respkv").handlers)),
            resource.getrlimit(resource.RLIMIT_NOFILE),
            os.umask(os.umask(0o022)),
            socket.getdefaulttimeout(),
            threading.current_thread() is threading.main_thread(),
        ]

    os.umask(0o022)
    before = state()
    with small(nvme_path=tmp_path / "nvme", nvme_bytes="16mb", check_interval=1) as cache:
        assert state() == before
        cache.put("key", payload(1, MIB))
        assert state() == before
    assert state() == before


def test_the_collector_is_never_called(cache: EmbeddedCache) -> None:
    runs: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if threading.current_thread().name == "respkv-engine":
            runs.append(phase)

    gc.collect()
    gc.disable()
    gc.callbacks.append(note)
    try:
        time.sleep(0.35)  # the keeper of a server collects ten times a second
    finally:
        gc.callbacks.remove(note)
        gc.enable()
    assert runs == []


def test_a_page_is_copied_once_on_either_way(cache: EmbeddedCache) -> None:
    page = payload(3, 8 * MIB)
    before = cache.info()
    cache.put("page", page)
    memory = bytearray(8 * MIB)
    assert cache.get("page", into=memory) is not None
    assert memory == page
    after = cache.info()

    def more(name: str) -> int:
        return int(after[name]) - int(before[name])

    assert more("kv_bytes_staged") <= 4096, "so much is read before a slot is taken"
    assert more("kv_bytes_landed") >= 8 * MIB - 4096
    assert more("kv_bytes_sent_in_place") == 8 * MIB


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 65535, 65536, 65537, MIB, MIB + 1])
def test_values_of_any_size_come_back(cache: EmbeddedCache, nbytes: int) -> None:
    value = payload(nbytes, nbytes)
    cache.set("value", value)
    assert cache.command("GET", "value") == value
    page = value + b"."
    cache.put("page", page)
    assert bytes(cache.get("page") or b"") == page
    assert cache.mget(["page", "none", "page"]) == [page, None, page]


def test_a_pipeline_puts_and_gets_at_once(cache: EmbeddedCache) -> None:
    pipeline = cache.pipeline()
    values = [payload(number, 1 + number * 1000) for number in range(200)]
    for number, value in enumerate(values):
        pipeline.command("KV.PUT", f"page{number}", value)
        pipeline.command("KV.GET", f"page{number}")
    replies = pipeline.execute()
    assert replies[::2] == [b"OK"] * 200
    assert replies[1::2] == values


def test_long_pipelines_do_not_wait_for_themselves(cache: EmbeddedCache) -> None:
    pipeline = cache.pipeline()
    value = payload(1, 10_000)
    cache.set("value", value)
    for _ in range(3000):
        pipeline.command("GET", "value").command("ECHO", value)
    replies = pipeline.execute()
    assert len(replies) == 6000
    assert all(reply == value for reply in replies)


def test_many_threads_share_it(cache: EmbeddedCache) -> None:
    def work(number: int) -> None:
        for turn in range(20):
            value = payload(number * 100 + turn, 1000 * (1 + (number * 7 + turn) % 90))
            cache.put(f"page-{number}-{turn}", value)
            assert bytes(cache.get(f"page-{number}-{turn}") or b"") == value
            with cache.lease([f"page-{number}-{turn}"]) as lease:
                assert bytes(lease.pages[0] or b"") == value

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(work, range(12)))


def test_more_threads_than_connections_wait_their_turn() -> None:
    with small(pool_max=2) as cache, ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda number: cache.set(f"key{number}", "value"), range(200)))
        assert cache.command("DBSIZE") == 200
        assert int(cache.info()["connected_clients"]) <= 2


def test_a_get_that_is_left_half_keeps_nobody_waiting() -> None:
    cache = small(shutdown_timeout=100)
    declare(cache, "half")
    prompt = list(range(512))
    kv = numpy.zeros((4, 2, 512, 2, 16), "float16")
    cache.seq.put("half", prompt, kv)
    layers = cache.seq.get("half", prompt)
    next(layers)
    began = time.monotonic()
    cache.close()
    assert time.monotonic() - began < 60, "as long as shutdown-timeout lets an answer leave: 100 s"
    with pytest.raises(ConnectionLost):
        list(layers)


def test_what_is_being_read_stays_though_it_was_evicted(cache: EmbeddedCache) -> None:
    cache.schema_set("wide", layers=24, heads=4, dim=64, tokens=64, dtype="float16")
    prompt = list(range(1024))
    kv = numpy.random.default_rng(1).integers(0, 1 << 16, (24, 2, 1024, 4, 64), "uint16")
    cache.seq.put("wide", prompt, kv)
    layers = cache.seq.get("wide", prompt)
    got = [bytes(next(layers))]
    cache.command("FLUSHALL")
    for number in range(24):  # more than the rest of memory
        cache.put(f"other{number}", payload(number, 4 * MIB))
    got += [bytes(layer) for layer in layers]
    assert got == [layer.tobytes() for layer in kv]
    deadline = time.monotonic() + 60
    while cache.info()["kv_sending"] != "0":
        assert time.monotonic() < deadline, "they are not given back"
        time.sleep(0.01)


def test_a_thread_that_waits_is_told_of_the_end() -> None:
    cache = small()
    told: list[BaseException] = []
    waits = threading.Event()

    def listen() -> None:
        with cache.listen("news") as messages:
            waits.set()
            try:
                messages.next()
            except ConnectionLost as error:
                told.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    waits.wait()
    cache.close()
    thread.join(60)
    assert len(told) == 1


def test_an_interrupt_ends_the_call_alone(cache: EmbeddedCache) -> None:
    def interrupt() -> None:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with cache.listen("news") as messages:

        def wait_for_the_interrupt() -> None:
            thread.start()
            messages.next(60)

        with pytest.raises(KeyboardInterrupt):
            wait_for_the_interrupt()
        cache.command("PUBLISH", "news", "still here")
        found = messages.next(60)
        assert found is not None
        assert found.data == b"still here"
    thread.join()


def test_messages_and_events_come(cache: EmbeddedCache) -> None:
    with cache.listen("news", patterns=["n*"]) as messages, cache.events() as events:
        assert cache.command("PUBLISH", "news", "x" * 100_000) == 2
        assert [len(messages.next(10).data) for _ in range(2)] == [100_000] * 2  # type: ignore[union-attr]
        cache.put("model:0", b"page")
        event = events.next(10)
        assert event is not None
        assert (event.kind, event.key, event.namespace) == ("stored", b"model:0", b"model")


def test_who_listens_and_is_forgotten_is_forgotten_by_the_engine_too(cache: EmbeddedCache) -> None:
    before = cache.info()["connected_clients"]
    for _ in range(5):
        cache.listen("channel").__enter__()
        cache.events("n").__enter__()
    gc.collect()
    cache.ping()  # behind the farewells
    assert cache.info()["connected_clients"] == before
    assert cache.command("PUBSUB", "CHANNELS") == []


def test_what_only_memory_held_is_written_at_the_end(tmp_path: Path) -> None:
    settings = {"nvme_path": tmp_path / "nvme", "nvme_bytes": "32mb"}
    with small(**settings) as cache:
        for number in range(4):
            cache.put(f"page{number}", payload(number, MIB))
        with pytest.raises(TierError, match=f"in use by process {os.getpid()}"):
            small(**settings)
        assert bytes(cache.get("page0") or b"") == payload(0, MIB), (
            "the failed one has broken nothing"
        )
    with small(**settings) as cache:
        assert [bytes(cache.get(f"page{number}") or b"") for number in range(4)] == [
            payload(number, MIB) for number in range(4)
        ]


def test_every_file_tier_serves(tmp_path: Path) -> None:
    with small(
        nvme_path=tmp_path / "nvme",
        nvme_bytes="16mb",
        disk_path=tmp_path / "disk",
        disk_bytes="64mb",
    ) as cache:
        pages = {f"page{number}": payload(number, MIB) for number in range(20)}
        for key, page in pages.items():
            cache.put(key, page)
        assert {key: bytes(cache.get(key) or b"") for key in pages} == pages
        with cache.lease(["page0", "page1"]) as lease:
            assert [bytes(page or b"") for page in lease.pages] == [pages["page0"], pages["page1"]]


def test_engines_know_nothing_of_each_other() -> None:
    with small() as one, small() as other:
        one.set("key", "one")
        assert other.exists("key") == 0
        other.set("key", "other")
        assert (one.command("GET", "key"), other.command("GET", "key")) == (b"one", b"other")


def test_shutdown_and_quit_end_no_engine(cache: EmbeddedCache) -> None:
    with pytest.raises(ServerError, match="ends when it is closed"):
        cache.command("SHUTDOWN")
    assert cache.command("QUIT") == b"OK"
    cache.ping()


def test_a_connection_that_is_killed_costs_one_call(cache: EmbeddedCache) -> None:
    with cache.listen("news") as messages:
        killed = cache.command("CLIENT", "KILL", "TYPE", "pubsub")
        assert killed == 1
        with pytest.raises(ConnectionLost):
            messages.next(10)
    cache.ping()


def test_a_put_without_room_waits_and_fails(cache: EmbeddedCache) -> None:
    with small(reserve_timeout=50) as tight:
        tight.put("first", payload(1, 8 * MIB))
        with tight.lease(["first"]):
            with pytest.raises(ServerError, match=OutOfMemory.code):
                tight.put("second", payload(2, 8 * MIB))
        tight.put("second", payload(2, 8 * MIB))


def test_a_crash_is_told_and_ends_the_engine() -> None:
    cache = small()
    cache.ping()
    runner = cache._runner
    server = runner.engine.server
    assert server is not None

    async def crash() -> None:
        raise ZeroDivisionError("a bug")

    assert runner._post is not None
    runner._post(lambda: server.spawn(crash))
    with suppress(ConnectionLost):
        for _ in range(1000):
            cache.ping()
            time.sleep(0.001)
    with pytest.raises(ConnectionLost):
        cache.ping()
    with pytest.raises(CacheError, match="has crashed") as caught:
        cache.close()
    assert isinstance(caught.value.__cause__, BaseExceptionGroup)


def test_a_fork_has_no_engine_and_takes_nothing_from_it() -> None:
    done = run(
        """
        import os, respkv
        from respkv.errors import ConnectionLost
        with respkv.open_sync(maxmemory="16mb", prefault=False) as cache:
            cache.set("key", "value")
            layers = cache.listen("news").__enter__()
            child = os.fork()
            if not child:
                try:
                    cache.ping()
                except ConnectionLost as error:
                    print(error, flush=True)
                layers.__exit__()
                cache.close()
                raise SystemExit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            print(cache.command("GET", "key"))
        """
    )
    assert "of which this one is a fork" in done.stdout
    assert done.stdout.endswith("b'value'\n"), done.stderr


def test_a_forked_child_does_not_keep_the_directory(tmp_path: Path) -> None:
    done = run(
        f"""
        import os, respkv, signal
        tier = {{"nvme_path": {str(tmp_path / "nvme")!r}, "nvme_bytes": "16mb"}}
        cache = respkv.open_sync(maxmemory="16mb", prefault=False, **tier)
        child = os.fork()
        if not child:
            signal.pause()
        cache.close()
        respkv.open_sync(maxmemory="16mb", prefault=False, **tier).close()
        os.kill(child, signal.SIGKILL)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_call_in_the_engines_own_thread_says_so(cache: EmbeddedCache) -> None:
    told: list[str] = []

    def call() -> None:
        with suppress(RuntimeError):
            try:
                cache.ping()
            except ConnectionLost as error:
                told.append(str(error))
        done.set()

    done = threading.Event()
    assert cache._runner._post is not None
    cache._runner._post(call)
    assert done.wait(60)
    assert "own thread" in told[0]
    cache.ping()


def test_calls_from_worker_threads_of_a_loop_are_calls_as_all_others(cache: EmbeddedCache) -> None:
    async def main() -> object:
        return await anyio.to_thread.run_sync(lambda: cache.command("KV.SCHEMA", "DEL", "none"))

    assert anyio.run(main) == 0


def test_what_waits_for_files_is_waited_for(tmp_path: Path) -> None:
    settings = {"nvme_path": tmp_path / "nvme", "nvme_bytes": "32mb"}
    with small(**settings) as cache:
        assert cache.put("page", payload(1, MIB), durability="durable") is True
    with small(**settings) as cache:
        assert cache.exists("page") == 1
        assert bytes(cache.get("page", deadline_ms=20_000) or b"") == payload(1, MIB)


def test_an_engine_that_nobody_closes_is_closed_at_exit(tmp_path: Path) -> None:
    done = run(
        f"""
        import respkv
        tier = {{"nvme_path": {str(tmp_path / "nvme")!r}, "nvme_bytes": "32mb"}}
        cache = respkv.open_sync(maxmemory="16mb", prefault=False, **tier)
        cache.put("page", bytes(1 << 20))
        lost = respkv.open_sync(maxmemory="16mb", prefault=False)
        lost.ping()
        del lost
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with small(nvme_path=tmp_path / "nvme", nvme_bytes="32mb") as cache:
        assert bytes(cache.get("page") or b"") == bytes(MIB)


def test_what_is_leased_cannot_be_written() -> None:
    done = run(
        """
        import ctypes, numpy, resource, respkv
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with respkv.open_sync(maxmemory="16mb", prefault=False) as cache:
            cache.put("page", bytes(1 << 20))
            with cache.lease(["page"]) as lease:
                assert lease.pages[0].readonly
                array = numpy.frombuffer(lease.pages[0], "uint8")
                print(int(array.sum()), flush=True)
                ctypes.memset(array.ctypes.data, 1, 1)  # as a tensor made of it would
        """
    )
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "0\n")


def run(code: str) -> "subprocess.CompletedProcess[str]":
    """Run a program in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_engine_lives_as_long_as_what_is_made_of_it_for_a_time() -> None:
    before = set(threading.enumerate())
    hasty = small().within(30)
    (engine,) = [
        thread for thread in set(threading.enumerate()) - before if thread.name == "respkv-engine"
    ]
    gc.collect()
    hasty.set("key", "value")
    assert hasty.command("GET", "key") == b"value"
    hasty.close()
    with pytest.raises(ConnectionLost):
        hasty.ping()
    assert not engine.is_alive()
