"""The intake: where large arguments go, what they take before they have come, what is given back."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.config import Config
from respkv.engine.clock import Clock
from respkv.engine.entry import Put
from respkv.engine.landing import Landing
from respkv.engine.spaces import Limits as Quotas
from respkv.server.body import LAND_MIN, WINDOW_BYTES_MAX, Refused
from respkv.server.intake import Intake
from respkv.server.state import Server
from respkv.wire.parser import BODY_MIN, Limits
from tests.fakes import make_server
from tests.server.raw import request

LARGE = 500_000
KEY = b"ns:" + b"ab" * 32


@pytest.fixture
def offline() -> Iterator[Server]:
    """Return a server without sockets."""
    config = Config(maxmemory=5 << 20, small_value_memory=1 << 20)
    with make_server(config, Clock()) as made:
        yield made


def make_intake(server: Server, **limits: int) -> Intake:
    return Intake(server, Limits(**limits), lambda: None, lambda: None)  # type: ignore[arg-type]


def feed(intake: Intake, data: bytes, *, cuts: Sequence[int] = ()) -> list[list[Any]]:
    """Deliver bytes, at most to the next cut at a time; return the commands that became whole."""
    commands: list[list[Any]] = []
    position = 0
    edges = [*sorted(cut for cut in cuts if cut < len(data)), len(data)]
    while position < len(data):
        assert not intake.is_waiting
        window = intake.window()
        stop = next(edge for edge in edges if edge > position)
        count = min(len(window), stop - position)
        assert count, "an empty window would look like the end of the stream"
        window[:count] = data[position : position + count]
        position += count
        commands += intake.received(count)
        while intake.has_more and not intake.is_waiting and intake.error is None:
            commands += intake.go_on()
    return commands


def shown(server: Server, args: list[Any]) -> list[Any]:
    """Return arguments with the bytes that landings hold, and give their slots back."""
    seen: list[Any] = []
    for arg in args:
        if isinstance(arg, Landing):
            assert arg.is_full
            seen.append(bytes(arg.memory))
            server.cache.abandon(arg)
        else:
            seen.append(arg)
    return seen


def test_a_large_value_lands_in_its_slot_and_all_but_its_start_is_written_there(
    offline: Server,
) -> None:
    intake = make_intake(offline)
    value = bytes(range(256)) * (LARGE // 256)
    (args,) = feed(intake, request("SET", "k", value))
    landing = args[2]
    assert isinstance(landing, Landing)
    assert landing.memory == value
    stats = offline.cache.stats
    assert stats.bytes_staged + stats.bytes_landed == len(value)
    assert stats.bytes_staged <= BODY_MIN
    offline.cache.abandon(landing)


def test_the_window_is_the_slot_itself_and_no_step_is_long(offline: Server) -> None:
    intake = make_intake(offline)
    head = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3000000\r\n"
    feed(intake, head + b"x" * LAND_MIN)
    used = offline.cache.slabs.payload_bytes
    assert used == 3_000_000
    window = intake.window()
    assert window.obj is offline.cache.arena.obj
    assert len(window) == WINDOW_BYTES_MAX
    assert intake.is_filling
    intake.lost()
    assert offline.cache.slabs.used_bytes == 0


def test_a_claimed_length_takes_nothing_before_a_part_of_it_has_come(offline: Server) -> None:
    intake = make_intake(offline)
    feed(intake, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3000000\r\n" + b"x" * (LAND_MIN - 1))
    assert offline.cache.slabs.used_bytes == 0
    assert not intake.holds_slot
    assert LAND_MIN - 1 <= intake.held_bytes < LAND_MIN + 1000
    feed(intake, b"x")
    assert offline.cache.slabs.used_bytes > 3_000_000
    assert intake.holds_slot
    assert intake.held_bytes < 1000
    intake.lost()


def test_a_value_that_can_never_fit_is_dropped_and_the_next_command_understood(
    offline: Server,
) -> None:
    intake = make_intake(offline)
    stream = request("SET", "k", b"x" * 6_000_000) + request("PING")
    first, second = feed(intake, stream)
    assert isinstance(first[2], Refused)
    assert first[2].nbytes == 6_000_000
    assert "never fits" in str(first[2].error)
    assert second == [b"PING"]
    assert offline.cache.slabs.used_bytes == 0


def test_a_value_without_room_waits_only_when_somebody_will_let_go(offline: Server) -> None:
    cache = offline.cache
    for number in range(8):
        cache.put(b"%d" % number, b"v" * LARGE).pinned_until = float("inf")
    intake = make_intake(offline)
    (args,) = feed(intake, request("SET", "k", b"x" * LARGE))
    assert "pinned" in str(args[2].error)


def test_a_page_that_is_there_is_read_and_dropped_and_stays_until_then(offline: Server) -> None:
    cache = offline.cache
    page = cache.put(KEY, b"p" * LARGE, Put("kvpage"))
    used = cache.slabs.used_bytes
    intake = make_intake(offline)
    data = request("KV.PUT", KEY, b"p" * LARGE, "TOKENS", "4")
    feed(intake, data[:-100_000])
    assert cache.slabs.used_bytes == used
    assert cache.room.is_held(page)
    (args,) = feed(intake, data[-100_000:])
    assert isinstance(args[2], Refused)
    assert args[2].error is None
    assert args[3:] == [b"TOKENS", b"4"]


@pytest.mark.parametrize(
    ("key", "nbytes"), [(KEY, LARGE - 1), (b"other:" + b"ab" * 32, LARGE), (b"plain", LARGE)]
)
def test_a_payload_that_may_differ_from_what_is_there_lands(
    offline: Server, key: bytes, nbytes: int
) -> None:
    offline.cache.put(KEY, b"p" * LARGE, Put("kvpage"))
    offline.cache.put(b"other:" + b"ab" * 32, b"p" * LARGE)  # a string
    offline.cache.put(b"plain", b"p" * LARGE, Put("kvpage"))
    (args,) = feed(make_intake(offline), request("KV.PUT", key, b"n" * nbytes))
    assert isinstance(args[2], Landing)
    offline.cache.abandon(args[2])


def test_a_large_argument_that_is_no_value_stays_on_the_heap(offline: Server) -> None:
    intake = make_intake(offline)
    key = b"K" * BODY_MIN
    data = request("GET", key)
    feed(intake, data[:-10])
    assert intake.held_bytes >= BODY_MIN - 10
    assert feed(intake, data[-10:]) == [[b"GET", key]]
    assert intake.held_bytes == 0
    assert offline.cache.slabs.used_bytes == 0


def test_a_large_argument_that_is_no_value_is_refused_beyond_the_limit(offline: Server) -> None:
    intake = make_intake(offline, held_max=100_000)
    commands = feed(intake, request("PING") + b"*2\r\n$3\r\nGET\r\n$200000\r\n" + b"x" * 10)
    assert commands == [[b"PING"]]
    assert str(intake.error) == "Protocol error: too big request"


def test_large_arguments_that_are_no_values_are_refused_when_their_sum_is_too_large(
    offline: Server,
) -> None:
    intake = make_intake(offline, held_max=5 * BODY_MIN)
    key = b"K" * BODY_MIN
    assert feed(intake, request("EXISTS", *[key] * 4)) == [[b"EXISTS", *[key] * 4]]
    assert feed(intake, request("EXISTS", *[key] * 4)) == [[b"EXISTS", *[key] * 4]]
    data = request("EXISTS", *[key] * 5)
    feed(intake, data[: 4 * BODY_MIN + BODY_MIN // 2])
    assert 4 * BODY_MIN < intake.held_bytes < 5 * BODY_MIN
    intake = make_intake(offline, held_max=5 * BODY_MIN)
    assert feed(intake, data) == []
    assert str(intake.error) == "Protocol error: too big request"


def test_a_slot_counts_as_held_until_its_whole_command_has_come(offline: Server) -> None:
    intake = make_intake(offline)
    data = request("MSET", "a", b"x" * LARGE, "b", "v")
    feed(intake, data[:-10])
    assert intake.holds_slot
    assert not intake.is_filling
    (args,) = feed(intake, data[-10:])
    assert not intake.holds_slot
    assert intake.has_landed
    offline.cache.abandon(args[2])


@pytest.mark.parametrize("share", [0.0001, 0.2, 0.5, 0.9, 0.9999])
def test_a_connection_lost_inside_a_command_gives_back_all_its_slots(
    offline: Server, share: float
) -> None:
    intake = make_intake(offline)
    data = request("MSET", "a", b"x" * LARGE, "b", b"y" * LARGE, "c", "z")
    assert feed(intake, data[: int(share * len(data))]) == []
    intake.lost()
    assert offline.cache.slabs.used_bytes == 0
    assert offline.cache.in_flight() == (0, 0)
    offline.cache.check()


VALUES = [b"", b"v", b"\r\n$3\r\n", b"x" * BODY_MIN, b"y" * (BODY_MIN - 1), b"z" * 150_000]
STREAM: list[tuple[str | bytes, ...]] = [
    ("SET", "a", VALUES[5]),
    ("PING",),
    ("MSET", "a", VALUES[3], "b", VALUES[0], "c", VALUES[4], "d", VALUES[5]),
    ("GET", VALUES[3]),
    ("set", "k", VALUES[2], "PX", "5"),
    ("NOSUCH", VALUES[3], VALUES[5]),
    ("KV.PUT", "ns:k", VALUES[5], "PARENT", VALUES[1]),
]
WIRE = b"".join(request(*words) for words in STREAM)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, len(WIRE) - 1), max_size=12))
def test_any_cut_gives_the_same_commands_and_leaves_no_slot(cuts: list[int]) -> None:
    config = Config(maxmemory=5 << 20, small_value_memory=1 << 20)
    with make_server(config, Clock()) as server:
        intake = make_intake(server)
        found = [shown(server, args) for args in feed(intake, WIRE, cuts=cuts)]
        expected = [
            [word.encode() if isinstance(word, str) else word for word in words] for words in STREAM
        ]
        assert found == expected
        assert server.cache.slabs.used_bytes == 0
        assert intake.held_bytes == 0


def fill(server: Server, tenant: bytes) -> set[bytes]:
    """Fill the memory with pages of a tenant; return their keys."""
    cache, number = server.cache, 0
    while (slot := cache.slabs.take(LARGE)) is not None:
        cache.slabs.give_back(slot)
        cache.put(b"ns:%d" % number, b"x" * LARGE, Put("kvpage", tenant=tenant))
        number += 1
    return set(cache.entries)


def limit_to_one_pinned(server: Server) -> None:
    """Let tenant t keep one page, and pin the one that it has."""
    cache = server.cache
    cache.put(b"ns:own", b"x" * LARGE, Put("kvpage", tenant=b"t", pinned_until=1e9))
    cache.accounts.set_limits(b"ns", Quotas(tenants={b"t": LARGE}))


@pytest.mark.parametrize(
    "words",
    [
        ("KV.PUT", "ns:new"),
        ("KV.SEQ.PUT", "ns", b"\0" * 4, 1),
        ("KV.SEQ.PUT", "ns", b"\0" * 4, "x"),
    ],
    ids=str,
)
def test_what_may_be_refused_for_a_quota_makes_no_room_before_its_owner_is_known(
    offline: Server, words: tuple[Any, ...]
) -> None:
    limit_to_one_pinned(offline)
    before = fill(offline, b"other")
    intake = make_intake(offline)
    value = bytes(range(256)) * (LARGE // 256)
    data = request(*words, value, "TENANT", "t")
    (args,) = feed(intake, data, cuts=[BODY_MIN, LAND_MIN, LARGE // 2])
    assert value in args
    assert set(offline.cache.entries) == before
    # Where there is room nobody is robbed, so it lands.
    offline.cache.delete(offline.cache.entries[b"ns:0"])
    (args,) = feed(intake, data)
    assert value in shown(offline, args)
    assert value not in args


def test_only_what_may_be_held_on_the_heap_is_kept_there_for_a_quota(offline: Server) -> None:
    limit_to_one_pinned(offline)
    before = fill(offline, b"other")
    intake = make_intake(offline, held_max=3 * LARGE - 1)
    (args,) = feed(intake, request("KV.SEQ.PUT", "ns", b"\0" * 4, 2, b"x" * LARGE, b"y" * LARGE))
    assert not any(isinstance(arg, Landing) for arg in args)
    assert set(offline.cache.entries) == before
    (args,) = feed(intake, request("KV.SEQ.PUT", "ns", b"\0" * 4, 3, *[b"x" * LARGE] * 3))
    assert sum(isinstance(arg, Landing) for arg in args) == 3
    shown(offline, args)


def test_more_payload_than_a_put_has_announced_does_not_collect_on_the_heap(
    offline: Server,
) -> None:
    limit_to_one_pinned(offline)
    fill(offline, b"other")
    intake = make_intake(offline, held_max=3 * LARGE)
    (args,) = feed(intake, request("KV.SEQ.PUT", "ns", b"\0" * 4, 1, *[b"x" * LARGE] * 4))
    assert [type(arg) for arg in args[4:]] == [bytes, bytes, Landing, Landing]
    shown(offline, args)
    (args,) = feed(intake, request("KV.SEQ.PUT", "ns", b"\0" * 4, 1, b"x", b"y" * (4 * LARGE)))
    assert isinstance(args[5], Landing)
    shown(offline, args)


def test_a_put_that_its_tenant_can_make_room_for_lands(offline: Server) -> None:
    offline.cache.accounts.set_limits(b"ns", Quotas(tenants={b"t": LARGE}))
    offline.cache.put(b"ns:own", b"x" * LARGE, Put("kvpage", tenant=b"t"))
    fill(offline, b"other")
    (args,) = feed(make_intake(offline), request("KV.PUT", "ns:new", b"x" * LARGE, "TENANT", "t"))
    assert isinstance(args[2], Landing)
    shown(offline, args)
