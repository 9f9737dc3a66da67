"""redis-cli of Redis 7.0, as people and scripts use it."""

import os
import pty
import shutil
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.conftest import StartServer
from tests.server_process import ServerProcess

Cli = Callable[..., str]

pytestmark = pytest.mark.skipif(
    shutil.which("redis-cli") is None,
    reason="redis-cli is not installed (apt-get install redis-tools)",
)


def run(server: ServerProcess, *words: str, stdin: bytes = b"", check: bool = True) -> bytes:
    """Run redis-cli against a server; return what it printed."""
    line = ["redis-cli", "-p", str(server.port), *words]
    done = subprocess.run(line, input=stdin, capture_output=True, timeout=120)
    assert not check or not done.returncode, done
    return done.stdout


@pytest.fixture
def cli(server: ServerProcess) -> Cli:
    def call(*words: str, stdin: bytes = b"") -> str:
        return run(server, *words, stdin=stdin).decode().strip()

    call("FLUSHALL")
    return call


@pytest.mark.parametrize("protocol", ["-2", "-3"])
def test_one_command_per_call(protocol: str, cli: Cli) -> None:
    assert cli(protocol, "SET", "k", "hello world", "EX", "100") == "OK"
    assert cli(protocol, "GET", "k") == "hello world"
    assert cli(protocol, "--no-raw", "GET", "k") == '"hello world"'
    assert cli(protocol, "--no-raw", "GET", "absent") == "(nil)"
    assert 0 < int(cli(protocol, "--no-raw", "TTL", "k").removeprefix("(integer) ")) <= 100
    assert cli(protocol, "--no-raw", "EXISTS", "k", "absent") == "(integer) 1"
    assert cli(protocol, "--csv", "MGET", "k", "absent") == '"hello world",NULL'
    assert cli(protocol, "--no-raw", "BOGUS").startswith("(error) ERR unknown command 'BOGUS'")
    assert cli(protocol, "-n", "0", "ECHO", "hi") == "hi"


def test_a_map_is_printed_as_json(cli: Cli) -> None:
    assert cli("-3", "--json", "CONFIG", "GET", "appendonly") == '{"appendonly":"no"}'


def test_an_error_is_an_exit_status(server: ServerProcess) -> None:
    assert run(server, "-e", "PING") == b"PONG\n"
    line = ["redis-cli", "-p", str(server.port), "-e", "BOGUS"]
    assert subprocess.run(line, capture_output=True).returncode == 1


def test_the_unix_socket_is_the_same_server(server: ServerProcess, cli: Cli) -> None:
    cli("SET", "k", "v")
    line = ["redis-cli", "-s", server.unixsocket, "GET", "k"]
    assert subprocess.run(line, capture_output=True, check=True).stdout == b"v\n"


def test_commands_come_from_standard_input(cli: Cli) -> None:
    assert cli(stdin=b"SET k 'a b'\nGET k\nSTRLEN k\n") == "OK\na b\n3"
    assert cli("-r", "3", "-i", "0.01", "PING") == "PONG\nPONG\nPONG"


def test_x_takes_five_megabytes_from_standard_input(cli: Cli, server: ServerProcess) -> None:
    value = os.urandom(5 << 20)
    assert cli("-x", "SET", "big", stdin=value) == "OK"
    assert cli("STRLEN", "big") == str(5 << 20)
    assert run(server, "GET", "big") == value + b"\n"


def test_pipe_sends_inline_commands_and_counts_the_replies(cli: Cli) -> None:
    lines = b"".join(b"SET key-%d value-%d\r\n" % (each, each) for each in range(5000))
    assert "errors: 0, replies: 5000" in cli("--pipe", stdin=lines)
    assert cli("DBSIZE") == "5000"
    assert cli("GET", "key-4999") == "value-4999"


def test_pipe_sends_binary_commands_and_counts_the_errors(server: ServerProcess, cli: Cli) -> None:
    stream = (
        b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$70000\r\n" + b"\r" * 70_000 + b"\r\nBOGUS\r\nGET k\r\n"
    )
    assert b"errors: 1, replies: 3" in run(server, "--pipe", stdin=stream, check=False)
    assert cli("STRLEN", "k") == "70000"


def test_bigkeys_and_memkeys_find_the_largest(cli: Cli) -> None:
    cli("MSET", "small", "v", "large", "v" * 5000, "middle", "v" * 500)
    found = cli("--bigkeys")
    assert "Sampled 3 keys in the keyspace!" in found
    assert "Biggest string found '\"large\"' has 5000 bytes" in found
    found = cli("--memkeys")
    assert "Sampled 3 keys in the keyspace!" in found
    assert "Biggest string found '\"large\"' has" in found


def test_hotkeys_needs_no_lfu_policy(cli: Cli) -> None:
    cli("MSET", "hot", "v", "cold", "v")
    cli("-r", "50", "GET", "hot")
    assert 'hot key found with counter: 50\tkeyname: "hot"' in cli("--hotkeys")


def test_scan_lists_every_key(cli: Cli) -> None:
    lines = b"".join(b"SET key-%d v\r\n" % each for each in range(1000))
    cli("--pipe", stdin=lines)
    assert len(set(cli("--scan").split())) == 1000
    assert sorted(cli("--scan", "--pattern", "key-99?").split()) == [
        f"key-{each}" for each in range(990, 1000)
    ]


def test_stat_prints_a_line_a_turn(server: ServerProcess, cli: Cli) -> None:
    cli("SET", "k", "v")
    line = ["redis-cli", "-p", str(server.port), "--stat", "-i", "0.05"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        process.terminate()
    keys, memory, clients = lines[3].split()[:3]
    assert keys == "1"
    assert memory.endswith("M")
    assert int(clients) >= 1


def test_latency_is_sampled(cli: Cli) -> None:
    low, high, mean, samples = cli("--latency", "--raw", "-i", "0.3").split()[:4]
    assert float(low) <= float(mean) <= float(high)
    assert int(samples) > 0


def test_a_person_at_a_terminal_gets_help_from_command_docs(
    server: ServerProcess, cli: Cli
) -> None:
    """In a terminal redis-cli asks for COMMAND DOCS first, to complete and explain commands."""
    ours, theirs = pty.openpty()
    line = ["redis-cli", "-p", str(server.port)]
    environment = {**os.environ, "TERM": "dumb", "HOME": "/nonexistent"}
    process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        os.write(ours, b"HELP KV.MATCH\nSET k v\nGET k\nQUIT\n")
        shown = b""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end has closed
                break
            shown += part
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"KV.MATCH" in shown
    assert b"longest run of" in shown, "the summary of the command"
    assert b'"v"' in shown


def test_a_password_is_sent_first(start_server: StartServer) -> None:
    server = start_server(requirepass="open sesame")
    assert run(server, "PING") == b"NOAUTH Authentication required.\n\n"
    assert run(server, "-a", "open sesame", "--no-auth-warning", "PING") == b"PONG\n"
    assert run(server, "-3", "-a", "open sesame", "--no-auth-warning", "PING") == b"PONG\n"
    url = f"redis://default:open%20sesame@127.0.0.1:{server.port}/0"
    assert run(server, "-u", url, "PING") == b"PONG\n"
