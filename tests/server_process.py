"""A respkv server in a process of its own, for black-box tests."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

READY = re.compile(r"ready on .*?(\d+)(?: and |$)")
START_S = 60.0


class ServerProcess:
    """Runs until ``stop``. Settings are those of ``Config``, with underscores for dashes.

    is_awaited: return when it is ready; else ``wait_until_ready`` says when it is.
    environment: more variables for the process, a dict of strings.
    port, unixsocket, url: where it listens; log: what it has written so far.
    """

    def __init__(
        self,
        *,
        is_awaited: object = True,
        environment: object = None,
        **settings: object,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="respkv-test-")
        folder = Path(self._folder.name)
        self.unixsocket = str(folder / "respkv.sock")
        self._log = folder / "log"
        values: dict[str, object] = {
            "port": 0,
            "unixsocket": self.unixsocket,
            "shm_path": folder / "arena" if settings.get("shm", "off") != "off" else "",
            "maxmemory": "64mb",
            **settings,
        }
        config = folder / "respkv.toml"
        lines = [f"{name.replace('_', '-')} = {_toml(value)}" for name, value in values.items()]
        config.write_text("\n".join(lines))
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "respkv", "serve", "--config", str(config)]
            assert environment is None or isinstance(environment, dict)
            variables = {**os.environ, **(environment or {})}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
        self.port, self.url = 0, ""
        if is_awaited:
            self.wait_until_ready()

    @property
    def log(self) -> str:
        """What the server has written so far."""
        return self._log.read_text()

    @property
    def resident_bytes(self) -> int:
        """Resident memory, the arena included."""
        statm = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(statm.split()[1]) * 4096

    def connect(self) -> socket.socket:
        """Return a raw connection over TCP."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def info(self) -> dict[str, str]:
        """Return every field of INFO."""
        with self.connect() as raw:
            raw.sendall(b"*1\r\n$4\r\nINFO\r\n")
            head, _, text = raw.recv(64).partition(b"\r\n")
            while len(text) < int(head[1:]) + 2:
                text += raw.recv(65536)
        lines = text.decode().split("\r\n")
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=60)
        self._folder.cleanup()
        return status

    def wait_until_ready(self) -> None:
        """Wait until it listens. Raises AssertionError with its log when it does not."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            found = READY.search(self.log)
            if found:
                self.port = int(found[1])
                self.url = f"respkv://127.0.0.1:{self.port}"
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        log = self.log
        self.stop(signal.SIGKILL)
        raise AssertionError(f"the server did not start: {log}")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else f'"{value}"'
