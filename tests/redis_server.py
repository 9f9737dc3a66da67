"""The real redis-server, for tests that hold ours, or our client, against it."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import hiredis

from tests.server.raw import Word, pipeline, request

PORT_MIN = 10_000
START_S = 60.0
REPLY_S = 60.0
_MARK = b"end-of-reply-7f3a"
_numbers = itertools.count()


def why_not(version: str = "") -> str | None:
    """Return why tests cannot use redis-server here, or None when they can.

    version: how its version must begin, for tests that hold with that one only.
    """
    if shutil.which("redis-server") is None:
        return "redis-server is not installed (Debian: apt-get install redis-server)"
    line = subprocess.run(["redis-server", "--version"], capture_output=True, check=True).stdout
    if f" v={version}" not in line.decode():
        return f"the tests hold with Redis {version}, this is {line.decode().split(' sha')[0]}"
    return None


def free_port() -> int:
    """Return a TCP port that was free a moment ago, and is given to nobody who asks for any port.

    So neither a server on port 0 nor a connection takes it before it is used, nor while a server
    that had it is started again. Processes that run tests at the same time begin at other places.
    """
    given_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    num_ports = max(given_out - PORT_MIN, 1000)
    for _ in range(num_ports):
        port = PORT_MIN + (os.getpid() * 101 + next(_numbers)) % num_ports
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError(f"none of {num_ports} ports from {PORT_MIN} on is free")


class RedisServer:
    """One redis-server in a folder of its own: Unix socket and TCP port, to be stopped and started.

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
        self._connection: socket.socket | None = None
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
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Have it do nothing for a while: connections are accepted, and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def cli(self, *words: str) -> str:
        """Send one command by redis-cli; return what it printed."""
        line = ["redis-cli", "-s", str(self.path), *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    # These share one connection, so that HELLO and SELECT hold for what follows.

    def raw(self, *args: Word) -> bytes:
        """Send one command; return the bytes of all it answers, pushes too."""
        end = b"$%d\r\n%b\r\n" % (len(_MARK), _MARK)
        self._connected.sendall(request(*args) + request("ECHO", _MARK))
        reply = bytearray()
        while not reply.endswith(end):
            chunk = self._connected.recv(1 << 20)
            assert chunk, "redis-server closed the connection"
            reply += chunk
        return bytes(reply[: -len(end)])

    def ask(self, *args: Word) -> Any:
        """Send one command; return its reply as hiredis reads it."""
        return self.ask_all([args])[0]

    def ask_all(self, requests: Sequence[Sequence[Word]]) -> list[Any]:
        """Send many commands at once; return their replies."""
        self._connected.sendall(pipeline(requests))
        reader = hiredis.Reader()
        replies: list[Any] = []
        while len(replies) < len(requests):
            reply = reader.gets()
            if reply is False:
                reader.feed(self._connected.recv(1 << 20))
            else:
                replies.append(reply)
        return replies

    @property
    def _connected(self) -> socket.socket:
        if self._connection is None:
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.settimeout(REPLY_S)
            self._connection.connect(str(self.path))
        return self._connection

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
