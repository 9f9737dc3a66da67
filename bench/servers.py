"""The two servers that are compared, each in a process and a folder of its own.

Both listen on a free TCP port of 127.0.0.1 and on a Unix socket. redis-server has its defaults
except that it writes nothing to disk, because neither does respkv here.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

from bench.load import Address, Load

START_S = 30.0
STOP_S = 20.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


Transport: TypeAlias = Literal["unix", "tcp"]


class BenchError(Exception):
    """The comparison cannot be made: something is missing or a server answered wrongly."""


class Server:
    """A running server; leaving the ``with`` block stops it.

    command: its command line, made from a folder for its files, a port and the Unix socket's path.
    """

    def __init__(self, name: str, command: Callable[[Path, int, Path], list[str]]) -> None:
        self.name = name
        self._command = command

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix=f"bench-{self.name}-")
        folder = Path(self._folder.name)
        self.port = _free_port()
        self.socket = folder / "socket"
        self._log = folder / "log"
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C reaches the harness alone, which then stops the server.
            self._process = subprocess.Popen(
                self._command(folder, self.port, self.socket),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def tcp(self) -> Address:
        return "127.0.0.1", self.port

    @property
    def unix(self) -> Address:
        return str(self.socket)

    def address(self, transport: Transport) -> Address:
        """Return where it listens."""
        return self.unix if transport == "unix" else self.tcp

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def resident_bytes(self) -> int:
        """Bytes of memory that the process occupies, hugepages of either kind included."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return sum(int(fields[name].split()[0]) for name in ("VmRSS", "HugetlbPages")) * 1024

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with Load(self.unix) as load:
                    if load.ask("PING") == b"+PONG":
                        return
            except (FileNotFoundError, ConnectionError):
                time.sleep(0.02)
        raise BenchError(f"{self.name} did not start:\n{self._log.read_text()}")

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


def redis_server() -> Server:
    """Return a redis-server that is not started yet. Raises BenchError when there is none."""
    for program in ("redis-server", "redis-benchmark"):
        if shutil.which(program) is None:
            raise BenchError(f"{program} is missing: apt-get install redis-server redis-tools")

    def command(folder: Path, port: int, path: Path) -> list[str]:
        return [
            *("redis-server", "--bind", "127.0.0.1", "--port", str(port)),
            *("--unixsocket", str(path), "--dir", str(folder)),
            *("--save", "", "--appendonly", "no"),
        ]

    return Server("redis", command)


def respkv_server(maxmemory: int, **settings: str | int) -> Server:
    """Return a respkv server that is not started yet.

    settings: keys of its configuration file, with underscores for dashes.
    """

    def command(folder: Path, port: int, path: Path) -> list[str]:
        values = {"port": port, "unixsocket": str(path), "maxmemory": maxmemory, **settings}
        config = folder / "respkv.toml"
        config.write_text(
            "".join(f"{name.replace('_', '-')} = {value!r}\n" for name, value in values.items())
        )
        return [sys.executable, "-m", "respkv", "serve", "--config", str(config)]

    return Server("respkv", command)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> None:
    # For the end that no ``finally`` sees: a harness that is killed takes its servers along.
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        os._exit(127)
