"""SIGTERM under load, SHUTDOWN, and starting where something is in the way."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import StartServer
from tests.server.conftest import check_log
from tests.server.raw import Closed, Raw, reply_end, request
from tests.server.watching import wait_until
from tests.server_process import ServerProcess

VALUE = bytes(range(256)) * 2048


class Loader(threading.Thread):
    """Sets and gets in pipelines until the server goes; keeps all that it received."""

    def __init__(self, server: ServerProcess, name: str) -> None:
        super().__init__()
        self.raw = Raw(server.connect())
        self.key = name
        self.whole_replies = 0
        self.rest = b""

    def run(self) -> None:
        batch = request("SET", self.key, VALUE) + request("GET", self.key) + request("STRLEN", "k")
        with self.raw:
            while True:
                try:
                    self.raw.socket.sendall(batch * 4)
                    for _ in range(12):
                        self.raw.next_raw()
                        self.whole_replies += 1
                except Closed as closed:
                    self.rest = closed.args[0]
                    return
                except OSError:
                    self.rest = self.raw.wait_closed()
                    return


def test_sigterm_under_load_breaks_no_answer_in_two() -> None:
    """Goal E4, scaled: status 0, and what a client got ends where a reply ends."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        server = ServerProcess(maxmemory="64mb", shutdown_timeout=5)
        loaders = [Loader(server, f"k{each}") for each in range(4)]
        for each in loaders:
            each.start()
        deadline = time.monotonic() + 60
        while min(each.whole_replies for each in loaders) < 24:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        log = server.log
        assert server.stop(number) == 0
        check_log(log)
        for each in loaders:
            each.join(timeout=60)
            end, start_at = 0, 0
            while start_at < len(each.rest):
                end = reply_end(each.rest, start_at)
                assert end > 0, f"half a reply: {each.rest[start_at : start_at + 60]!r}..."
                start_at = end


def test_a_reader_who_never_reads_does_not_hold_up_the_end() -> None:
    server = ServerProcess(maxmemory="64mb", shutdown_timeout=1, output_timeout=300)
    with Raw(server.connect()) as slow:
        slow.ask("SET", "big", b"x" * (16 << 20))
        slow.socket.sendall(request("GET", "big") * 5)
        wait_until(server, "kv_sending", lambda number: number > 0)
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start > 0.5


@pytest.mark.parametrize("words", [[], ["NOSAVE"], ["SAVE"], ["NOW"], ["FORCE"]])
def test_shutdown_ends_the_server_with_status_0(words: list[str]) -> None:
    server = ServerProcess()
    with Raw(server.connect()) as raw:
        assert raw.ask("SET", "k", "v") == b"OK"
        raw.send("SHUTDOWN", *words)
        assert raw.wait_closed() == b""
    assert server.process.wait(timeout=60) == 0
    check_log(server.log)
    server.stop()


def test_the_socket_file_and_the_arena_go_with_the_server() -> None:
    server = ServerProcess(shm="rw")
    with Raw(server.connect()) as raw:
        path, nbytes, _, mode, *_ = raw.ask("KV.ATTACH")
    arena = Path(os.fsdecode(path))
    assert mode == b"rw"
    assert arena.stat().st_size == nbytes
    assert stat.S_IMODE(arena.stat().st_mode) == 0o600
    assert Path(server.unixsocket).exists()
    server.process.terminate()
    assert server.process.wait(timeout=60) == 0
    assert not arena.exists()
    assert not Path(server.unixsocket).exists()
    server.stop()


def serve(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run a server that cannot start."""
    line = [sys.executable, "-m", "respkv", "serve", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_a_port_in_use_is_one_line_and_status_2(server: ServerProcess) -> None:
    done = serve("--port", str(server.port))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(server.port) in done.stderr
    assert "in use" in done.stderr


def test_a_unix_socket_in_use_is_one_line_and_status_2(server: ServerProcess) -> None:
    done = serve("--port", "0", "--unixsocket", server.unixsocket)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    with Raw(server.connect()) as raw:
        assert raw.ask("PING") == b"PONG"
    assert Path(server.unixsocket).is_socket(), "the live server's file is still there"


def test_a_file_in_the_way_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    done = serve("--port", "0", "--unixsocket", str(path))
    assert done.returncode == 2
    assert path.read_text() == "data"


def test_the_socket_file_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    dead = ServerProcess(unixsocket=path)
    dead.process.kill()
    assert dead.stop() == -signal.SIGKILL
    assert path.is_socket()
    running = ServerProcess(unixsocket=path)
    assert path.is_socket()
    assert running.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize(("configured", "mode"), [(None, 0o700), ("770", 0o770), ("777", 0o777)])
def test_the_unix_socket_has_the_permissions_that_are_set(
    configured: str | None, mode: int, start_server: StartServer
) -> None:
    server = start_server(**({} if configured is None else {"unixsocketperm": configured}))
    assert stat.S_IMODE(os.stat(server.unixsocket).st_mode) == mode


def test_nobody_else_can_connect_before_the_permissions_are_set(tmp_path: Path) -> None:
    """CVE-2023-45145: right after bind, with the widest umask and mode, only its owner may."""
    path = tmp_path / "s"
    code = (
        "import os, socket, sys\n"
        "class Watched(socket.socket):\n"
        "    def bind(self, address):\n"
        "        super().bind(address)\n"
        "        if isinstance(address, str):\n"
        "            print(oct(os.stat(address).st_mode & 0o777), flush=True)\n"
        "            os._exit(0)\n"
        "socket.socket = Watched\n"
        "os.umask(0)\n"
        "from respkv.config import Config\n"
        "from respkv.server.listeners import open_unix\n"
        f"open_unix(Config.load(None, {{'port': '-1', 'unixsocket': {str(path)!r},"
        " 'unixsocketperm': '777'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0o600", done
