"""With a password set, nothing is served before AUTH, and what may be sent before it is small."""

from collections.abc import Iterator
from socket import create_connection

import pytest

from respkv.wire.commands import COMMANDS
from tests.conftest import StartServer
from tests.redis_server import RedisServer
from tests.server.conftest import Connect
from tests.server.raw import Raw, error_of, pipeline, request
from tests.server_process import ServerProcess

PASSWORD = "correct horse"
NOAUTH = b"-NOAUTH Authentication required.\r\n"


@pytest.fixture(scope="module")
def locked() -> Iterator[ServerProcess]:
    running = ServerProcess(requirepass=PASSWORD, shm="rw")
    yield running
    assert "Traceback" not in running.log
    assert running.stop() == 0


@pytest.fixture
def stranger(locked: ServerProcess, connect: Connect) -> Raw:
    """Return a connection that has not authenticated."""
    return connect(locked)


def spellings(name: str) -> list[str]:
    mixed = "".join(c.upper() if at % 2 else c for at, c in enumerate(name))
    return [name, name.upper(), name.title(), mixed, name.swapcase().capitalize()]


def all_rows() -> list[tuple[list[str], int]]:
    """Return every command and subcommand, as words, with its least number of words."""
    rows = [
        row for command in COMMANDS.values() for row in (command, *command.subcommands.values())
    ]
    return [(row.name.split("|"), abs(row.arity)) for row in rows]


def test_every_command_is_refused_before_auth(stranger: Raw) -> None:
    requests = []
    for words, least in all_rows():
        if words[0] in ("auth", "hello", "quit", "reset"):
            continue
        for name in spellings(words[0]):
            padding = ["1"] * (min(least, 10) - len(words))
            requests += [[name], [name, *words[1:]], [name, *words[1:], *padding]]
    requests += [
        ["bogus"],
        ["CLIENT", "bogus"],
        [""],
        ["GET\0"],
        ["auth "],
        ["MULTI"],
        ["SUBSCRIBE", "c"],
    ]
    assert len(requests) > 900
    stranger.socket.sendall(pipeline(requests))
    for words in requests:
        assert stranger.next_raw() == NOAUTH, words


def test_only_auth_hello_quit_and_reset_are_carried_out(
    locked: ServerProcess, connect: Connect
) -> None:
    for name in ("auth", "hello", "quit", "reset"):
        for spelling in spellings(name):
            raw = connect(locked)
            reply = raw.raw(spelling, *(["default", PASSWORD] if name == "auth" else []))
            assert reply != NOAUTH
            assert (name != "hello") == (b"NOAUTH" not in reply), reply


def test_hello_without_auth_changes_nothing(stranger: Raw) -> None:
    reply = stranger.raw("HELLO", 3)
    assert reply.startswith(b"-NOAUTH HELLO must be called with the client already authenticated")
    stranger.raw("HELLO", 3, "SETNAME", "me")
    assert stranger.raw("GET", "k") == NOAUTH
    assert stranger.ask("AUTH", PASSWORD) == b"OK"
    assert stranger.raw("GET", "k") == b"$-1\r\n", "still RESP2"
    assert stranger.ask("CLIENT", "GETNAME") is None


@pytest.mark.parametrize(
    "words",
    [
        ["AUTH", "wrong"],
        ["AUTH", ""],
        ["AUTH", PASSWORD + " "],
        ["AUTH", PASSWORD[:-1]],
        ["AUTH", "default", "wrong"],
        ["AUTH", "admin", PASSWORD],
        ["AUTH", "", PASSWORD],
        ["AUTH", b"\xff\xfe\r\n"],
        ["HELLO", "3", "AUTH", "default", "wrong"],
        ["HELLO", "3", "AUTH", "admin", PASSWORD],
    ],
)
def test_a_wrong_password_is_refused_in_redis_words(words: list[str], stranger: Raw) -> None:
    expected = b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"
    assert stranger.raw(*words) == expected
    assert stranger.raw("PING") == NOAUTH


def test_a_failed_hello_leaves_an_authenticated_connection_as_it_was(stranger: Raw) -> None:
    assert stranger.ask("AUTH", PASSWORD) == b"OK"
    error_of(stranger.ask("HELLO", "3", "AUTH", "default", "wrong"))
    assert stranger.raw("GET", "k") == b"$-1\r\n"


def test_auth_and_hello_auth_open_the_door(locked: ServerProcess, connect: Connect) -> None:
    for words in (
        ["AUTH", PASSWORD],
        ["auth", "default", PASSWORD],
        ["HELLO", "2", "AUTH", "default", PASSWORD],
        ["hello", "3", "setname", "me", "auth", "default", PASSWORD],
    ):
        raw = connect(locked)
        assert not raw.raw(*words).startswith(b"-")
        assert raw.ask("SET", "k", "v") == b"OK"


def test_reset_closes_it_again(stranger: Raw) -> None:
    stranger.ask("HELLO", "3", "AUTH", "default", PASSWORD, "SETNAME", "me")
    assert stranger.raw("GET", "absent") == b"_\r\n"
    assert stranger.raw("RESET") == b"+RESET\r\n"
    assert stranger.raw("GET", "absent") == NOAUTH
    stranger.send("SET", "k", b"x" * 16385)
    assert b"unauthenticated bulk length" in stranger.next_raw(), "the small limits are back, too"


def test_what_is_pipelined_behind_auth_is_served_with_the_full_limits(
    locked: ServerProcess, connect: Connect
) -> None:
    for first in (["AUTH", PASSWORD], ["HELLO", "2", "AUTH", "default", PASSWORD]):
        behind: list[list[str | bytes]] = [
            ["SET", "k", b"x" * 17_000],
            ["SET", "k", b"x" * 70_000],
            ["MSET", *["k", "v"] * 20],
        ]
        for second in behind:
            raw = connect(locked)
            raw.socket.sendall(pipeline([first, second, ["PING"]]))
            assert not raw.next_raw().startswith(b"-")
            assert raw.next_raw() == b"+OK\r\n", (first[0], second[0])
            assert raw.next_raw() == b"+PONG\r\n"


STREAMS = [
    request(*["PING"] * 11),
    b"*1000000\r\n",
    b"*1000000\r\n$536870911\r\n",
    b"*2\r\n$4\r\nAUTH\r\n$16385\r\n",
    b"*2\r\n$4\r\nAUTH\r\n$536870911\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$70000\r\n",
    b"*1\r\n$-1\r\n",
]


@pytest.mark.parametrize("stream", STREAMS, ids=[repr(stream[:40]) for stream in STREAMS])
def test_the_limits_before_auth_are_redis_own(
    stream: bytes, stranger: Raw, locked_redis: RedisServer
) -> None:
    with Raw(create_connection(("127.0.0.1", locked_redis.port))) as theirs:
        theirs.socket.sendall(stream)
        stranger.socket.sendall(stream)
        expected = theirs.wait_closed()
        assert expected.startswith(b"-ERR Protocol error: ")
        assert stranger.wait_closed() == expected


@pytest.fixture(scope="module")
def locked_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("locked"), "--requirepass", PASSWORD) as server:
        yield server


def test_ten_arguments_and_16_kib_are_let_through(stranger: Raw) -> None:
    assert stranger.raw(*["X"] * 10) == NOAUTH
    assert stranger.raw("AUTH", b"x" * 16384).startswith(b"-WRONGPASS")


def test_a_long_line_before_auth_is_cut_off(stranger: Raw) -> None:
    stranger.socket.sendall(b"x" * 70_000)
    assert stranger.wait_closed() == b"-ERR Protocol error: too big inline request\r\n"


def test_a_stranger_who_does_not_read_costs_no_memory(
    locked: ServerProcess, connect: Connect
) -> None:
    """CVE-2025-21605: every refusal counts as output."""
    flood = request("GET", "k") * 20_000
    strangers = [connect(locked) for _ in range(4)]
    before = locked.resident_bytes
    for raw in strangers:
        raw.socket.settimeout(0.05)
        try:
            for _ in range(20):
                raw.socket.sendall(flood)
        except (TimeoutError, ConnectionError):
            pass
    assert locked.resident_bytes - before < 16 << 20
    friend = connect(locked)
    assert friend.ask("AUTH", PASSWORD) == b"OK"


def test_a_password_set_while_serving(start_server: StartServer, connect: Connect) -> None:
    server = start_server()
    before = connect(server)
    assert before.ask("PING") == b"PONG"
    assert before.ask("CONFIG", "SET", "requirepass", "new") == b"OK"
    assert before.ask("PING") == b"PONG", "who was in stays in"
    late = connect(server)
    assert late.raw("PING") == NOAUTH
    assert late.ask("AUTH", "new") == b"OK"
    assert late.ask("CONFIG", "SET", "requirepass", "") == b"OK"
    assert connect(server).ask("PING") == b"PONG"


def test_protocol_errors_of_strangers_do_not_starve_others(
    locked: ServerProcess, connect: Connect
) -> None:
    """CVE-2025-48367."""
    friend = connect(locked)
    assert friend.ask("AUTH", PASSWORD) == b"OK"
    for _ in range(300):
        with Raw(locked.connect()) as stranger:
            stranger.socket.sendall(b"*x\r\n" * 1000)
            expected = b"-ERR Protocol error: invalid multibulk length\r\n"
            assert stranger.wait_closed() in (expected, b"")  # closing may overtake it
        assert friend.ask("PING") == b"PONG"
