"""Events of pages over pub/sub: what comes, to whom, and that it is true."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from respkv.engine.events import Event
from respkv.server.event_channels import message_of
from tests.conftest import StartServer
from tests.server.conftest import Connect
from tests.server.raw import Raw

SCHEMA: list[str | int] = ["LAYERS", 1, "HEADS", 1, "DIM", 8, "TOKENS", 4, "DTYPE", "float16"]
PAGE_BYTES = 128


def key_of(number: int, namespace: str = "ns") -> str:
    return f"{namespace}:{number:064x}"


def events(raw: Raw, count: int) -> list[dict[str, Any]]:
    """Return the next events that a listener in RESP2 or RESP3 gets."""
    got = []
    for _ in range(count):
        *_, data = raw.next()
        got.append(json.loads(data))
    return got


def listener_to(connect: Connect, *channels: str, protocol: int = 2, to: Any = None) -> Raw:
    raw = connect(to)
    raw.ask("HELLO", protocol)
    for channel in channels:
        raw.ask("PSUBSCRIBE" if "*" in channel else "SUBSCRIBE", channel)
    return raw


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_page_that_is_told_of_can_be_fetched_at_once(
    raw: Raw, connect: Connect, protocol: int
) -> None:
    listener = listener_to(connect, "kv:events:ns", protocol=protocol)
    reader = connect()
    for number in range(50):
        value = b"%d" % number * 1000
        raw.send("KV.PUT", key_of(number), value, "TOKENS", 4)
        (event,) = events(listener, 1)
        assert reader.ask("KV.GET", event["key"]) == value
        assert event["bytes"] == len(value)
        assert event["event"] == "stored"
        assert raw.next() == b"OK"


def test_nobody_but_the_server_tells_events(raw: Raw, connect: Connect) -> None:
    listener = listener_to(connect, "kv:events:ns")
    error = raw.ask("PUBLISH", "kv:events:ns", '{"event": "stored"}')
    assert "are the server's own" in str(error)
    raw.ask("KV.PUT", key_of(1), b"x" * 1000, "TOKENS", 4)
    assert events(listener, 1)[0]["key"] == key_of(1)


def test_events_are_pushes_in_resp3_and_its_own_commands_are_told_to_a_client(raw: Raw) -> None:
    raw.ask("HELLO", 3)
    raw.ask("SUBSCRIBE", "kv:events:ns")
    raw.send("KV.PUT", key_of(1), b"x" * 10)
    assert raw.next_raw() == b"+OK\r\n"
    assert raw.next_raw().startswith(b">3\r\n$7\r\nmessage\r\n$12\r\nkv:events:ns\r\n")


def test_each_kind_of_event_has_its_fields(raw: Raw, connect: Connect) -> None:
    raw.ask("KV.SCHEMA", "SET", "seq", *SCHEMA)
    listener = listener_to(connect, "kv:events:seq")
    tokens = b"".join(number.to_bytes(4, "little") for number in range(10))
    pages = [b"x" * PAGE_BYTES, b"y" * PAGE_BYTES, b"z" * (PAGE_BYTES // 2)]
    assert raw.ask("KV.SEQ.PUT", "seq", tokens, 3, *pages, "LOGITS", b"l" * 40) == [3, 0]
    first, second, *rest = events(listener, 4)
    assert first.pop("seq") + 1 == second.pop("seq")
    assert first == {
        **{"event": "stored", "key": first["key"], "part": "page", "tokens": 4, "depth": 0},
        **{"parent": None, "tier": "cpu", "reason": "new", "bytes": PAGE_BYTES},
    }
    assert (second["depth"], second["parent"]) == (4, first["key"])
    tail, logits = sorted(rest, key=lambda event: event["part"], reverse=True)
    assert (tail["part"], tail["tokens"], tail["depth"]) == ("tail", 2, 8)
    assert (logits["part"], logits["bytes"]) == ("logits", 40)
    assert logits["key"].endswith(".logits")
    assert raw.ask("DEL", logits["key"], tail["key"]) == 2
    gone = events(listener, 2)
    assert [(each["event"], each["reason"]) for each in gone] == [("removed", "deleted")] * 2
    assert raw.ask("PEXPIRE", second["key"], 1) == 1
    (late,) = events(listener, 1)
    assert (late["event"], late["reason"], late["key"]) == ("removed", "expired", second["key"])
    assert raw.ask("FLUSHALL") == b"OK"
    (cleared,) = events(listener, 1)
    assert cleared == {"event": "cleared", "seq": late["seq"] + 1}


def test_other_namespaces_and_plain_values_are_not_told_of(raw: Raw, connect: Connect) -> None:
    listener = listener_to(connect, "kv:events:one", "kv:events:two*")
    for name in ("zero", "one", "two", "three", "two:a"):
        raw.ask("KV.PUT", key_of(1, name), b"x")
    raw.ask("SET", key_of(2, "one"), "plain")
    raw.ask("DEL", key_of(2, "one"))
    keys = [event["key"] for event in events(listener, 3)]
    assert keys == [key_of(1, "one"), key_of(1, "two"), key_of(1, "two:a")]
    assert listener.ask("PING") == [b"pong", b""]


def test_a_namespace_whose_listener_left_and_came_has_a_gap_in_its_numbers(
    raw: Raw, connect: Connect
) -> None:
    listener = listener_to(connect, "kv:events:gap")
    raw.ask("KV.PUT", key_of(1, "gap"), b"x")
    (first,) = events(listener, 1)
    listener.ask("UNSUBSCRIBE", "kv:events:gap")
    raw.ask("KV.PUT", key_of(2, "gap"), b"x")
    listener.ask("SUBSCRIBE", "kv:events:gap")
    raw.ask("KV.PUT", key_of(3, "gap"), b"x")
    (second,) = events(listener, 1)
    assert second["seq"] > first["seq"] + 1


def test_ten_thousand_evictions_in_one_command_are_all_told(
    start_server: StartServer, connect: Connect
) -> None:
    server = start_server(maxmemory="64mb", small_value_memory="1mb")
    raw = connect(server)
    listeners = [listener_to(connect, "kv:events:*", to=server) for _ in range(2)]
    count = 10_000
    got: list[list[dict[str, Any]]] = [[], []]
    threads = [
        threading.Thread(target=lambda each=each, at=at: got[at].extend(events(each, 2 * count)))
        for at, each in enumerate(listeners)
    ]
    for thread in threads:
        thread.start()
    for start in range(0, count, 1000):
        keys = [key_of(number) for number in range(start, start + 1000)]
        assert raw.ask_all([("KV.PUT", key, b"x" * 600) for key in keys]) == [b"OK"] * 1000
    assert raw.ask("DEL", *[key_of(number) for number in range(count)]) == count
    for thread in threads:
        thread.join(120)
    for each in got:
        assert [event["seq"] for event in each] == list(range(1, 2 * count + 1))
        kinds = [event["event"] for event in each]
        assert kinds == ["stored"] * count + ["removed"] * count
    assert server.info()["kv_events_dropped"] == "0"


def test_a_mirror_made_of_events_is_what_scan_finds(
    start_server: StartServer, connect: Connect
) -> None:
    """Under pressure: pages are evicted to make room for others."""
    server = start_server(maxmemory="4mb", small_value_memory="1mb")
    raw = connect(server)
    listener = listener_to(connect, "kv:events:ns", to=server)
    for number in range(300):
        words: list[Any] = ["KV.PUT", key_of(number), b"x" * 50_000, "TOKENS", 4]
        if number % 10:
            words += ["PARENT", key_of(number - 1)]
        assert raw.ask(*words) == b"OK"
    last = key_of(1000)
    raw.ask("KV.PUT", last, b"x" * 1000, "TOKENS", 4)
    mirror: set[str] = set()
    reasons = set()
    while last not in mirror:
        (event,) = events(listener, 1)
        if event["event"] == "stored":
            mirror.add(event["key"])
        else:
            mirror.remove(event["key"])
            reasons.add(event["reason"])
    assert {key.decode() for key in raw.ask("KEYS", "*")} == mirror
    assert reasons == {"evicted"}


@pytest.mark.parametrize("tier", ["nvme", "disk"])
def test_pages_that_move_between_memory_and_files_are_told_of(
    start_server: StartServer, connect: Connect, tmp_path: Path, tier: str
) -> None:
    files: dict[str, Any] = {f"{tier}_path": tmp_path / "files", f"{tier}_bytes": "64mb"}
    server = start_server(maxmemory="4mb", small_value_memory="1mb", promote="first", **files)
    raw = connect(server)
    listener = listener_to(connect, "kv:events:ns", to=server)
    for number in range(100):
        assert raw.ask("KV.PUT", key_of(number), b"x" * 50_000, "TOKENS", 4) == b"OK"
    assert raw.ask("KV.GET", key_of(0)) == b"x" * 50_000
    seen: list[tuple[str, str]] = []
    while ("promoted", "cpu") not in seen:
        (event,) = events(listener, 1)
        seen.append((event["event"], event["tier"]))
        if event["event"] == "promoted":
            assert event["key"] == key_of(0)
    assert set(seen) == {("stored", "cpu"), ("demoted", tier), ("promoted", "cpu")}


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (b"ns:a", "ns:a"),
        ("ключ:я".encode(), "ключ:я"),
        (b'q":\\\n', 'q":\\\n'),
        (b"\xff:\x00", "\udcff:\0"),
    ],
)
def test_any_key_is_written_as_json(key: bytes, text: str) -> None:
    line = message_of(Event("stored", b"ns", 1, key, parent=key))
    assert line.isascii()
    found = json.loads(line)
    assert found["key"] == found["parent"] == text
    assert found["key"].encode("utf-8", "surrogateescape") == key


def test_messages_of_events_go_the_way_of_all_messages(
    start_server: StartServer, connect: Connect
) -> None:
    """One who does not read them is cut off like any other slow subscriber."""
    server = start_server(pubsub_output_limit="64kb", maxmemory="256mb")
    raw = connect(server)
    slow = listener_to(connect, "kv:events:ns", to=server)
    number = 0
    while int(server.info()["pubsub_output_limit_disconnections"]) == 0:
        requests: Sequence[Any] = [
            ("KV.PUT", key_of(each), b"x") for each in range(number, number + 500)
        ]
        raw.ask_all(requests)
        number += 500
        assert number < 100_000
    assert raw.ask("PUBSUB", "NUMSUB", "kv:events:ns") == [b"kv:events:ns", 0]
    slow.wait_closed()
