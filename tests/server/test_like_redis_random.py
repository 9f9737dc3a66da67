"""Random command sequences over a few keys get the same answers from redis-server and from ours.

Each sequence goes out as one pipeline, in RESP2 or RESP3, cut into writes at random places. Times
are absolute or far away, and what has no order (KEYS, SCAN) is sorted, so the bytes must be equal.
"""

import itertools
import threading
from socket import create_connection

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.redis_server import RedisServer
from tests.server.raw import Raw, parsed, pipeline
from tests.server.test_like_redis import is_longer_error
from tests.server_process import ServerProcess

Words = tuple[str | bytes | int, ...]

FAR_S, FAR_MS = 33177117420, 33177117420123
KEY = st.sampled_from([b"a", b"b", b"c", b"", b"{x}\r\n", b"K" * 500])
VALUE = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"x" * 447, b"y" * 450, b"z" * 20_000, b"\r\n+OK\r\n" * 10_000, b"12345"]),
)
NUMBER = st.sampled_from([0, -1, "abc", "", "1.5", 1 << 62, 1 << 63, -(1 << 63)])
WORD = st.sampled_from(
    [
        "NX",
        "XX",
        "GT",
        "LT",
        "GET",
        "KEEPTTL",
        "PERSIST",
        "EX",
        "PX",
        "EXAT",
        "PXAT",
        "bogus",
        "",
        "nx",
    ]
)
# Hardly ever the same twice: of two equal ones GT and LT would tell which came a millisecond later.
SECONDS = st.integers(1, 9999).map(lambda each: 100 * each)
EXPIRY = st.one_of(
    st.tuples(st.sampled_from(["EX", "ex"]), SECONDS),
    st.tuples(st.just("PX"), SECONDS.map(lambda each: 1000 * each)),
    st.just(("EXAT", FAR_S)),
    st.just(("PXAT", FAR_MS)),
    st.tuples(st.sampled_from(["EX", "PX", "EXAT", "PXAT", "Bogus"]), NUMBER),
    st.just(()),
)
CONDITION = st.sampled_from(
    [(), (), ("NX",), ("XX",), ("GET",), ("KEEPTTL",), ("nx", "get"), ("XX", "GET")]
)
NOISE = st.lists(st.one_of(WORD, NUMBER), max_size=3).map(tuple)


def call(name: str, *parts: "st.SearchStrategy[object]") -> "st.SearchStrategy[Words]":
    """Draw a call: single words and tuples of words, one after the other."""
    return st.tuples(*parts).map(
        lambda drawn: (
            name,
            *itertools.chain.from_iterable(
                part if isinstance(part, tuple) else (part,) for part in drawn
            ),
        )
    )


KEYS = st.lists(KEY, min_size=1, max_size=4).map(tuple)
PAIRS = st.lists(st.tuples(KEY, VALUE), min_size=1, max_size=4).map(
    lambda pairs: tuple(itertools.chain.from_iterable(pairs))
)
TIME = st.one_of(SECONDS, NUMBER)
MILLISECONDS = st.one_of(
    SECONDS.map(lambda each: 1000 * each), st.sampled_from([0, -1, "x", 1 << 63])
)
COMMAND: "st.SearchStrategy[Words]" = st.one_of(
    call("SET", KEY, VALUE),
    call("SET", KEY, VALUE, CONDITION, EXPIRY),
    call("set", KEY, VALUE, EXPIRY, CONDITION),
    call("SET", KEY, VALUE, NOISE),
    call("GET", KEY),
    call("GETEX", KEY, EXPIRY),
    call("GETEX", KEY, NOISE),
    *(call(name, KEY) for name in ("GETDEL", "STRLEN", "TYPE", "TTL", "PERSIST")),
    *(call(name, KEY) for name in ("EXPIRETIME", "PEXPIRETIME")),
    *(call(name, KEYS) for name in ("MGET", "EXISTS", "DEL", "UNLINK", "TOUCH")),
    *(call(name, PAIRS) for name in ("MSET", "MSETNX")),
    *(call(name, KEY, VALUE) for name in ("SETNX", "GETSET")),
    call("SETEX", KEY, TIME, VALUE),
    call("PSETEX", KEY, MILLISECONDS, VALUE),
    call("EXPIRE", KEY, TIME, NOISE),
    call("PEXPIRE", KEY, MILLISECONDS, NOISE),
    call("EXPIREAT", KEY, st.sampled_from([FAR_S, 0, 1, -1, 1 << 60]), NOISE),
    call("PEXPIREAT", KEY, st.sampled_from([FAR_MS, FAR_MS + 400, 0, 1, -1, "x"]), NOISE),
    st.sampled_from([("DBSIZE",), ("FLUSHALL",), ("KEYS", "*"), ("KEYS", "[a-b]"), ("SCAN", 0)]),
    st.lists(st.one_of(WORD, KEY), min_size=1, max_size=4).map(tuple),
)


@settings(max_examples=250, deadline=None)
@given(
    requests=st.lists(COMMAND, min_size=1, max_size=30),
    protocol=st.sampled_from([2, 3]),
    cuts=st.lists(st.integers(1, 100_000), max_size=5),
)
def test_any_sequence_is_answered_as_redis_does(
    requests: list[Words], protocol: int, cuts: list[int], redis: RedisServer, server: ServerProcess
) -> None:
    with Raw(create_connection(("127.0.0.1", redis.port))) as theirs, Raw(server.connect()) as ours:
        expected = replies(theirs, protocol, requests, [])
        found = replies(ours, protocol, requests, cuts)
    for words, theirs_said, ours_said in zip(requests, expected, found, strict=True):
        if words[0] in ("KEYS", "SCAN"):
            theirs_said, ours_said = without_order(theirs_said), without_order(ours_said)
        is_same = ours_said == theirs_said or is_longer_error(theirs_said, ours_said)
        assert is_same or is_near(words, theirs_said, ours_said), words


def replies(connection: Raw, protocol: int, requests: list[Words], cuts: list[int]) -> list[bytes]:
    """Empty the server, send everything in pieces, read one reply per command."""
    connection.ask("HELLO", protocol)
    stream = pipeline([("FLUSHALL",), *requests, ("PING",)])
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})

    def send() -> None:
        for start, stop in itertools.pairwise(edges):
            connection.socket.sendall(stream[start:stop])

    sending = threading.Thread(target=send)
    sending.start()
    got = [connection.next_raw() for _ in range(len(requests) + 2)]
    sending.join()
    connection.check_silent()
    assert got[0] == b"+OK\r\n"
    assert got[-1] == b"+PONG\r\n"
    return got[1:-1]


def is_near(words: Words, theirs: bytes, ours: bytes) -> bool:
    """Whether both name about the same end of a TTL that was given as a time from now."""
    tolerance = {"TTL": 2, "EXPIRETIME": 2, "PEXPIRETIME": 2000}.get(str(words[0]), 0)
    their_time, our_time = parsed(theirs), parsed(ours)
    if not tolerance or not isinstance(their_time, int) or not isinstance(our_time, int):
        return False
    return their_time > 0 < our_time and abs(their_time - our_time) <= tolerance


def without_order(reply: bytes) -> bytes:
    value = parsed(reply)
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], list):
        value = value[1]
    return b"|".join(sorted(value)) if isinstance(value, list) else reply
