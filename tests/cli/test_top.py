"""``respkv top``, on a real terminal where it needs one."""

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cli.conftest import Cli, environment

WAIT_S = 60.0
HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
ENTER_SCREEN, LEAVE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"


class Terminal:
    """A terminal with ``respkv top`` running on it."""

    def __init__(self, url: str) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (24, 80))
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "respkv", "top", "--interval", "0.1"],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=environment(url) | {"TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.set_blocking(self.master, False)

    def wait_for(self, text: bytes, *, count: int = 1) -> None:
        deadline = time.monotonic() + WAIT_S
        while self.seen.count(text) < count:
            assert time.monotonic() < deadline, self.seen[-2000:]
            self._read()

    def exit_code(self) -> int:
        """Wait for the end; a terminal must be read, or its writer waits for ever."""
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen[-2000:]
            self._read()
        self._read()
        return int(self.process.returncode)

    def _read(self) -> None:
        try:
            self.seen += os.read(self.master, 1 << 16)
        except BlockingIOError:
            time.sleep(0.02)


@contextmanager
def terminal(url: str) -> Iterator[Terminal]:
    watching = Terminal(url)
    try:
        yield watching
    finally:
        watching.process.kill()
        watching.process.wait()
        os.close(watching.master)
        os.close(watching.slave)


def check_put_right(watching: Terminal) -> None:
    assert watching.seen.endswith(SHOW_CURSOR + LEAVE_SCREEN) or (
        watching.seen.rindex(LEAVE_SCREEN) > watching.seen.rindex(ENTER_SCREEN)
        and watching.seen.rindex(SHOW_CURSOR) > watching.seen.rindex(HIDE_CURSOR)
    )
    assert termios.tcgetattr(watching.slave) == watching.before


def test_q_leaves_and_puts_the_terminal_right(redis_url: str) -> None:
    with terminal(redis_url) as watching:
        watching.wait_for(b"hit rate", count=3)
        assert ENTER_SCREEN in watching.seen
        assert termios.tcgetattr(watching.slave) != watching.before
        os.write(watching.master, b"xq")
        assert watching.exit_code() == 0
        check_put_right(watching)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_signal_leaves_and_puts_the_terminal_right(
    number: signal.Signals, code: int, redis_url: str
) -> None:
    with terminal(redis_url) as watching:
        watching.wait_for(b"hit rate", count=2)
        watching.process.send_signal(number)
        assert watching.exit_code() == code
        check_put_right(watching)


def test_a_server_that_goes_away_is_noted_and_found_again(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("top") / "s"

    def start() -> "subprocess.Popen[bytes]":
        options = [
            "--port",
            "0",
            "--unixsocket",
            str(path),
            "--save",
            "",
            "--dir",
            str(path.parent),
        ]
        server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        while not path.exists():
            time.sleep(0.02)
        return server

    server = start()
    try:
        with terminal(f"unix://{path}") as watching:
            watching.wait_for(b"hit rate", count=2)
            server.terminate()
            server.wait()
            watching.wait_for(b"cannot connect to")
            server = start()
            watching.wait_for(b"hit rate", count=watching.seen.count(b"hit rate") + 5)
            assert b"cannot connect to" not in watching.seen[watching.seen.rindex(b"redis 7") :]
            os.write(watching.master, b"q")
            assert watching.exit_code() == 0
    finally:
        server.terminate()
        server.wait()


def test_once_prints_one_plain_frame(cli: Cli, redis_url: str) -> None:
    done = cli("top", "--once", "--interval", "0.1", url=redis_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("hit rate") == 1
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith(" redis 7")


def test_once_shows_the_tiers_of_a_server_of_ours(cli: Cli, server_url: str) -> None:
    done = cli("top", "--once", "--interval", "0.1", url=server_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" respkv ")
    assert "│ cpu " in done.stdout
    assert " pages │" in done.stdout


def test_without_a_terminal_it_points_to_once(cli: Cli, redis_url: str) -> None:
    done = cli("top", url=redis_url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "respkv: top needs a terminal; --once prints one frame\n"


@pytest.mark.usefixtures("without_rich")
def test_without_rich_it_says_what_to_install(cli: Cli, redis_url: str) -> None:
    done = cli("top", "--once", url=redis_url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "respkv: top needs rich: pip install 'respkv[tui]'\n"


@pytest.mark.usefixtures("without_rich")
def test_without_rich_the_other_commands_work(cli: Cli, redis_url: str) -> None:
    assert cli("ping", url=redis_url).returncode == 0
    assert cli("--help").returncode == 0
    assert cli("top", "--help").returncode == 0


def test_a_server_that_is_away_is_one_line_and_exit_code_1(cli: Cli, nowhere: str) -> None:
    done = cli("top", "--once", url=nowhere)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("respkv: cannot connect to ")
    assert done.stderr.count("\n") == 1
