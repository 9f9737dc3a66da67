"""``respkv serve`` up to the point where the server begins."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from respkv.cli.serve import OPTIONS
from respkv.client import Client
from respkv.config import SETTINGS
from tests.cli.conftest import Cli


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--maxmemory", "1x"),
            "command line: maxmemory = '1x': accepted are 1mb to 1024tb,"
            " such as 65536, 64k, 512mb or 1gb",
        ),
        (("--shm", "yes"), "command line: shm = 'yes': accepted are off, ro, rw"),
        (("--port", "http"), "command line: port = 'http': accepted are -1 to 65535"),
        (("--port", "-1"), "command line: port = -1: without TCP, unixsocket must be set"),
        (
            ("--set", "maxmemory-policy=lfru"),
            "command line: maxmemory-policy = 'lfru': accepted are lru, lfu, fifo, sieve, s3fifo, "
            "arc, wtinylfu, gdsf, survival",
        ),
        (
            ("--set", "max-memory=1gb"),
            "command line: 'max-memory': unknown key; did you mean maxmemory?",
        ),
        (("--set", "timeout"), "command line: --set 'timeout': accepted are NAME=VALUE"),
        (("--config", "gone.toml"), "gone.toml: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    args: tuple[str, ...], message: str, cli: Cli
) -> None:
    done = cli("serve", *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"respkv: {message}\n"


def test_a_wrong_file_names_itself(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "respkv.toml"
    path.write_text('maxmemory-policy = "lfru"\n')
    done = cli("serve", "--config", str(path), "--port", "0")
    assert done.returncode == 2
    assert done.stderr == (
        f"respkv: {path}: maxmemory-policy = 'lfru': accepted are lru, lfu, fifo, sieve, s3fifo, "
        "arc, wtinylfu, gdsf, survival\n"
    )


def test_the_password_is_not_repeated(cli: Cli) -> None:
    done = cli("serve", "--set", "requirepass=hunter2", "--set", "shm=yes")
    assert done.returncode == 2
    assert "hunter2" not in done.stderr


def test_help_explains_the_options_and_names_every_setting(cli: Cli) -> None:
    text = cli("serve", "--help").stdout
    for name in OPTIONS:
        assert f"--{name} " in text
    listed = re.findall(r"[a-z-]+", text.partition("docs/config.md:")[2])
    assert listed == list(SETTINGS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_the_server_serves_until_it_is_told_to_stop(
    number: signal.Signals, tmp_path: Path, cli: Cli
) -> None:
    path, arena = tmp_path / "s", tmp_path / "arena"
    config = tmp_path / "respkv.toml"
    config.write_text(f'port = 1\nunixsocket = "{path}"\nmaxmemory = "16mb"\nshm = "rw"\n')
    words = ["--config", str(config), "--port", "-1", "--set", f"shm-path={arena}"]
    with subprocess.Popen([sys.executable, "-m", "respkv", "serve", *words]) as process:
        try:
            deadline = time.monotonic() + 60
            while cli("ping", url=f"unix://{path}").returncode:
                assert time.monotonic() < deadline
            with Client(f"unix://{path}") as client:
                assert client.command("CONFIG", "GET", "maxmemory") == {b"maxmemory": b"16777216"}
                assert client.command("CONFIG", "GET", "port") == {b"port": b"-1"}
            assert arena.stat().st_mode & 0o777 == 0o600
            assert path.stat().st_mode & 0o777 == 0o700
            process.send_signal(number)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    assert not path.exists()
    assert not arena.exists()


def test_a_port_in_use_is_one_line_and_exit_code_2(cli: Cli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli("serve", "--port", str(port), "--maxmemory", "16mb")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("respkv: ")
    assert str(port) in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_command_is_refused(cli: Cli) -> None:
    done = cli("sevre")
    assert done.returncode == 2
    assert "No such command 'sevre'" in done.stderr
