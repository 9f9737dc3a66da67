"""CLIENT, QUIT and what else ends or silences a connection."""

import time
from socket import SHUT_WR

import pytest

from tests.server.conftest import Connect
from tests.server.raw import Raw, error_of, pipeline, request
from tests.server.watching import wait_for
from tests.server_process import ServerProcess


def fields(line: bytes) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.decode().strip().split(" "))


def listed(raw: Raw) -> dict[int, dict[str, str]]:
    lines = raw.ask("CLIENT", "LIST").splitlines()
    return {int(fields(line)["id"]): fields(line) for line in lines}


def test_a_connection_is_described_in_redis_columns(raw: Raw, connect: Connect) -> None:
    other = connect()
    other.ask("HELLO", 3, "SETNAME", "worker-7")
    other.ask("CLIENT", "SETINFO", "LIB-NAME", "respkv-py")
    other.ask("CLIENT", "SETINFO", "LIB-VER", "1.2.3")
    line = listed(raw)[other.ask("CLIENT", "ID")]
    host, port = other.socket.getsockname()
    assert line["addr"] == f"{host}:{port}"
    assert line["laddr"] == "{}:{}".format(*other.socket.getpeername())
    assert line["name"] == "worker-7"
    assert line["resp"] == "3"
    assert line["db"] == "0"
    assert line["user"] == "default"
    assert line["lib-name"] == "respkv-py"
    assert line["lib-ver"] == "1.2.3"
    assert {"age", "idle", "flags", "qbuf", "omem", "tot-mem", "events", "cmd"} <= line.keys()
    assert fields(other.ask("CLIENT", "INFO"))["id"] == line["id"]


def test_the_last_command_is_shown_by_name_without_its_arguments(
    raw: Raw, connect: Connect
) -> None:
    other = connect()
    other.ask("SET", "secret-key", "secret-value")
    number = other.ask("CLIENT", "ID")
    assert listed(raw)[number]["cmd"] == "client|id"
    assert "secret" not in str(listed(raw))


def test_list_filters_by_id_and_type(raw: Raw, connect: Connect) -> None:
    ids = [connect().ask("CLIENT", "ID") for _ in range(3)]
    reply = raw.ask("CLIENT", "LIST", "ID", ids[0], ids[2], 999999)
    assert [int(fields(line)["id"]) for line in reply.splitlines()] == [ids[0], ids[2]]
    assert len(raw.ask("CLIENT", "LIST", "TYPE", "normal").splitlines()) >= 4
    assert raw.ask("CLIENT", "LIST", "TYPE", "pubsub") == b""


@pytest.mark.parametrize("how", ["ID", "ADDR", "LADDR-ID", "old", "MAXAGE"])
def test_kill_closes_the_connection_that_is_named(how: str, raw: Raw, connect: Connect) -> None:
    other = connect()
    number = other.ask("CLIENT", "ID")
    address = "{}:{}".format(*other.socket.getsockname())
    local = "{}:{}".format(*other.socket.getpeername())
    if how == "old":
        assert raw.ask("CLIENT", "KILL", address) == b"OK"
    else:
        words = {
            "ID": ["ID", number],
            "ADDR": ["ADDR", address],
            "LADDR-ID": ["LADDR", local, "ID", number],
            "MAXAGE": ["MAXAGE", 0, "ID", number],
        }[how]
        assert raw.ask("CLIENT", "KILL", *words) == 1
    assert other.wait_closed() == b""
    assert number not in listed(raw)
    assert raw.ask("CLIENT", "KILL", "ID", number) == 0
    assert error_of(raw.ask("CLIENT", "KILL", address)) == "ERR No such client"


def test_kill_spares_its_sender_unless_told(raw: Raw) -> None:
    number = raw.ask("CLIENT", "ID")
    assert raw.ask("CLIENT", "KILL", "ID", number) == 0
    assert raw.ask("CLIENT", "KILL", "ID", number, "SKIPME", "yes") == 0
    assert raw.ask("PING") == b"PONG"
    raw.socket.sendall(request("CLIENT", "KILL", "ID", number, "SKIPME", "no") + request("PING"))
    assert raw.next() == 1
    assert raw.wait_closed() == b"", "the PING behind it is not served"


def test_kill_by_type_leaves_the_others(raw: Raw, connect: Connect) -> None:
    others = [connect() for _ in range(5)]
    for each in others:
        assert each.ask("PING") == b"PONG"
    assert raw.ask("CLIENT", "KILL", "TYPE", "pubsub") == 0
    assert raw.ask("CLIENT", "KILL", "TYPE", "normal") >= 5
    for each in others:
        assert each.wait_closed() == b""
    assert raw.ask("PING") == b"PONG"


def test_a_killed_reader_gives_back_what_it_was_being_sent(
    raw: Raw, server: ServerProcess, connect: Connect
) -> None:
    raw.ask("SET", "big", b"x" * (8 << 20))
    reader = connect()
    number = reader.ask("CLIENT", "ID")
    reader.socket.sendall(request("GET", "big") * 20)
    wait_for(server, "kv_sending", 1)
    assert raw.ask("CLIENT", "KILL", "ID", number) == 1
    wait_for(server, "kv_sending", 0)


def test_reply_off_silences_until_on(raw: Raw) -> None:
    raw.send("CLIENT", "REPLY", "OFF")
    for _ in range(3):
        raw.send("SET", "k", "v")
        raw.send("GET", "k")
        raw.send("BOGUS")
    assert raw.ask("CLIENT", "REPLY", "ON") == b"OK"
    assert raw.ask("GET", "k") == b"v"
    raw.check_silent()


def test_reply_off_silences_large_streamed_and_slow_answers(raw: Raw) -> None:
    raw.ask("SET", "big", b"x" * (4 << 20))
    raw.ask("MSET", *[word for each in range(200) for word in (f"k{each}", "v")])
    raw.send("CLIENT", "REPLY", "OFF")
    for words in (["GET", "big"], ["MGET", "big", "big"], ["KEYS", "*"], ["KV.MGET", 1, "big"]):
        raw.send(*words)
    assert raw.ask("CLIENT", "REPLY", "ON") == b"OK"
    assert raw.ask("PING") == b"PONG"
    raw.check_silent()


@pytest.mark.parametrize(
    "words",
    [
        ["SET", "k", "v"],
        ["GET", "big"],
        ["MGET", "big", "k", "big"],
        ["KEYS", "*"],
        ["KV.RESERVE", "page", 1000],
        ["BOGUS"],
        ["SET", "k", b"x" * 70_000],
        ["CLIENT", "REPLY", "bogus"],
    ],
    ids=lambda words: words[0],
)
def test_reply_skip_silences_the_next_command_only(
    words: list[str], raw: Raw, server: ServerProcess
) -> None:
    raw.ask("SET", "big", b"x" * (4 << 20))
    raw.socket.sendall(pipeline([["CLIENT", "REPLY", "SKIP"], words, ["PING"], ["ECHO", "x"]]))
    assert raw.next() == b"PONG"
    assert raw.next() == b"x"
    wait_for(server, "kv_sending", 0)  # of what others were sent, too


def test_reset_ends_silence_and_forgets_the_name(raw: Raw) -> None:
    raw.ask("HELLO", 3, "SETNAME", "me")
    raw.send("CLIENT", "REPLY", "OFF")
    assert raw.raw("RESET") == b"+RESET\r\n"
    assert raw.raw("GET", "absent") == b"$-1\r\n"
    assert raw.ask("CLIENT", "GETNAME") is None


def test_quit_in_the_middle_of_a_pipeline_is_the_last_command(raw: Raw, connect: Connect) -> None:
    leaving = connect()
    leaving.socket.sendall(
        pipeline([["SET", "a", "1"], ["GET", "a"], ["QUIT"], ["SET", "b", "2"], ["GET", "b"]])
    )
    assert leaving.wait_closed() == b"+OK\r\n$1\r\n1\r\n+OK\r\n"
    assert raw.ask("EXISTS", "b") == 0


def test_quit_behind_large_answers_waits_until_they_have_left(raw: Raw, connect: Connect) -> None:
    value = bytes(range(256)) * (1 << 14)
    raw.ask("SET", "big", value)
    leaving = connect()
    leaving.socket.sendall(pipeline([["GET", "big"]] * 8 + [["QUIT"]]))
    time.sleep(0.2)
    whole = b"$%d\r\n%b\r\n" % (len(value), value)
    assert leaving.wait_closed() == whole * 8 + b"+OK\r\n"


def test_half_closing_still_gets_the_answers_to_what_was_sent(connect: Connect) -> None:
    """``printf ... | nc`` does it: the client shuts its sending side down and reads on."""
    raw = connect()
    raw.ask("SET", "big", b"x" * (8 << 20))
    raw.socket.sendall(pipeline([["GET", "big"], ["MGET", "big", "big"], ["KEYS", "big"]]))
    raw.socket.shutdown(SHUT_WR)
    big = b"$8388608\r\n" + b"x" * (8 << 20) + b"\r\n"
    assert raw.wait_closed() == big + b"*2\r\n" + big * 2 + b"*1\r\n$3\r\nbig\r\n"


def test_a_pipeline_that_is_sent_and_read_at_once_moves_a_hundred_megabytes(raw: Raw) -> None:
    """Full duplex: neither side waits for the other for ever."""
    value = b"v" * 1_000_000
    requests = [words for each in range(50) for words in (("SET", "k", value), ("GET", "k"))]
    replies = raw.raw_all(requests)
    assert replies[1::2] == [b"$1000000\r\n" + value + b"\r\n"] * 50


def test_ten_thousand_commands_in_one_write(raw: Raw) -> None:
    replies = raw.ask_all([("SET", f"k{each % 100}", each) for each in range(10_000)])
    assert replies == [b"OK"] * 10_000
    assert raw.ask_all([("GET", f"k{each}") for each in range(100)]) == [
        b"%d" % (9900 + each) for each in range(100)
    ]


def test_a_client_that_ends_in_the_middle_of_a_command_is_forgotten(
    server: ServerProcess, raw: Raw, connect: Connect
) -> None:
    for part in (
        b"*",
        b"*3\r\n$3\r\nSET",
        b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$100000\r\n" + b"x" * 50_000,
    ):
        leaving = connect()
        number = leaving.ask("CLIENT", "ID")
        leaving.socket.sendall(part)
        leaving.close()
        deadline = time.monotonic() + 60
        while number in listed(raw):
            assert time.monotonic() < deadline
    assert raw.ask("QUIT") == b"OK"
    assert raw.wait_closed() == b""
    assert int(server.info()["kv_landings"]) == 0
