"""The reply parser: any split of any stream gives the same values, and bulks land in place."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respkv.client.replies import (
    BULK_BYTES_MAX,
    DEPTH_MAX,
    LARGE_BYTES,
    LINE_BYTES_MAX,
    NEED_DATA,
    PUSHES_MAX,
    ReplyParser,
)
from respkv.errors import ProtocolError, ServerError

LARGE = bytes(range(256)) * (LARGE_BYTES // 256) + b"and a bit"


def feed(parser: ReplyParser, data: bytes) -> list[Any]:
    """Give a parser what one or more reads bring; return the replies that are then whole."""
    replies: list[Any] = []
    while data:
        buffer = parser.get_buffer()
        count = min(len(buffer), len(data))
        assert count > 0
        buffer[:count] = data[:count]
        parser.received(count)
        data = data[count:]
        while (reply := parser.next_reply()) is not NEED_DATA:
            replies.append(reply)
    return replies


def plain(value: Any) -> Any:
    """Turn a reply into something that can be compared."""
    match value:
        case memoryview():
            return bytes(value)
        case ServerError():
            return ("error", value.word, value.message)
        case list():
            return [plain(item) for item in value]
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case float() if math.isnan(value):
            return "nan"
        case _:
            return value


# Pairs of wire bytes and the value they mean.
lines = st.binary(max_size=40).filter(lambda data: b"\r" not in data and b"\n" not in data)
words = st.text("ABCDEF", min_size=1, max_size=8)
bulks = st.one_of(
    st.binary(max_size=100),
    st.integers(LARGE_BYTES - 3, LARGE_BYTES + 3).map(lambda count: LARGE[:count]),
)
scalars = st.one_of(
    lines.map(lambda data: (b"+%b\r\n" % data, data)),
    words.map(lambda word: (f"-{word} is wrong\r\n".encode(), ("error", word, "is wrong"))),
    st.integers(-(2**63), 2**63 - 1).map(lambda number: (b":%d\r\n" % number, number)),
    st.integers().map(lambda number: (b"(%d\r\n" % number, number)),
    st.floats(allow_nan=False).map(lambda x: (f",{x!r}\r\n".encode(), x)),
    st.sampled_from([(b"#t\r\n", True), (b"#f\r\n", False), (b"_\r\n", None)]),
    st.sampled_from([(b"$-1\r\n", None), (b"*-1\r\n", None), (b",nan\r\n", "nan")]),
    bulks.map(lambda data: (b"$%d\r\n%b\r\n" % (len(data), data), data)),
    bulks.map(lambda data: (b"=%d\r\ntxt:%b\r\n" % (len(data) + 4, data), data)),
    words.map(lambda word: (f"!{len(word) + 3}\r\n{word} no\r\n".encode(), ("error", word, "no"))),
)


def sequence(items: list[tuple[bytes, Any]], kind: bytes) -> tuple[bytes, Any]:
    wire = b"%b%d\r\n" % (kind, len(items)) + b"".join(wire for wire, _ in items)
    return wire, [value for _, value in items]


def mapping(items: dict[bytes, tuple[bytes, Any]]) -> tuple[bytes, Any]:
    pairs = (b"$%d\r\n%b\r\n%b" % (len(key), key, wire) for key, (wire, _) in items.items())
    values = {key: value for key, (_, value) in items.items()}
    return b"%%%d\r\n" % len(items) + b"".join(pairs), values


def with_attribute(item: tuple[bytes, Any], noise: tuple[bytes, Any]) -> tuple[bytes, Any]:
    return b"|1\r\n+ttl\r\n" + noise[0] + item[0], item[1]


def nested(inner: st.SearchStrategy[tuple[bytes, Any]]) -> st.SearchStrategy[tuple[bytes, Any]]:
    return st.one_of(
        st.builds(sequence, st.lists(inner, max_size=4), st.sampled_from([b"*", b"~"])),
        st.builds(mapping, st.dictionaries(st.binary(max_size=9), inner, max_size=3)),
        st.builds(with_attribute, inner, inner),
    )


replies = st.recursive(scalars, nested, max_leaves=12)
pushes = st.lists(scalars, min_size=1, max_size=3).map(lambda items: sequence(items, b">"))


@given(st.lists(replies, min_size=1, max_size=4), pushes, st.data())
def test_any_split_of_a_stream_gives_the_same_values(
    stream: list[tuple[bytes, Any]], push: tuple[bytes, Any], data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(stream)))
    parts = [wire for wire, _ in stream]
    wire = b"".join([*parts[:position], push[0], *parts[position:]])
    cuts = sorted(data.draw(st.sets(st.integers(0, len(wire)), max_size=8)))
    parser = ReplyParser()
    got = []
    for start, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        got += feed(parser, wire[start:stop])
    assert [plain(reply) for reply in got] == [value for _, value in stream]
    assert [plain(items) for items in parser.pushes] == [push[1]]
    assert parser.is_idle


def test_a_reply_of_every_type_may_come_byte_by_byte() -> None:
    wire = (
        b"*9\r\n+OK\r\n:-7\r\n$3\r\nabc\r\n%1\r\n+k\r\n~1\r\n:1\r\n,inf\r\n(12345678901234567890\r\n"
        b"|1\r\n+a\r\n+b\r\n=5\r\ntxt:x\r\n#t\r\n_\r\n"
    )
    parser = ReplyParser()
    got = [reply for index in range(len(wire)) for reply in feed(parser, wire[index : index + 1])]
    assert got == [
        [b"OK", -7, b"abc", {b"k": [1]}, math.inf, 12345678901234567890, b"x", True, None]
    ]


@given(st.binary(max_size=300) | st.text("*$+-:%>|=!#_,~(0123456789\r\n").map(str.encode))
def test_garbage_raises_protocol_error_or_waits(data: bytes) -> None:
    parser = ReplyParser()
    try:
        feed(parser, data)
    except ProtocolError:
        return
    assert parser.get_buffer()


@pytest.mark.parametrize(
    "wire",
    [
        b"$12x\r\n",
        b"$-2\r\n",
        b"$+3\r\nabc\r\n",
        b"$3\r\nabcd\r\n",
        b"*1_0\r\n",
        b"*-2\r\n",
        b":1_000\r\n",
        b": 1\r\n",
        b":\r\n",
        b"(" + b"9" * 5000 + b"\r\n",
        b",one\r\n",
        b"#true\r\n",
        b"_x\r\n",
        b"=2\r\ntx\r\n",
        b"?\r\n",
        b"\r\n",
        b"$?\r\n",
        b"*2\r\n>1\r\n+a\r\n",
        b"$%d\r\n" % (BULK_BYTES_MAX + 1),
        b"$" + b"9" * 30 + b"\r\n",
        b"*1\r\n" * (DEPTH_MAX + 1),
        b"+" + b"x" * (LINE_BYTES_MAX + 1),
    ],
    ids=lambda wire: repr(wire[:16]),
)
def test_what_is_not_a_reply_raises_protocol_error(wire: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(ReplyParser(), wire)


def test_a_count_takes_no_memory_before_its_elements_come() -> None:
    parser = ReplyParser()
    assert feed(parser, b"*999999999999\r\n%999999999999\r\n+key\r\n") == []
    assert not parser.is_idle


def test_a_large_bulk_is_received_into_its_final_place() -> None:
    parser = ReplyParser()
    assert feed(parser, b"*2\r\n*1\r\n$%d\r\nab" % len(LARGE)) == []
    into = parser.get_buffer()
    assert len(into) == len(LARGE) - 2
    into[:] = b"c" * len(into)
    parser.received(len(into))
    ((large,), small) = feed(parser, b"\r\n+x\r\n")[0]
    assert isinstance(large, memoryview)
    assert bytes(large) == b"ab" + b"c" * (len(LARGE) - 2)
    assert large.obj is into.obj
    assert small == b"x"


def wire_of(values: Iterable[bytes | None]) -> bytes:
    items = [b"$-1\r\n" if v is None else b"$%d\r\n%b\r\n" % (len(v), v) for v in values]
    return b"*%d\r\n" % len(items) + b"".join(items)


@pytest.mark.parametrize("step", [1 << 20, 1000])
def test_elements_land_each_in_its_own_target(step: int) -> None:
    memory = [bytearray(len(LARGE)) for _ in range(4)]
    memory[3] = bytearray(3)
    parser = ReplyParser()
    parser.expect([memoryview(buffer) for buffer in memory])
    wire = b">1\r\n$2\r\nhi\r\n|1\r\n+a\r\n$2\r\nno\r\n" + wire_of([LARGE, None, b"tiny", LARGE])
    got = []
    for start in range(0, len(wire), step):
        got += feed(parser, wire[start : start + step])
    first, second, third, fourth = got[0]
    assert (second, bytes(third), bytes(fourth)) == (None, b"tiny", LARGE)
    assert first.obj is memory[0]
    assert memory[0] == LARGE
    assert memory[1] == bytes(len(LARGE)), "a null leaves its target alone"
    assert memory[2][:4] == b"tiny"
    assert memory[3] == bytes(3), "one that is too short is left alone"


def test_targets_are_for_one_reply_only() -> None:
    memory = bytearray(8)
    parser = ReplyParser()
    parser.expect([memoryview(memory)])
    assert [bytes(reply) for reply in feed(parser, b"$3\r\none\r\n$3\r\ntwo\r\n")] == [
        b"one",
        b"two",
    ]
    assert memory[:3] == b"one"


def test_a_map_may_have_keys_of_any_kind() -> None:
    wire = b"%%2\r\n*2\r\n:1\r\n%%1\r\n:2\r\n:3\r\n+list\r\n$%d\r\n%b\r\n+large\r\n"
    got = feed(ReplyParser(), wire % (len(LARGE), LARGE))
    assert got == [{(1, ((2, 3),)): b"list", LARGE: b"large"}]


def test_pushes_that_nobody_reads_are_bounded() -> None:
    parser = ReplyParser()
    feed(parser, b"".join(b">1\r\n:%d\r\n" % number for number in range(PUSHES_MAX + 5)))
    assert len(parser.pushes) == PUSHES_MAX
    assert parser.pushes[0] == [5]


def test_values_too_small_to_land_pass_through_the_buffer_for_ever() -> None:
    sizes = [19_000] * 20 + [17_001, LARGE_BYTES - 1] * 20 + [3, 30_011] * 20
    values = [bytes([seed]) * size for seed, size in enumerate(sizes)]
    wire = b"".join(b"$%d\r\n%b\r\n" % (len(value), value) for value in values)
    parser = ReplyParser()
    assert feed(parser, wire) == values
    assert parser.is_idle
