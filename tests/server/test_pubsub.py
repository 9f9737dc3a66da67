"""Pub/sub answers what redis-server answers, byte for byte, and holds up under many and slow listeners."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from socket import create_connection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.wire.commands import COMMANDS
from tests.conftest import StartServer
from tests.redis_server import RedisServer
from tests.server.conftest import Connect
from tests.server.raw import Raw, error_of, parsed, pipeline, request
from tests.server.test_injection import NASTY
from tests.server.watching import wait_for
from tests.server_process import ServerProcess

Words = Sequence[str | bytes | int]


class Crowd:
    """Connections to redis-server, and as many to ours, that are sent the same."""

    def __init__(self, theirs: list[Raw], ours: list[Raw], protocol: int) -> None:
        self.theirs, self.ours, self.protocol = theirs, ours, protocol

    def check(self, number: int, *words: str | bytes | int, told: Sequence[int] = ()) -> bytes:
        """Send a command on one connection; assert that all answers are equal.

        told: the other connections that get something for it, each once for each time it stands here.
        """
        theirs, ours = self.theirs[number], self.ours[number]
        theirs.send(*words)
        ours.send(*words)
        found = _all_of(theirs)
        assert _all_of(ours) == found, words
        for other in told:
            assert self.ours[other].next_raw() == self.theirs[other].next_raw(), words
        return found

    def check_silent(self) -> None:
        """Assert that nobody was told more than was read."""
        for number in range(len(self.ours)):
            self.check(number, "PING")


def _all_of(raw: Raw) -> bytes:
    """Return everything that comes up to the answer of an unknown command sent now."""
    raw.send("mark-the-end")
    found = bytearray()
    while not (part := raw.next_raw()).startswith(b"-ERR unknown command 'mark-the-end'"):
        found += part
    return bytes(found)


@pytest.fixture(params=[2, 3], ids=["RESP2", "RESP3"])
def crowd(
    request: pytest.FixtureRequest, redis: RedisServer, server: ServerProcess
) -> Iterator[Crowd]:
    with ExitStack() as stack:

        def raw(port: int) -> Raw:
            opened = stack.enter_context(Raw(create_connection(("127.0.0.1", port))))
            opened.ask("HELLO", request.param)
            return opened

        theirs = [raw(redis.port) for _ in range(4)]
        ours = [raw(server.port) for _ in range(4)]
        for each in (theirs[0], ours[0]):
            each.ask("FLUSHALL")  # of what other tests left there
        yield Crowd(theirs, ours, request.param)


def test_messages_and_confirmations_are_those_of_redis(crowd: Crowd) -> None:
    crowd.check(0, "SUBSCRIBE", "a", "b", "a")
    crowd.check(0, "PSUBSCRIBE", "a*", "?", "a*")
    crowd.check(1, "SUBSCRIBE", b"\x00\xff\r\n", "")
    crowd.check(2, "PUBLISH", "a", "x" * 70_000, told=[0])
    of_patterns = [{raw.next_raw() for _ in range(2)} for raw in (crowd.ours[0], crowd.theirs[0])]
    assert of_patterns[0] == of_patterns[1]
    crowd.check(2, "PUBLISH", b"\x00\xff\r\n", b"\r\n\x00", told=[1])
    crowd.check(2, "PUBLISH", "", "", told=[1])
    crowd.check(2, "PUBLISH", "nobody", "x")
    crowd.check(0, "UNSUBSCRIBE", "a", "never", "a")
    crowd.check(2, "PUBLISH", "abc", "x", told=[0])
    crowd.check(0, "PUNSUBSCRIBE", "a*", "never")
    crowd.check(0, "PUNSUBSCRIBE")
    crowd.check(0, "PUNSUBSCRIBE")
    crowd.check(0, "UNSUBSCRIBE")
    crowd.check(0, "UNSUBSCRIBE")
    crowd.check(0, "GET", "x")
    crowd.check_silent()


@pytest.mark.parametrize(
    "line",
    [
        "PING",
        "PING hello",
        "PING a b",
        "GET k",
        "SET k",
        "BOGUS",
        "CLIENT ID x",
        "CLIENT GETNAME",
        "CLIENT BOGUS",
        "PUBLISH b x",
        "MGET k",
        "PUBSUB NUMPAT",
        "subscribe",
        "unsubscribe b",
        "RESET",
        "HELLO 9",
    ],
)
def test_who_listens_may_call_what_redis_allows(line: str, crowd: Crowd) -> None:
    crowd.check(0, "SUBSCRIBE", "a")
    crowd.check(0, *line.split())
    crowd.check(0, "PING")
    crowd.check(0, "GET", "k")


def test_every_command_but_a_few_is_refused_in_resp2(redis: RedisServer, raw: Raw) -> None:
    with Raw(create_connection(("127.0.0.1", redis.port))) as theirs:
        known = [name for name in COMMANDS if theirs.ask("COMMAND", "INFO", name) != [None]]
        theirs.ask("SUBSCRIBE", "a")
        raw.ask("SUBSCRIBE", "a")
        for name in known:
            row = COMMANDS[name]
            if row.subcommands or name in ("quit", "reset") or name.endswith("subscribe"):
                continue
            words = [name, *["x"] * (abs(row.arity) - 1)]
            assert raw.raw(*words) == theirs.raw(*words), words


def test_a_client_gets_its_own_message_before_the_answer(crowd: Crowd) -> None:
    for raw in (crowd.theirs[0], crowd.ours[0]):
        raw.ask("HELLO", 3)
    crowd.check(0, "SUBSCRIBE", "a")
    assert crowd.check(0, "PUBLISH", "a", "x").endswith(b"x\r\n:1\r\n")
    crowd.check(0, "PSUBSCRIBE", "a*")
    crowd.check(0, "PUBLISH", "a", "y")


def test_switching_the_protocol_while_listening(crowd: Crowd) -> None:
    crowd.check(0, "SUBSCRIBE", "a")
    if crowd.protocol == 3:
        for raw in (crowd.theirs[0], crowd.ours[0]):
            assert b"proto" in raw.ask("HELLO", 2)
    crowd.check(0, "GET", "k")
    crowd.check(0, "HELLO", 3)
    crowd.check(1, "PUBLISH", "a", "x", told=[0])
    crowd.check(0, "UNSUBSCRIBE")
    crowd.check(0, "GET", "k")


def test_reset_and_the_end_of_a_connection_leave_all_channels(
    redis: RedisServer, crowd: Crowd
) -> None:
    for number in (0, 1):
        crowd.check(number, "SUBSCRIBE", "a", "b")
        crowd.check(number, "PSUBSCRIBE", "p*")
    crowd.check(2, "PUBSUB", "NUMSUB", "a", "b", "c")
    crowd.check(0, "RESET")
    crowd.check(2, "PUBSUB", "NUMSUB", "a", "b", "c")
    crowd.check(2, "PUBSUB", "NUMPAT")
    for raw in (crowd.theirs[1], crowd.ours[1]):
        raw.send("QUIT")
        assert raw.wait_closed() == b"+OK\r\n"
    crowd.check(2, "PUBSUB", "NUMPAT")
    crowd.check(2, "PUBSUB", "CHANNELS")
    crowd.check(2, "PUBLISH", "a", "x")


@pytest.mark.parametrize(
    "line",
    [
        "PUBSUB CHANNELS",
        "PUBSUB CHANNELS a*",
        "PUBSUB channels nothing*",
        "PUBSUB CHANNELS a b",
        "PUBSUB NUMSUB",
        "PUBSUB NUMSUB alpha alpha other",
        "PUBSUB NUMPAT",
        "PUBSUB NUMPAT x",
        "PUBSUB BOGUS",
        "PUBSUB",
        "PUBLISH a",
        "PUBLISH a b c",
        "PSUBSCRIBE",
    ],
)
def test_questions_about_channels_are_answered_as_redis_does(line: str, crowd: Crowd) -> None:
    crowd.check(0, "SUBSCRIBE", "alpha")
    crowd.check(1, "SUBSCRIBE", "alpha")
    crowd.check(0, "PSUBSCRIBE", "p*")
    crowd.check(1, "PSUBSCRIBE", "p*", "q*")
    crowd.check(2, *line.split())


def test_a_client_that_wants_no_replies_is_still_told_messages(
    redis: RedisServer, raw: Raw, connect: Connect
) -> None:
    conversation: list[list[str]] = [
        ["HELLO", "3"],
        ["SUBSCRIBE", "a"],
        ["CLIENT", "REPLY", "OFF"],
        ["SUBSCRIBE", "b"],
        ["PUBLISH", "a", "1"],
        ["GET", "k"],
        ["CLIENT", "REPLY", "ON"],
        ["PUBLISH", "b", "2"],
        ["CLIENT", "REPLY", "SKIP"],
        ["PUBLISH", "a", "3"],
        ["CLIENT", "REPLY", "SKIP"],
        ["UNSUBSCRIBE", "a"],
        ["CLIENT", "REPLY", "SKIP"],
        ["GET", "k"],
        ["GET", "k"],
    ]
    replies = []
    with Raw(create_connection(("127.0.0.1", redis.port))) as theirs:
        for each in (theirs, raw):
            each.ask("FLUSHALL")  # of what other tests left there
            each.ask(*conversation[0])
            each.socket.sendall(pipeline(conversation[1:]))
            replies.append(_all_of(each))
    assert replies[0] == replies[1]


def test_client_list_says_who_listens_and_to_how_much(raw: Raw, connect: Connect) -> None:
    listener, talker = connect(), connect()
    number = talker.ask("CLIENT", "ID")
    listener.ask("CLIENT", "SETNAME", "listener")
    for words in (["SUBSCRIBE", "a"], ["SUBSCRIBE", "b"], ["PSUBSCRIBE", "p*"]):
        listener.ask(*words)
    lines = raw.ask("CLIENT", "LIST", "TYPE", "pubsub").splitlines()
    (line,) = [line for line in lines if b" name=listener " in line]
    assert b" flags=P " in line
    assert b" sub=2 psub=1 ssub=0 " in line
    normal = raw.ask("CLIENT", "LIST", "TYPE", "normal")
    assert b"name=listener" not in normal
    assert f"id={number} ".encode() in normal
    assert raw.ask("CLIENT", "KILL", "TYPE", "pubsub") == 1
    assert listener.wait_closed() == b""
    assert talker.ask("PING") == b"PONG"


def test_messages_wait_for_the_end_of_a_reply_that_is_sent_in_parts(
    raw: Raw, connect: Connect
) -> None:
    """A message in the middle of a reply would be read as a part of it."""
    reader = connect()
    reader.ask("HELLO", 3)
    reader.ask("SUBSCRIBE", "news")
    value = b"v" * (4 << 20)
    raw.ask("SET", "big", value)
    reader.socket.sendall(request("GET", "big") * 4)
    for number in range(50):
        assert raw.ask("PUBLISH", "news", number) == 1
    numbers: list[int] = []
    values = 0
    while len(numbers) < 50 or values < 4:
        reply = reader.next_raw()
        if reply.startswith(b">"):
            numbers.append(int(reply.split(b"\r\n")[-2]))
        else:
            assert reply == b"$%d\r\n%b\r\n" % (len(value), value)
            values += 1
    assert numbers == list(range(50))


def test_a_slow_subscriber_is_disconnected_and_slows_nobody(
    start_server: StartServer, connect: Connect
) -> None:
    server = start_server(pubsub_output_limit="1mb")
    slow, quick, talker = connect(server), connect(server), connect(server)
    slow.ask("SUBSCRIBE", "news")
    quick.ask("SUBSCRIBE", "news")
    message = b"m" * 100_000
    count = 0
    while talker.ask("PUBLISH", "news", message) == 2:
        assert quick.next()[2] == message
        count += 1
        assert count < 1000, "the one who does not read is never cut off"
    assert quick.next()[2] == message
    wait_for(server, "pubsub_output_limit_disconnections", 1)
    wait_for(server, "pubsub_clients", 1)
    assert talker.ask("PUBLISH", "news", message) == 1
    assert quick.next()[2] == message


def test_thousands_of_channels_and_listeners(raw: Raw, connect: Connect) -> None:
    many = connect()
    names = [f"channel-{number}" for number in range(5000)]
    many.send("SUBSCRIBE", *names)
    assert [many.next()[2] for _ in names] == list(range(1, 5001))
    crowd = [connect() for _ in range(500)]
    for each in crowd:
        each.send("SUBSCRIBE", "channel-7")
    assert [each.next()[0] for each in crowd] == [b"subscribe"] * 500
    assert raw.ask("PUBLISH", "channel-7", "hello") == 501
    assert [each.next() for each in [*crowd, many]] == [[b"message", b"channel-7", b"hello"]] * 501
    assert raw.ask("PUBSUB", "NUMSUB", "channel-7", "channel-8") == [
        *(b"channel-7", 501),
        *(b"channel-8", 1),
    ]
    for each in [*crowd, many]:
        each.close()
    while raw.ask("PUBSUB", "CHANNELS"):
        pass
    assert raw.ask("PUBLISH", "channel-7", "hello") == 0


def test_a_subscriber_is_not_idle(start_server: StartServer, connect: Connect) -> None:
    server = start_server(timeout=1)
    listener, other = connect(server), connect(server)
    listener.ask("SUBSCRIBE", "a")
    other.ask("PING")
    assert other.wait_closed() == b""
    talker = connect(server)
    assert talker.ask("PUBLISH", "a", "x") == 1
    assert listener.next() == [b"message", b"a", b"x"]


def test_a_pattern_that_is_too_long_is_an_error_and_leaves_no_trace(raw: Raw) -> None:
    assert "too long" in error_of(raw.ask("PSUBSCRIBE", "x" * 70_000))
    assert raw.ask("GET", "k") is None
    assert raw.ask("PUBSUB", "NUMPAT") == 0


@settings(max_examples=150, deadline=None)
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from(["SUBSCRIBE", "PSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE", "PUBLISH"]),
            st.lists(NASTY, min_size=1, max_size=4),
        ),
        max_size=20,
    ),
    protocol=st.sampled_from([2, 3]),
)
def test_no_name_and_no_message_breaks_out_of_its_push(
    calls: list[tuple[str, list[bytes]]], protocol: int, server: ServerProcess
) -> None:
    with Raw(server.connect()) as raw, Raw(server.connect()) as talker:
        raw.ask("HELLO", protocol)
        for name, words in calls:
            if name == "PUBLISH":
                told = talker.ask("PUBLISH", words[0], words[-1])
                for _ in range(told):
                    *_, channel, message = parsed(raw.next_raw())
                    assert (channel, message) == (words[0], words[-1])
                continue
            raw.send(name, *words)
            for word in words:
                kind, channel, _ = parsed(raw.next_raw())
                assert (kind, channel) == (name.lower().encode(), word)
        assert _all_of(raw) == b""


def test_messages_in_one_pipeline_keep_their_order(raw: Raw, connect: Connect) -> None:
    listener = connect()
    listener.ask("SUBSCRIBE", "a")
    raw.socket.sendall(pipeline([("PUBLISH", "a", number) for number in range(2000)]))
    assert [raw.next() for _ in range(2000)] == [1] * 2000
    got: list[Any] = [listener.next() for _ in range(2000)]
    assert [int(message) for _, _, message in got] == list(range(2000))
