"""Events over ZMQ: real sockets, read as vLLM's subscribers read them."""

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from tests.conftest import StartServer
from tests.server.conftest import Connect
from tests.server.raw import Raw
from tests.server.vllm import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Hash,
    Subscriber,
    context,
    stored,
)
from tests.server.watching import wait_for
from tests.server_process import ServerProcess

SCHEMA: list[str | int] = ["LAYERS", 1, "HEADS", 1, "DIM", 8, "TOKENS", 4, "DTYPE", "float16"]
PAGE = b"x" * 128
Publishing = Callable[..., ServerProcess]
Subscribe = Callable[..., Subscriber]


@pytest.fixture
def publishing(start_server: StartServer) -> Publishing:
    """Start a server that publishes, on ports of its own choice."""

    def start(**settings: object) -> ServerProcess:
        ends = {f"events_{name}endpoint": "tcp://127.0.0.1:*" for name in ("", "replay_")}
        return start_server(**{**ends, **settings})

    return start


@pytest.fixture
def subscribe(connect: Connect) -> Iterator[Subscribe]:
    """Return what subscribes to a server, and waits until it hears."""
    with context() as opened:

        def open_subscriber(
            server: ServerProcess, topic: bytes = b"", hello: bytes = b""
        ) -> Subscriber:
            """hello: the topic of namespace hello, where ``topic`` does not cover it."""
            subscriber = Subscriber(opened, server.info(), topic)
            raw = connect(server)
            key = f"hello:{1:064x}"
            # Subscriptions arrive in their order: who hears the last hears the first.
            subscriber.subscribe(hello)
            raw.ask("KV.PUT", key, b"x")
            while subscriber.is_quiet():
                raw.ask("DEL", key)
                raw.ask("KV.PUT", key, b"x")
            # All that was told up to here has come when the end of another page has.
            raw.ask("DEL", key)
            raw.ask("KV.PUT", f"hello:{2:064x}", b"x")
            raw.ask("DEL", f"hello:{2:064x}")
            while not is_end_of_2(subscriber.next()[2].events):
                pass
            subscriber.unsubscribe(hello)
            return subscriber

        yield open_subscriber


def is_end_of_2(events: list[Any]) -> bool:
    """Whether page 2 is removed by one of the events."""
    ends = ((2).to_bytes(32, "big"), 2)
    removed = [each for each in events if isinstance(each, BlockRemoved)]
    return any(page in ends for each in removed for page in each.block_hashes)


def put_chain(
    raw: Raw, namespace: str, count: int, first: int = 0, extras: tuple[str, ...] = ()
) -> list[bytes]:
    """Put a prompt of so many full pages; return the ids of its pages."""
    raw.ask("KV.SCHEMA", "SET", namespace, *SCHEMA)
    tokens = b"".join(each.to_bytes(4, "little") for each in range(first, first + 4 * count))
    pages = [PAGE] * count
    assert raw.ask("KV.SEQ.PUT", namespace, tokens, count, *pages, *extras)[0] == count
    keys = [key.decode() for key in raw.ask("KEYS", f"{namespace}:*")]
    by_depth = sorted(keys, key=lambda key: depth_of(raw, key))
    return [bytes.fromhex(key.partition(":")[2]) for key in by_depth]


def depth_of(raw: Raw, key: str) -> int:
    depth, info = 0, raw.ask("KV.INFO", key)
    fields = dict(zip(info[::2], info[1::2], strict=True))
    while fields.get(b"parent"):
        depth += 1
        info = raw.ask("KV.INFO", fields[b"parent"])
        fields = dict(zip(info[::2], info[1::2], strict=True))
    return depth


def test_a_stored_chain_is_published_with_its_tokens(
    publishing: Publishing, subscribe: Subscribe, connect: Connect
) -> None:
    server = publishing()
    subscriber, raw = subscribe(server), connect(server)
    ids = put_chain(raw, "model", 3)
    topic, number, batch = subscriber.next()
    assert topic == b"kv@respkv@model"
    assert batch.events == [stored(list(ids), None, list(range(12)))]
    assert abs(batch.ts - time.time()) < 60
    assert raw.ask("DEL", f"model:{ids[2].hex()}") == 1
    _, after, batch = subscriber.next()
    assert after == number + 1
    assert batch.events == [BlockRemoved([ids[2]], "CPU")]
    raw.ask("FLUSHALL")
    assert subscriber.next()[2].events == [AllBlocksCleared()]


@pytest.mark.parametrize("extras", [("SALT", "s"), ("TENANT", "t"), ("LORA", "adapter")])
def test_tokens_that_do_not_name_their_pages_alone_are_not_said(
    publishing: Publishing, subscribe: Subscribe, connect: Connect, extras: tuple[str, ...]
) -> None:
    server = publishing()
    subscriber = subscribe(server)
    ids = put_chain(connect(server), "model", 3, extras=extras)
    _, _, batch = subscriber.next()
    assert batch.events == [stored(list(ids), None, [])]


def test_a_batch_is_plain_msgpack(
    publishing: Publishing, subscribe: Subscribe, connect: Connect
) -> None:
    server = publishing(events_replay_endpoint="")
    subscriber = subscribe(server)
    (page_id,) = put_chain(connect(server), "model", 1)
    _, _, data = subscriber.frames()
    _, events, rank = msgspec.msgpack.decode(data)
    assert rank is None
    assert events == [
        ["BlockStored", [page_id], None, [0, 1, 2, 3], 4, None, "CPU", *[None] * 9],
    ]


def test_what_was_missed_is_sent_again(
    publishing: Publishing, subscribe: Subscribe, connect: Connect
) -> None:
    server = publishing(events_topic="kv")
    raw = connect(server)
    for number in range(30):
        raw.ask("KV.PUT", f"ns:{number:064x}", b"x", "TOKENS", 4)
    subscriber = subscribe(server)
    everything = subscriber.replay(0)
    numbers = [number for number, _ in everything]
    assert numbers == list(range(len(numbers)))
    hashes = [
        each
        for _, batch in everything
        for event in batch.events
        if isinstance(event, BlockStored)
        for each in event.block_hashes
    ]
    assert hashes[:30] == [number.to_bytes(32, "big") for number in range(30)]
    assert [number for number, _ in subscriber.replay(numbers[-1] - 2)] == numbers[-3:]
    assert subscriber.replay(numbers[-1] + 1) == []
    assert subscriber.replay((1 << 64) - 1) == []


def test_a_req_socket_is_told_the_end(publishing: Publishing) -> None:
    server = publishing()
    with context() as opened:
        asking = opened.open(zmq.REQ)
        asking.connect(server.info()["kv_events_replay_endpoint"])
        for _ in range(3):
            asking.send((5000).to_bytes(8, "big"))
            assert asking.recv_multipart() == [b"\xff" * 8, b""]


def test_only_the_last_batches_are_kept(
    publishing: Publishing, subscribe: Subscribe, connect: Connect
) -> None:
    server = publishing(events_buffer=5)
    subscriber, raw = subscribe(server), connect(server)
    last = 0
    for number in range(20):
        raw.ask("KV.PUT", f"ns:{number:064x}", b"x")
        last = subscriber.next()[1]
    assert [number for number, _ in subscriber.replay(0)] == list(range(last - 4, last + 1))
    assert server.info()["kv_events_batches_buffered"] == "5"


def test_requests_that_are_none_are_counted_and_hurt_nobody(
    publishing: Publishing, subscribe: Subscribe
) -> None:
    server = publishing()
    subscriber = subscribe(server)
    wrong: list[list[bytes]] = [
        *([b""], [b"", b""], [b"", b"1234567"], [b"", b"123456789"]),
        *([b"", b"12345678", b"", b""], [b"x" * 4000]),
    ]
    for frames in wrong:
        subscriber.ask(*frames)
    assert subscriber.replay(1 << 60) == []
    wait_for(server, "kv_events_bad_requests", len(wrong))


def test_a_replay_may_be_of_one_topic(
    publishing: Publishing, subscribe: Subscribe, connect: Connect
) -> None:
    server = publishing(events_topic="{namespace}")
    raw = connect(server)
    for name in ("a", "b", "a"):
        for number in range(3):
            raw.ask("KV.PUT", f"{name}:{number:064x}", b"x" * (1 + number))
            raw.ask("DEL", f"{name}:{number:064x}")
    subscriber = subscribe(server, b"a", b"hello")
    every = [number for number, _ in subscriber.replay(0)]
    some = [number for number, _ in subscriber.replay(0, b"b")]
    assert every == list(range(len(every)))
    assert some == list(range(6, 12))
    raw.ask("KV.PUT", f"b:{1:064x}", b"x")
    raw.ask("KV.PUT", f"a:{1:064x}", b"x")
    assert subscriber.next()[0] == b"a"


def test_long_replays_reach_a_slow_asker_whole_and_hold_up_nobody(
    publishing: Publishing, subscribe: Subscribe, connect: Connect
) -> None:
    server = publishing(events_buffer=5000)
    raw, slow = connect(server), subscribe(server)
    for start in range(0, 4000, 500):
        for number in range(start, start + 500):
            raw.ask("KV.PUT", f"ns:{number:064x}", b"x")
    slow.ask(b"", bytes(8))
    other = subscribe(server)
    assert len(other.replay(1000)) > 50  # a server that is held up tells more in one message
    assert raw.ask("PING") == b"PONG"
    time.sleep(0.5)
    found = slow.replay(1 << 60)  # the end of the first request comes before that of this one
    assert [number for number, _ in found] == list(range(len(found)))
    assert sum(len(batch.events) for _, batch in found) >= 4000


def test_some_namespaces_numbers_and_no_tokens(
    publishing: Publishing, subscribe: Subscribe, connect: Connect
) -> None:
    server = publishing(
        events_namespaces="model,hello", events_int_hashes=True, events_tokens=False
    )
    subscriber, raw = subscribe(server), connect(server)
    put_chain(raw, "other", 1, first=100)
    ids = put_chain(raw, "model", 2)
    hashes = [int.from_bytes(each[-8:], "big") for each in ids]
    topic, _, batch = subscriber.next()
    assert topic == b"kv@respkv@model"
    assert batch.events == [stored(list(hashes), None, [])]
    assert subscriber.is_quiet()


def test_pages_that_go_to_files_and_come_back_change_their_medium(
    publishing: Publishing, subscribe: Subscribe, connect: Connect, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        **{"maxmemory": "4mb", "small_value_memory": "1mb", "promote": "first"},
        **{"nvme_path": tmp_path / "files", "nvme_bytes": "64mb"},
    }
    server = publishing(**settings)
    raw = connect(server)
    subscriber = subscribe(server, b"kv@respkv@ns", b"kv@respkv@hello")
    media: dict[Hash, str | None] = {}

    def follow(until: Callable[[], bool]) -> None:
        while not until():
            for event in subscriber.next()[2].events:
                assert not isinstance(event, AllBlocksCleared)
                for page in event.block_hashes:
                    if isinstance(event, BlockRemoved):
                        assert media.pop(page) == event.medium
                    else:
                        assert page not in media
                        media[page] = event.medium

    for number in range(100):
        assert raw.ask("KV.PUT", f"ns:{number:064x}", b"x" * 50_000, "TOKENS", 4) == b"OK"
    first = bytes(32)
    follow(lambda: media.get(first) == "STORAGE" and len(media) == 100)
    assert raw.ask("KV.GET", f"ns:{0:064x}") == b"x" * 50_000
    follow(lambda: media[first] == "CPU")
    assert raw.ask("DEL", f"ns:{0:064x}") == 1
    follow(lambda: first not in media)
    assert server.stop() == 0

    # What files hold is told of first after a start, behind the news that all before is void.
    again = publishing(**settings)
    later = subscribe(again, b"kv@respkv@ns", b"kv@respkv@hello")
    (number, batch), *others = [each for each in later.replay(0, b"kv@respkv@ns") if each[1].events]
    assert batch.events == [AllBlocksCleared()]
    every = [event for _, each in others for event in each.events]
    found = [event for event in every if isinstance(event, BlockStored)]
    assert found == every
    assert {event.medium for event in found} == {"STORAGE"}
    assert {page for event in found for page in event.block_hashes} == set(media)

    # The namespace has no schema, and nothing has become of its pages since the start.
    assert connect(again).ask("FLUSHALL") == b"OK"
    assert later.next()[2].events == [AllBlocksCleared()]


def test_pages_that_files_drop_leave_the_medium_that_they_were_in(
    publishing: Publishing, subscribe: Subscribe, connect: Connect, tmp_path: Path
) -> None:
    server = publishing(
        maxmemory="4mb",
        small_value_memory="1mb",
        nvme_path=tmp_path / "files",
        nvme_bytes="16mb",
        segment_bytes="1mb",
    )
    subscriber, raw = subscribe(server, b"kv@respkv@ns", b"kv@respkv@hello"), connect(server)
    media: dict[Hash, str | None] = {}
    dropped = 0
    for number in range(600):
        assert raw.ask("KV.PUT", f"ns:{number:064x}", b"x" * 50_000, "WRITTEN") == b"OK"
    assert raw.ask("KV.PUT", f"ns:{600:064x}", b"x" * 50_000, "WRITTEN") == b"OK"
    while (600).to_bytes(32, "big") not in media:
        for event in subscriber.next()[2].events:
            assert not isinstance(event, AllBlocksCleared)
            for page in event.block_hashes:
                if isinstance(event, BlockRemoved):
                    dropped += event.medium == "STORAGE"
                    assert media.pop(page) == event.medium
                else:
                    media[page] = event.medium
    assert dropped


def test_a_subscriber_that_does_not_read_holds_up_nobody(
    publishing: Publishing, connect: Connect
) -> None:
    server = publishing(events_hwm=1, events_buffer=10)
    with context() as opened:
        silent = opened.open(zmq.SUB)
        silent.set_hwm(1)
        silent.connect(server.info()["kv_events_endpoint"])
        silent.subscribe(b"")
        time.sleep(0.3)
        raw = connect(server)
        for start in range(0, 20_000, 1000):
            requests = [("KV.PUT", f"ns:{each:064x}", b"x") for each in range(start, start + 1000)]
            assert raw.ask_all(requests) == [b"OK"] * 1000
        wait_for(server, "kv_events_published", 20_000)
        assert raw.ask("PING") == b"PONG"


def test_an_endpoint_that_is_taken_ends_the_start_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = ServerProcess(is_awaited=False, events_endpoint=f"tcp://127.0.0.1:{port}")
        assert server.process.wait(120) == 2
    assert server.log.strip() == (
        f"respkv: events-endpoint = 'tcp://127.0.0.1:{port}': Address already in use"
    )
    server.stop()


def test_without_pyzmq_the_setting_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "zmq.py").write_text("raise ImportError('no zmq here')")
    server = ServerProcess(
        is_awaited=False,
        environment={"PYTHONPATH": str(tmp_path)},
        events_endpoint="tcp://127.0.0.1:*",
    )
    assert server.process.wait(120) == 2
    assert "install respkv[events]" in server.log
    assert "Traceback" not in server.log
    server.stop()


def test_without_the_setting_pyzmq_is_not_needed(tmp_path: Path) -> None:
    (tmp_path / "zmq.py").write_text("raise ImportError('no zmq here')")
    server = ServerProcess(environment={"PYTHONPATH": str(tmp_path)})
    assert "kv_events_endpoint" not in server.info()
    assert server.stop() == 0
