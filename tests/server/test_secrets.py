"""Passwords and values do not get into what others may read: lists, INFO, logs, errors."""

from tests.conftest import StartServer
from tests.server.raw import Raw

PASSWORD, NEXT, GUESS, VALUE = "pass-1-word", "pass-2-word", "guess-3-word", "value-4-text"
SECRETS = (PASSWORD, NEXT, GUESS, VALUE)


def test_no_secret_is_listed_logged_or_quoted(start_server: StartServer) -> None:
    server = start_server(requirepass=PASSWORD, loglevel="debug", output_timeout=1)
    said = b""
    with Raw(server.connect()) as raw, Raw(server.connect()) as other:
        said += raw.raw("AUTH", GUESS)
        said += raw.raw("AUTH", "default", GUESS)
        said += raw.raw("HELLO", 3, "AUTH", "default", GUESS)
        said += raw.raw("AUTH", GUESS, GUESS, GUESS)
        assert other.ask("AUTH", PASSWORD) == b"OK"
        assert raw.raw("HELLO", 3, "AUTH", "default", PASSWORD, "SETNAME", "me").startswith(b"%")
        assert raw.ask("SET", "k", VALUE) == b"OK"
        said += raw.raw("SET", "k", "v", "EX", "0", "GET")
        said += raw.raw("CONFIG", "SET", "requirepass", NEXT, "timeout", "soon")
        said += raw.raw("CONFIG", "SET", "requirepass", NEXT, "no-such-setting", "1")
        said += raw.raw("CONFIG", "SET", "requirepass", NEXT, "requirepass", NEXT)
        assert raw.ask("CONFIG", "SET", "requirepass", NEXT) == b"OK"
        with Raw(server.connect()) as third:
            said += third.raw("AUTH", PASSWORD)
            said += third.raw("SET", "k", VALUE)
            third.socket.sendall(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$x%b\r\n" % VALUE.encode())
            said += third.wait_closed()
        for words in (
            ("CLIENT", "LIST"),
            ("CLIENT", "INFO"),
            ("INFO", "everything"),
            ("KV.STATS",),
            ("KV.TIERS",),
            ("KV.EXPLAIN", "k"),
            ("COMMAND", "DOCS"),
        ):
            said += other.raw(*words)
        assert other.ask("CLIENT", "KILL", "TYPE", "normal") == 1
    log = server.log
    assert "ready" in log
    for secret in SECRETS:
        assert secret.encode() not in said, said
        assert secret not in log


def test_the_process_shows_no_password(start_server: StartServer) -> None:
    """It is read from the file, so it is neither an argument nor in the environment."""
    from pathlib import Path

    server = start_server(requirepass=PASSWORD)
    pid = server.process.pid
    assert PASSWORD.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert PASSWORD.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
