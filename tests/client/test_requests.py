"""Requests: what is sent is what was meant, payloads stay where they are."""

from typing import Any

import hiredis
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from respkv.client.requests import (
    GATHER_BYTES,
    check_offered,
    request,
    writable_bytes,
)

args = st.one_of(
    st.binary(max_size=50),
    st.text(max_size=20),
    st.integers(),
    st.floats(allow_nan=False),
    st.integers(GATHER_BYTES - 2, GATHER_BYTES + 2).map(bytes),
    st.integers(GATHER_BYTES - 2, GATHER_BYTES + 2).map(lambda n: memoryview(bytearray(n))),
)


def as_sent(arg: Any) -> bytes:
    return arg.encode() if isinstance(arg, str) else bytes(arg)


@given(st.lists(st.lists(args, min_size=1, max_size=5), min_size=1, max_size=4))
def test_a_server_reads_the_commands_that_were_meant(commands: list[list[Any]]) -> None:
    reader = hiredis.Reader()
    for chunk in request(commands).chunks:
        reader.feed(bytes(chunk))
    for command in commands:
        for arg, sent in zip(command, reader.gets(), strict=True):
            if isinstance(arg, int | float):
                assert type(arg)(sent) == arg
            else:
                assert sent == as_sent(arg)
    assert reader.gets() is False


def test_a_payload_is_sent_from_where_it_lies() -> None:
    payload = numpy.zeros((4, GATHER_BYTES), numpy.float32)
    chunks = request([["SET", "k", payload]]).chunks
    assert [len(chunk) for chunk in chunks[1:]] == [payload.nbytes, 2]
    assert isinstance(chunks[1], memoryview)
    payload[0, 0] = 1
    assert bytes(chunks[1][:4]) == payload[0, :1].tobytes()


@pytest.mark.parametrize(
    ("arg", "named"),
    [
        (True, "bool"),
        (None, "NoneType"),
        ([1], "list"),
        (numpy.int64(3), "int64"),
        (numpy.zeros((4, 4))[:, ::2], "contiguous"),
    ],
    ids=["bool", "none", "list", "numpy scalar", "strided"],
)
def test_an_argument_that_cannot_be_sent_is_named(arg: Any, named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        request([["SET", "k", arg]])


def test_a_float_of_numpy_is_sent_as_its_digits() -> None:
    assert b"\r\n1.5\r\n" in request([["INCRBYFLOAT", "k", numpy.float64(1.5)]]).chunks[0]


def test_a_command_needs_a_name() -> None:
    with pytest.raises(ValueError, match="name"):
        request([["GET", "k"], []])


@pytest.mark.parametrize(
    ("commands", "repeatable"),
    [
        ([["get", "k"]], True),
        ([["KV.MATCH", 1, "k"], [b"EXISTS", "k"]], True),
        ([["GET", "k"], ["SET", "k", "v"]], False),
        ([["KV.SCHEMA", "GET", "ns"]], True),
        ([["KV.SCHEMA", "SET", "ns"]], False),
        ([["KV.SCHEMA"]], False),
        ([["KV.COMMIT", 1]], False),
    ],
)
def test_only_what_reads_may_be_sent_twice(commands: list[list[Any]], repeatable: bool) -> None:
    assert request(commands).repeatable is repeatable


@pytest.mark.parametrize(
    ("names", "parting"),
    [
        (["GET"], False),
        (["SELECT"], True),
        (["MULTI", "GET", "EXEC"], False),
        (["MULTI", "GET"], True),
        (["EXEC", "MULTI"], True),
        (["WATCH", "GET"], True),
    ],
)
def test_what_leaves_state_parts_with_its_connection(names: list[str], parting: bool) -> None:
    assert request([[name] for name in names]).parting is parting


def test_what_takes_a_connection_over_is_refused() -> None:
    with pytest.raises(ValueError, match="subscribe"):
        check_offered(["subscribe", "channel"])
    check_offered(["PUBLISH", "channel", "x"])


@pytest.mark.parametrize("buffer", [b"read-only", memoryview(bytearray(8))[::2]])
def test_memory_to_land_in_must_be_writable_and_contiguous(buffer: Any) -> None:
    with pytest.raises(ValueError, match="writable and contiguous"):
        writable_bytes(buffer)


def test_memory_to_land_in_may_have_any_shape() -> None:
    array = numpy.zeros((2, 3), numpy.float16)
    writable_bytes(array)[:2] = b"\x00\x3c"
    assert array[0, 0] == 1.0
    assert len(writable_bytes(numpy.zeros((0, 3)))) == 0
