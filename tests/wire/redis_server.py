"""The real redis-server, for tests that hold our answers against its own."""

import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import hiredis

START_S = 10.0
REPLY_S = 10.0
_MARK = b"end-of-reply-7f3a"


def why_not() -> str | None:
    """Return why tests cannot use redis-server here, or None when they can."""
    if shutil.which("redis-server") is None:
        return "redis-server is not installed (Debian: apt-get install redis-server)"
    version = subprocess.run(["redis-server", "--version"], capture_output=True, check=True).stdout
    if b" v=7.0." not in version:
        return f"the table is Redis 7.0's, this is {version.decode().split(' sha')[0]}"
    return None


class RedisServer:
    """One server on a Unix socket of its own, and one connection to it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="respkv-redis-")
        path = Path(self._folder.name) / "s"
        options = ["--port", "0", "--unixsocket", str(path), "--dir", self._folder.name]
        options += ["--save", "", "--appendonly", "no", "--enable-debug-command", "local"]
        self._process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(REPLY_S)
        deadline = time.monotonic() + START_S
        while self._socket.connect_ex(str(path)) != 0:
            if time.monotonic() > deadline:
                self.close()
                raise TimeoutError("redis-server did not start")
            time.sleep(0.02)

    def __enter__(self) -> "RedisServer":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and take its folder away."""
        self._socket.close()
        self._process.terminate()
        self._process.wait(timeout=START_S)
        self._folder.cleanup()

    def raw(self, *args: str | bytes | int) -> bytes:
        """Send one command; return the bytes of its reply."""
        end = b"$%d\r\n%b\r\n" % (len(_MARK), _MARK)
        self._socket.sendall(_request(args) + _request((b"ECHO", _MARK)))
        reply = bytearray()
        while not reply.endswith(end):
            chunk = self._socket.recv(1 << 20)
            assert chunk, "redis-server closed the connection"
            reply += chunk
        return bytes(reply[: -len(end)])

    def ask(self, *args: str | bytes | int) -> Any:
        """Send one command; return its reply as hiredis reads it."""
        return self.ask_all([args])[0]

    def ask_all(self, requests: "list[tuple[str | bytes | int, ...]]") -> list[Any]:
        """Send many commands at once; return their replies."""
        self._socket.sendall(b"".join(map(_request, requests)))
        reader = hiredis.Reader()
        replies: list[Any] = []
        while len(replies) < len(requests):
            reply = reader.gets()
            if reply is False:
                reader.feed(self._socket.recv(1 << 20))
            else:
                replies.append(reply)
        return replies


def _request(args: "tuple[str | bytes | int, ...]") -> bytes:
    words = [arg if isinstance(arg, bytes) else str(arg).encode() for arg in args]
    bulks = (b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
    return b"*%d\r\n" % len(words) + b"".join(bulks)
