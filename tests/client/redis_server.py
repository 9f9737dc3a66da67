"""The real redis-server as a fixture: Unix socket and TCP port, to be stopped and started."""

import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

START_S = 10.0


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


class RedisServer:
    """One redis-server in a folder of its own.

    options: more of its command line; they hold from the next ``start``.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.path = folder / "s"
        self.url = f"unix://{self.path}"
        self.tcp_url = f"redis://127.0.0.1:{self.port}"
        self.options = options
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        words = ["--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.path)]
        words += ["--dir", str(self._folder), "--save", "", "--appendonly", "no"]
        words += ["--enable-debug-command", "local", *self.options]
        self._process = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, "redis-server ended at once"
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        """Kill it, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def cli(self, *words: str) -> str:
        """Send one command by redis-cli; return what it printed."""
        line = ["redis-cli", "-s", str(self.path), *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(self.path))
                sock.sendall(b"PING\r\n")
                return sock.recv(1) != b""
            except OSError:
                return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.stop()
