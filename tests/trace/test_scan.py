"""Replies of every kind, whole and in pieces."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.errors import ProtocolError
from respkv.trace.scan import LINE_BYTES_MAX, Answer, ReplyScanner

CASES = [
    (b"+OK\r\n", Answer("+")),
    (b"-OOM command not allowed\r\n", Answer("-", word="OOM")),
    (b":-12\r\n", Answer(":", number=-12)),
    (b"$5\r\nhello\r\n", Answer("$", nbytes=5)),
    (b"$0\r\n\r\n", Answer("$")),
    (b"$-1\r\n", Answer("_")),
    (b"*-1\r\n", Answer("_")),
    (b"_\r\n", Answer("_")),
    (b"*0\r\n", Answer("*")),
    (b"*3\r\n:2\r\n$2\r\ncc\r\n:77\r\n", Answer("*", number=2, items=3, nbytes=2)),
    (b"*3\r\n$1\r\na\r\n$-1\r\n_\r\n", Answer("*", items=3, nils=2, nbytes=1)),
    (b"*2\r\n*2\r\n:5\r\n$-1\r\n:1\r\n", Answer("*", number=1, items=2)),
    (b"%1\r\n+k\r\n$3\r\nabc\r\n", Answer("%", items=2, nbytes=3)),
    (b"~2\r\n:1\r\n#t\r\n", Answer("~", number=1, items=2)),
    (b"=8\r\ntxt:abcd\r\n", Answer("=", nbytes=8)),
    (b"!3\r\nERR\r\n", Answer("!", nbytes=3)),
    (b",1.5\r\n", Answer(",")),
    (b"(123456789012345678901234567890\r\n", Answer("(")),
    # Embedded line ends are bytes of the bulk.
    (b"$6\r\n*1\r\n:1\r\n", Answer("$", nbytes=6)),
]


def scanned(stream: bytes, cuts: list[int]) -> list[Answer]:
    scanner = ReplyScanner()
    found: list[Answer] = []
    edges = [0, *sorted(cuts), len(stream)]
    for start, stop in pairwise(edges):
        found += scanner.feed(stream[start:stop])
    return found


@pytest.mark.parametrize(("stream", "answer"), CASES, ids=repr)
def test_a_reply_is_counted_however_it_is_cut(stream: bytes, answer: Answer) -> None:
    assert scanned(stream, []) == [answer]
    for cut in range(1, len(stream)):
        assert scanned(stream, [cut]) == [answer]
    assert scanned(stream, list(range(1, len(stream)))) == [answer]


@settings(max_examples=100, deadline=None)
@given(picks=st.lists(st.sampled_from(CASES), max_size=8), data=st.data())
def test_replies_follow_each_other(picks: list[tuple[bytes, Answer]], data: st.DataObject) -> None:
    stream = b"".join(stream for stream, _ in picks)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    assert scanned(stream, cuts) == [answer for _, answer in picks]


def test_a_push_answers_nobody() -> None:
    stream = b">3\r\n+message\r\n+a\r\n$1\r\nb\r\n:1\r\n"
    assert scanned(stream, []) == [Answer(":", number=1)]


def test_attributes_stand_before_the_reply_and_are_no_reply() -> None:
    (answer,) = scanned(b"|1\r\n+ttl\r\n:5\r\n$2\r\nab\r\n", [])
    assert answer.nbytes == 2


@pytest.mark.parametrize("stream", [b"\r\n", b"*x\r\n", b"$--1\r\n", b"$" + b"9" * 30 + b"\r\n"])
def test_what_is_no_reply_is_an_error(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        ReplyScanner().feed(stream)


def test_a_line_without_end_is_an_error_and_not_collected_for_ever() -> None:
    scanner = ReplyScanner()
    piece = b"+" + b"x" * (LINE_BYTES_MAX // 2)
    assert scanner.feed(piece) == []
    with pytest.raises(ProtocolError, match="longer than"):
        scanner.feed(piece)
