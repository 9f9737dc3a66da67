"""Bytes that are no request get Redis's own error and the end of the connection, nobody else's."""

import os
import time
from socket import create_connection

import pytest

from tests.redis_server import RedisServer
from tests.server.raw import Raw, request
from tests.server_process import ServerProcess

STREAMS = [
    b"*abc\r\n",
    b"*1 \r\n",
    b"* 1\r\n",
    b"*+1\r\n",
    b"*01\r\n",
    b"*\r\n",
    b"*1.5\r\n",
    b"*99999999999999999999\r\n",
    b"*2147483648\r\n",
    b"*-99999999999999999999\r\n",
    b"*1\r\n$abc\r\n",
    b"*1\r\n$-1\r\n",
    b"*1\r\n$-2\r\n",
    b"*1\r\n$01\r\n",
    b"*1\r\n$4 \r\n",
    b"*1\r\n$536870913\r\n",
    b"*1\r\n$9223372036854775808\r\n",
    b"*1\r\n:5\r\n",
    b"*1\r\nPING\r\n",
    b"*1\r\n+PING\r\n",
    b"*1\r\n*1\r\n$4\r\nPING\r\n",
    b"*2\r\n$4\r\nECHO\r\n%1\r\n",
    b"*1\r\n~1\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n_\r\n",
    b'"unbalanced\r\n',
    b"'unbalanced\r\n",
    b'SET k "a"b\r\n',
    b"PING\r\n*1\r\n$4\r\nPING\r\n*x\r\n",
    request("SET", "k", "v") + b"*1\r\n$-5\r\n",
]
# Lines that do not end, so that nothing can follow.
ENDLESS = [b"*" + b"1" * 70_000, b"*1\r\n$" + b"1" * 70_000, b"x" * 70_000]
# Odd, yet answered by both.
HARMLESS = [
    b"\r\n\r\n  \r\n",
    b"*0\r\n*-1\r\n*-5\r\n",
    b"PING\n",
    b"  PING  \r\n",
    b"\tPING\r\n",
    b'ECHO "a b\\x41\\n"\r\nECHO \'it\\\'s\'\r\nECHO ""\r\n',
    b"ECHO \xff\xfe\r\n",
    b"*1\r\n$4\r\nPING\r\nPING\r\n*1\r\n$4\r\nping\r\n",
    b"*2\r\n$4\r\nECHO\r\n$0\r\n\r\n",
    b"*1\r\n$4\r\nPINGxx",  # Redis looks at neither CR nor LF after a bulk
    b"*1\rx$4\r\nPING\r\n",
    b"*1\r\n$0\r\n\r\n",
    b"set a b\r\nGET a\r\nDEL a\r\n",
]


# Redis puts any byte into its error, even CR and LF, as a space; ours only what can be printed.
UNPRINTABLE = [b"*1\r\n\r\n", b"*1\r\n\xff\r\n", b"*1\r\n\0\r\n"]


def answers(connection: Raw, stream: bytes) -> bytes:
    """Send the stream, and more behind it if it ends; return all that comes back before the end."""
    behind = b"" if stream in ENDLESS else request("ECHO", "still here") + request("QUIT")
    with connection:
        connection.socket.sendall(stream + behind)
        return connection.wait_closed()


@pytest.mark.parametrize(
    "stream", STREAMS + HARMLESS + ENDLESS, ids=lambda stream: repr(stream[:40])
)
def test_odd_bytes_are_answered_as_redis_answers_them(
    stream: bytes, redis: RedisServer, server: ServerProcess
) -> None:
    expected = answers(Raw(create_connection(("127.0.0.1", redis.port))), stream)
    assert answers(Raw(server.connect()), stream) == expected
    assert (b"still here" in expected) == (stream in HARMLESS)


@pytest.mark.parametrize("stream", UNPRINTABLE)
def test_what_cannot_be_printed_is_a_question_mark_in_our_error(
    stream: bytes, server: ServerProcess
) -> None:
    expected = b"-ERR Protocol error: expected '$', got '?'\r\n"
    assert answers(Raw(server.connect()), stream) == expected


@pytest.mark.parametrize("stream", STREAMS + ENDLESS, ids=lambda stream: repr(stream[:40]))
def test_the_error_is_the_same_byte_by_byte(stream: bytes, server: ServerProcess) -> None:
    whole = answers(Raw(server.connect()), stream)
    step = 1 if len(stream) < 1000 else 9973
    with Raw(server.connect()) as raw:
        try:
            for start in range(0, len(stream), step):
                raw.socket.sendall(stream[start : start + step])
        except (ConnectionResetError, BrokenPipeError):
            pass  # it had seen enough
        assert raw.wait_closed() == whole


def test_protocol_errors_are_counted(server: ServerProcess) -> None:
    before = int(server.info()["protocol_errors"])
    answers(Raw(server.connect()), b"*x\r\n")
    assert int(server.info()["protocol_errors"]) == before + 1


def test_commands_before_the_error_are_served_and_none_after(server: ServerProcess) -> None:
    with Raw(server.connect()) as raw:
        raw.ask("DEL", "before", "after")
        raw.socket.sendall(
            request("SET", "before", "v") + b"*1\r\n$x\r\n" + request("SET", "after", "v")
        )
        assert raw.wait_closed() == b"+OK\r\n-ERR Protocol error: invalid bulk length\r\n"
    with Raw(server.connect()) as raw:
        assert raw.ask("EXISTS", "before") == 1
        assert raw.ask("EXISTS", "after") == 0


def test_answers_before_the_error_arrive_though_input_lies_unread(server: ServerProcess) -> None:
    """A socket closed over unread input is reset, and what had not been read by then is gone."""
    value = os.urandom(3 << 20)
    with Raw(server.connect()) as raw:
        assert raw.ask("SET", "large", value) == b"OK"
    for _ in range(5):
        with Raw(server.connect()) as raw:
            raw.socket.sendall(request("GET", "large") + b"*x\r\n" + b"unread" * 50_000)
            time.sleep(0.02)  # let what is sent now come behind the error
            raw.socket.sendall(b"unread" * 1000)
            answers = raw.wait_closed()
        assert answers.startswith(b"$%d\r\n%b\r\n-ERR Protocol error" % (len(value), value))


def test_who_goes_on_sending_after_an_error_is_cut_off(server: ServerProcess) -> None:
    with Raw(server.connect()) as raw:
        raw.socket.sendall(b"*x\r\n")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_for(raw, seconds=60)


def send_for(raw: Raw, seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        raw.socket.sendall(b"x" * 1000)
        time.sleep(0.01)


def test_a_browser_that_posts_to_the_port_stores_nothing(server: ServerProcess) -> None:
    """Cross-protocol requests: a line of an HTTP request must not lead to one of its body.

    Redis closes when it reads POST or Host: as a command.
    """
    body = b"SET posted v\r\n"
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with Raw(server.connect()) as raw:
        raw.socket.sendall(head + body)
        assert b"OK" not in raw.wait_closed()
    with Raw(server.connect()) as raw:
        assert raw.ask("EXISTS", "posted") == 0
