"""Replies, held against what the real redis-server writes for the same values."""

import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from respkv.wire import reply
from respkv.wire.reply import Error, NilArray, Push, Reply, ReplySet, Simple, Verbatim, encode
from tests.redis_server import RedisServer

# What Redis's DEBUG PROTOCOL answers, as values of ours.
DEBUG_PROTOCOL: list[tuple[str, Reply]] = [
    ("string", "Hello World"),
    ("integer", 12345),
    ("double", 3.141),
    ("null", None),
    ("array", [0, 1, 2]),
    ("set", ReplySet((0, 1, 2))),
    ("map", {0: False, 1: True, 2: False}),
    ("verbatim", Verbatim("This is a verbatim\nstring")),
    ("true", True),
    ("false", False),
]


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize(("kind", "value"), DEBUG_PROTOCOL)
def test_every_kind_is_written_as_redis_writes_it(
    redis: RedisServer, kind: str, value: Reply, protocol: int
) -> None:
    redis.ask("HELLO", protocol)
    assert encode(value, protocol) == redis.raw("DEBUG", "PROTOCOL", kind)


def test_a_push_is_written_as_redis_writes_it(redis: RedisServer) -> None:
    redis.ask("HELLO", 3)
    raw = redis.raw("DEBUG", "PROTOCOL", "push")
    assert raw.startswith(encode(Push(("server-cpu-usage", 42)), 3) + b"$")
    assert encode(Push(("message", "c", "x")), 2) == encode(["message", "c", "x"], 2)


def test_the_absent_array_differs_from_the_absent_value_in_resp2_only() -> None:
    assert encode([None, NilArray()], 2) == b"*2\r\n$-1\r\n*-1\r\n"
    assert encode([None, NilArray()], 3) == b"*2\r\n_\r\n_\r\n"


# Lua's strings end at no byte, but its error and status texts do at a zero.
LINES = st.binary(max_size=20).map(lambda line: line.replace(b"\0", b"0"))
# Lua takes a -0 for a 0 that the same script holds; adding 0 makes it one.
NUMBERS = st.floats(allow_nan=False).map(lambda number: number + 0.0)
LEAVES = (
    st.integers(-(2**53), 2**53)
    | st.binary(max_size=40)
    | st.booleans()
    | NUMBERS
    | LINES.map(Simple)
    | st.binary(max_size=20).map(Verbatim)
)
# Redis's maps and sets come back in the order of a hash table: one member each.
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.binary(max_size=5), inner, max_size=1)
        | st.tuples(st.binary(max_size=5)).map(ReplySet)
    ),
    max_leaves=12,
)


def lua(value: Any) -> bytes:
    """Write a value as a Lua expression from which Redis makes the same reply."""
    match value:
        case bool():
            return b"true" if value else b"false"
        case int():
            return b"%d" % value
        case float():
            number = repr(value).encode()
            return b"{double=%b}" % {b"inf": b"1/0", b"-inf": b"-1/0"}.get(number, number)
        case bytes():
            return b'"%b"' % b"".join(b"\\%03d" % byte for byte in value)
        case Simple(text):
            return b"{ok=%b}" % lua(text)
        case Verbatim(text):
            return b'{verbatim_string={format="txt",string=%b}}' % lua(text)
        case ReplySet(members):
            return b"{set={%b}}" % b",".join(b"[%b]=true" % lua(member) for member in members)
        case dict():
            pairs = (b"[%b]=%b" % (lua(key), lua(item)) for key, item in value.items())
            return b"{map={%b}}" % b",".join(pairs)
        case _:
            return b"{%b}" % b",".join(map(lua, value))


@pytest.mark.parametrize("protocol", [2, 3])
@settings(max_examples=150, deadline=None)
@given(value=NESTED)
@example(value=[b"", [], {}, 1023, 1024, -1, {b"k": [ReplySet((b"m",))]}])
@example(value=Simple(b"\r\n+OK\r\n"))
@example(value=[0.1, 1e21, 1 / 3, 5e-324, 3.0, -2.5, float("inf"), float("-inf")])
@example(value=-0.0)
def test_nested_values_are_written_as_redis_writes_them(
    redis: RedisServer, protocol: int, value: Any
) -> None:
    redis.ask("HELLO", protocol)
    script = b"redis.setresp(3) return %b" % lua(value)
    assert encode(value, protocol) == redis.raw("EVAL", script, 0)


@settings(max_examples=150, deadline=None)
@given(text=LINES.filter(bool))
@example(text=b"ERR one\r\n+two\r\n\n\r")
def test_errors_are_written_as_redis_writes_them(redis: RedisServer, text: bytes) -> None:
    raw = redis.raw("EVAL", b'return {{err="KV"..%b}}' % lua(b" " + text), 0)
    assert encode([Error(b"KV " + text)], 2) == raw


@settings(deadline=None)
@given(text=st.binary() | st.text(st.characters(codec="utf-8")))
@example(text="ERR \r\n+OK\r\n:1")
@example(text=b"\r\n\r\n")
def test_no_text_lets_a_line_end_out(text: str | bytes) -> None:
    for line in (reply.simple(text), reply.error(text), encode([Simple(text), Error(text)], 3)[4:]):
        assert re.fullmatch(rb"([+-][^\r\n]*\r\n)+", line)


@settings(deadline=None)
@given(data=st.binary())
def test_undecodable_bytes_leave_as_they_came(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    assert encode(text, 2) == reply.bulk(data)


@settings(deadline=None)
@given(number=st.integers())
def test_integers_are_written_in_full(number: int) -> None:
    assert reply.integer(number) == f":{number}\r\n".encode()


def test_bulk_prefixes_hold_the_length() -> None:
    for length in (0, 1, 4095, 4096, 1 << 40):
        assert reply.bulk_prefix(length) == f"${length}\r\n".encode()
    assert [reply.bulk_prefix(n) for n in range(4096)] == list(reply.BULK_PREFIX)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_kind_of_buffer_is_a_bulk_string(kind: Any) -> None:
    assert encode(kind(b"ab\r\n"), 3) == b"$4\r\nab\r\n\r\n"


def test_a_view_of_wide_items_counts_bytes() -> None:
    assert reply.bulk(memoryview(bytes(8)).cast("I")) == b"$8\r\n" + bytes(8) + b"\r\n"


def test_headers_say_what_follows() -> None:
    assert [reply.array_header(3), reply.map_header(2, 2), reply.map_header(2, 3)] == [
        *(b"*3\r\n", b"*4\r\n", b"%2\r\n")
    ]
    assert [reply.set_header(2, 2), reply.set_header(2, 3)] == [b"*2\r\n", b"~2\r\n"]
    assert [reply.push_header(2, 2), reply.push_header(2, 3)] == [b"*2\r\n", b">2\r\n"]


def test_python_sets_and_frozensets_are_sets() -> None:
    assert encode({b"a"}, 3) == b"~1\r\n$1\r\na\r\n"
    assert encode(frozenset({"a"}), 2) == b"*1\r\n$1\r\na\r\n"


def test_a_value_without_a_form_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        encode([object()], 3)  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
