"""A read that looks like an earlier one gives what it gave when nothing was known of it."""

from hypothesis import given
from hypothesis import strategies as st

from respkv.wire.calls import ARGS_MAX, ARGS_MAX_OF_ALL, NAME_BYTES_MAX, SIZES_MAX, Calls, Framings
from respkv.wire.parser import UNAUTHENTICATED, Limits, RequestParser
from respkv.wire.tokenizer import Tokenizer

GET = b"*2\r\n$3\r\nGET\r\n$4\r\nk%03d\r\n"


def command(*args: bytes) -> bytes:
    return b"*%d\r\n" % len(args) + b"".join(b"$%d\r\n%b\r\n" % (len(a), a) for a in args)


def parsed(parser: RequestParser, data: bytes) -> tuple[list[list[bytes]], str, int]:
    """Return what a read gives: its commands, its error, and what is kept of it."""
    commands = list(parser.feed(data, len(data)))
    return commands, str(parser.error), parser.held_bytes


def learnt(*reads: bytes) -> Tokenizer:
    """Return a tokenizer that has met some reads twice."""
    tokenizer = Tokenizer()
    for data in reads:
        for _ in range(2):
            parsed(RequestParser(tokenizer, Limits()), data)
    return tokenizer


def test_calls_of_one_command_come_as_such_from_the_third_read_of_their_size_on() -> None:
    parser = RequestParser(Tokenizer(), Limits())
    kinds = []
    for first in (0, 3, 6):
        data = b"".join(GET % (first + number) for number in range(3))
        calls = parser.feed(bytearray(data) + b"left of another read", len(data))
        assert list(calls) == [[b"GET", b"k%03d" % (first + number)] for number in range(3)]
        kinds.append(type(calls))
    assert kinds == [list, list, Calls]


def test_calls_are_a_sequence_of_commands() -> None:
    calls = Calls(b"SET", 2, 3, (b"a", b"1", b"b", b"2", b"c", b"3"))
    commands = [[b"SET", b"a", b"1"], [b"SET", b"b", b"2"], [b"SET", b"c", b"3"]]
    assert list(calls) == commands
    assert [calls[at] for at in range(len(calls))] == commands
    assert calls[-1] == commands[-1]
    for part in (slice(1, None), slice(0, 0), slice(None, None, -2), slice(2, 9)):
        assert calls[part] == commands[part]
    assert list(Calls(b"PING", 0, 2, ())) == [[b"PING"], [b"PING"]]


NAME = st.sampled_from([b"GET", b"get", b"SET", b"KV.GET", b"PING", b"X", b"*1\r\n"])


@given(NAME, st.lists(st.integers(0, 12), max_size=3), st.integers(1, 5), st.data())
def test_a_read_that_is_known_gives_what_it_gave_before(
    name: bytes, lengths: list[int], number: int, data: st.DataObject
) -> None:
    def draw() -> bytes:
        args = [
            [data.draw(st.binary(min_size=n, max_size=n)) for n in lengths] for _ in range(number)
        ]
        return b"".join(command(name, *each) for each in args)

    tokenizer = learnt(draw())
    again = draw()
    new = parsed(RequestParser(Tokenizer(), Limits()), again)
    assert parsed(RequestParser(tokenizer, Limits()), again) == new


@given(st.integers(0, 1 << 20), st.integers(0, 255), st.integers(1, 5))
def test_one_other_byte_of_framing_is_noticed(at: int, byte: int, number: int) -> None:
    data = bytearray(b"".join(GET % each for each in range(number)))
    tokenizer = learnt(bytes(data))
    data[at % len(data)] = byte
    new = parsed(RequestParser(Tokenizer(), Limits()), bytes(data))
    assert parsed(RequestParser(tokenizer, Limits()), bytes(data)) == new


def test_another_command_of_the_same_size_and_letters_is_told_apart() -> None:
    first, other = command(b"GET", b"abcdef"), command(b"GETDEL", b"abc")
    tokenizer = learnt(first)
    for _ in range(3):
        assert parsed(RequestParser(tokenizer, Limits()), other)[0] == [[b"GETDEL", b"abc"]]
        assert parsed(RequestParser(tokenizer, Limits()), first)[0] == [[b"GET", b"abcdef"]]


def test_what_was_framed_as_nobody_should_is_not_learnt() -> None:
    odd = b"*2\r\n$3\r\nGET\r\n$04\r\nkeys\r\n"
    tokenizer = learnt(odd)
    usual = command(b"GET", b"keys0")
    assert len(odd) == len(usual)
    assert parsed(RequestParser(tokenizer, Limits()), usual)[0] == [[b"GET", b"keys0"]]
    new = parsed(RequestParser(Tokenizer(), Limits()), odd)
    assert parsed(RequestParser(tokenizer, Limits()), odd) == new


def test_before_authentication_nothing_is_taken_for_known() -> None:
    data = command(b"GET", b"k" * 40) * 2
    parser = RequestParser(learnt(data), UNAUTHENTICATED)
    assert type(parser.feed(data, len(data))) is list
    assert parser.has_rest, "a command at a time: the first may change the limits"


def test_a_read_that_ends_amid_a_command_is_not_taken_for_a_known_one() -> None:
    whole = GET % 1 + GET % 2
    tokenizer = learnt(whole)
    parser = RequestParser(tokenizer, Limits())
    head, tail = whole[:20], whole[20:]
    assert list(parser.feed(head, len(head))) == []
    assert list(parser.feed(tail, len(tail))) == [[b"GET", b"k001"], [b"GET", b"k002"]]
    assert type(parser.feed(whole, len(whole))) is Calls


def test_what_is_known_is_bounded() -> None:
    framings = Framings()
    for size in range(SIZES_MAX * 3):
        data = command(b"GET", b"k" * size)
        for _ in range(2):
            framings.learn(data, len(data), [[b"GET", b"k" * size]])
        known = [framing for each in framings._known for framing in each.values()]
        assert len(known) <= SIZES_MAX + 1
    most = ARGS_MAX_OF_ALL // ARGS_MAX
    for size in range(most * 3):
        commands = [[b"GET", b"k" * size]] * (ARGS_MAX // 2)
        data = b"".join(command(*each) for each in commands)
        for _ in range(2):
            framings.learn(data, len(data), commands)
        known = [framing for each in framings._known for framing in each.values()]
        num_args = sum(len(framing.between) for framing in known if framing is not None)
        assert num_args <= ARGS_MAX_OF_ALL + SIZES_MAX
    too_many = [[b"GET", b"k"]] * (ARGS_MAX // 2 + 1)
    data = b"".join(command(*each) for each in too_many)
    for _ in range(3):
        framings.learn(data, len(data), too_many)
    assert framings.take(data, len(data)) is None


def test_of_a_long_name_that_is_no_command_nothing_is_kept() -> None:
    framings = Framings()
    for nbytes, is_known in ((NAME_BYTES_MAX, True), (NAME_BYTES_MAX + 1, False), (60_000, False)):
        name = b"x" * nbytes
        data = command(name, b"key")
        for _ in range(3):
            framings.learn(data, len(data), [[name, b"key"]])
        assert (framings.take(data, len(data)) is not None) == is_known
