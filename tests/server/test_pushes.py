"""Pushes in a session without sockets: their place among replies, and what keeps them back."""

import random
from typing import Any

import anyio.lowlevel
import hiredis
import pytest

from respkv.engine.entry import Put
from respkv.server import pubsub
from respkv.server.state import Server
from tests.fakes import FakeWire
from tests.server.cold import cold_server
from tests.server.raw import pipeline, request
from tests.server.test_session import running, settle

pytestmark = pytest.mark.anyio

VALUE = b"v" * 300_000
MESSAGE = b">3\r\n$7\r\nmessage\r\n$1\r\na\r\n$%d\r\n%b\r\n"
BIG_REPLY = b"$%d\r\n%b\r\n" % (len(VALUE), VALUE)


def message(text: bytes) -> bytes:
    return MESSAGE % (len(text), text)


def listener(server: Server, *, room: int = 1 << 60, protocol: int = 3) -> FakeWire:
    """Return a connection that listens to channel a and was told so."""
    wire = FakeWire(server)
    wire.feed(request("HELLO", protocol) + request("SUBSCRIBE", "a"))
    wire.drain()
    wire.room = room
    return wire


async def test_a_message_goes_behind_a_reply_that_is_streamed() -> None:
    async with running(maxmemory=16 << 20, small_value_memory=1 << 20) as server:
        wire = listener(server, room=1000)
        for number in range(20):
            server.cache.put(b"k%d" % number, VALUE)
        wire.feed(request("MGET", *[f"k{number}" for number in range(20)]) + request("PING"))
        assert server.pubsub.publish(b"a", b"one") == 1
        await settle()
        assert server.pubsub.publish(b"a", b"two") == 1
        await settle()
        expected = b"*20\r\n" + BIG_REPLY * 20
        got = bytes(wire.drain(len(VALUE)))
        while len(got) < len(expected):
            assert message(b"one") not in got
            got += wire.drain(len(VALUE))
        await settle()
        got += wire.drain()
        rest = got.removeprefix(expected)
        assert sorted([b"+PONG\r\n", message(b"one"), message(b"two")], key=rest.index)[0]
        assert rest.index(message(b"one")) < rest.index(message(b"two"))
        assert len(rest) == len(b"+PONG\r\n" + message(b"one") * 2)
        assert wire.session.push_bytes == 0


async def test_a_message_waits_with_a_reply_that_promises_more_than_memory() -> None:
    async with cold_server() as cold:
        wire = listener(cold.server)
        cold.tier.writes.shut()
        key = "ns:" + "ab" * 32
        wire.feed(request("KV.PUT", key, "x" * 1000, "WRITTEN"))
        await settle()
        cold.server.pubsub.publish(b"a", b"one")
        await settle()
        assert wire.drain() == b""
        cold.tier.writes.open()
        with_reply = b""
        while message(b"one") not in with_reply:
            await settle()
            with_reply += wire.drain()
        assert with_reply == b"+OK\r\n" + message(b"one")


async def test_a_message_waits_while_a_command_waits_for_its_value() -> None:
    async with cold_server() as cold:
        await cold.put({b"k": VALUE})
        wire = listener(cold.server)
        cold.tier.reads.shut()
        wire.feed(request("GET", "k"))
        cold.server.pubsub.publish(b"a", b"one")
        await settle()
        assert wire.drain() == b""
        cold.tier.reads.open()
        got = b""
        while message(b"one") not in got:
            await settle()
            got += wire.drain()
        assert got == BIG_REPLY + message(b"one")


async def test_messages_before_an_unsubscribe_come_before_its_answer() -> None:
    async with running() as server:
        wire = listener(server, protocol=2)
        server.pubsub.publish(b"a", b"one")
        wire.feed(request("UNSUBSCRIBE", "a"))
        await settle()
        first, second = _replies(wire.drain())
        assert first == [b"message", b"a", b"one"]
        assert second == [b"unsubscribe", b"a", 0]


async def test_events_leave_in_short_steps_while_there_are_many_patterns() -> None:
    async with running() as server:
        wire = FakeWire(server)
        patterns = [b"*%dx" % number for number in range(2000)]
        wire.feed(request("SUBSCRIBE", "kv:events:ns") + request("PSUBSCRIBE", *patterns))
        wire.drain()
        for number in range(100):
            server.cache.put(b"ns:%064x" % number, b"x" * 100, Put("kvpage"))
        queue = server.event_channels.listener.queue
        while queue:
            before = len(queue)
            await anyio.lowlevel.checkpoint()
            assert before - len(queue) <= 30
        await settle()
        assert len(_replies(wire.drain())) == 100


async def test_messages_before_a_change_of_the_protocol_come_before_its_answer() -> None:
    """They are written in the protocol of before, which is not read any more behind it."""
    async with running() as server:
        wire = listener(server)
        server.pubsub.publish(b"a", b"one")
        wire.feed(request("HELLO", 2))
        server.pubsub.publish(b"a", b"two")
        await settle()
        got = wire.drain()
        assert got.startswith(message(b"one"))
        assert got.endswith(b"*" + message(b"two")[1:])
        assert got.count(b">3") == 1


async def test_names_and_patterns_have_so_many_bytes_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pubsub, "SUBSCRIPTION_BYTES_MAX", 1 << 20)
    async with running() as server:
        first, second = FakeWire(server), FakeWire(server)
        for number in range(4):
            first.feed(request("SUBSCRIBE", b"%d" % number + b"x" * 300_000))
        refused = _replies(first.drain())[-1]
        assert isinstance(refused, hiredis.ReplyError)
        assert "unsubscribe from some" in str(refused)
        second.feed(request("PSUBSCRIBE", "?" * 60_000))
        assert isinstance(_replies(second.drain())[0], hiredis.ReplyError)
        second.feed(request("SUBSCRIBE", "short"))
        assert _replies(second.drain()) == [[b"subscribe", b"short", 1]]
        first.feed(request("UNSUBSCRIBE"))
        first.lose()
        second.feed(request("SUBSCRIBE", "x" * 900_000))
        assert _replies(second.drain())[0][0] == b"subscribe"
        second.lose()
        assert server.pubsub.num_channels == server.pubsub.num_patterns == 0


async def test_all_messages_of_a_turn_leave_with_one_write() -> None:
    async with running() as server:
        wire, talker = listener(server), FakeWire(server)
        wakes = 0
        wake = wire.wake

        def counted() -> None:
            nonlocal wakes
            wakes += 1
            wake()

        wire.wake = counted  # type: ignore[method-assign]
        talker.feed(pipeline([("PUBLISH", "a", number) for number in range(500)]))
        await settle()
        assert wire.drain() == b"".join(message(b"%d" % number) for number in range(500))
        assert wakes == 1


async def test_who_takes_nothing_is_cut_off_at_the_limit_and_others_are_not() -> None:
    async with running(pubsub_output_limit=100_000) as server:
        slow, quick = listener(server, room=0), listener(server)
        for number in range(150):
            assert server.pubsub.publish(b"a", b"%03d" % number + b"x" * 997) == 2
            await settle()
            assert slow.session.push_bytes <= 101_200
        assert len(_replies(quick.drain())) == 150
        assert slow.is_aborted
        assert not quick.is_aborted
        assert server.num_slow_subscribers == 1
        assert not slow.session.pushes
        slow.lose()
        assert server.pubsub.publish(b"a", b"x") == 1


async def test_what_has_left_does_not_count_against_the_limit() -> None:
    async with running(pubsub_output_limit=100_000) as server:
        wire = listener(server, room=0)
        total = bytearray()
        for _ in range(30):
            for _ in range(20):
                server.pubsub.publish(b"a", b"x" * 1000)
            await settle()
            total += wire.drain()
            await settle()
            wire.room = 0
        total += wire.drain()
        assert len(_replies(bytes(total))) == 600
        assert not wire.is_aborted
        assert wire.session.push_bytes == 0


async def test_a_connection_that_breaks_leaves_its_channels_whatever_waited() -> None:
    async with running() as server:
        wires = [listener(server, room=room) for room in (0, 10, 1 << 60)]
        wires[0].feed(request("PSUBSCRIBE", "a*", "b*"))
        server.pubsub.publish(b"a", b"one")
        for wire in wires:
            wire.lose()
        await settle()
        assert server.pubsub.num_channels == server.pubsub.num_patterns == 0
        assert server.pubsub.publish(b"a", b"two") == 0


async def test_any_order_of_calls_leaves_counts_that_agree() -> None:
    rng = random.Random(3)
    async with running() as server:
        wires = [FakeWire(server) for _ in range(5)]
        kinds = ["SUBSCRIBE", "UNSUBSCRIBE", "PSUBSCRIBE", "PUNSUBSCRIBE"]
        for _ in range(600):
            wire = rng.choice(wires)
            names = [rng.choice("abc") for _ in range(rng.randrange(1, 3))]
            wire.feed(request(rng.choice(kinds), *names))
            if rng.random() < 0.02:
                wire.feed(request(rng.choice(["RESET", "UNSUBSCRIBE"])))
            own = [each.session.subscriptions for each in wires]
            channels = [set() if each is None else set(each.channels) for each in own]
            patterns = [set() if each is None else set(each.patterns) for each in own]
            assert set(server.pubsub.channels()) == set().union(*channels)
            assert server.pubsub.num_patterns == len(set().union(*patterns))
            for name in (b"a", b"b", b"c"):
                direct = sum(name in each for each in channels)
                assert server.pubsub.num_listeners(name) == direct
                heard = direct + sum(name in each for each in patterns)
                assert server.pubsub.publish(name, b"") == heard
        await settle()


def _replies(data: bytes) -> list[Any]:
    reader = hiredis.Reader(notEnoughData=...)
    reader.feed(data)
    return list(iter(reader.gets, ...))
