"""A gateway in a process of its own, as `respkv gateway` runs it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.gateway.running import Client

LISTENING = re.compile(r"listening on http://127\.0\.0\.1:(\d+)$", re.MULTILINE)
READY = re.compile(r"^respkv gateway: ready to serve", re.MULTILINE)
START_S = 180.0


class GatewayProcess(Client):
    """Runs until ``stop``. options: of the command line, with their dashes; later ones win."""

    def __init__(
        self, checkpoint: Path, *options: str, is_awaited: bool = True, **environment: str
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="respkv-gateway-")
        self._log = Path(self._folder.name) / "log"
        small = ("--maxmemory", "64mb", "--kv-memory", "32mb", "--set", "prefault=no")
        command = [sys.executable, "-m", "respkv", "gateway", "--model", str(checkpoint)]
        command += ["--port", "0", "--threads", "1"]
        if "--url" not in options:
            command += small
        command += options
        with self._log.open("wb") as log:
            variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
            variables = {name: value for name, value in variables.items() if value}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
        super().__init__(0)
        self.port = int(self._wait_for(LISTENING)[1])
        if is_awaited:
            self.wait_until_ready()

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def num_descriptors(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def resident_bytes(self) -> int:
        statm = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(statm.split()[1]) * 4096

    def wait_until_ready(self) -> None:
        self._wait_for(READY)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit status. What was logged stays readable until ``close``."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for an end that was asked for; return the exit status."""
        return self.process.wait(timeout=120)

    def close(self) -> None:
        self.stop(signal.SIGKILL)
        self._folder.cleanup()

    def _wait_for(self, line: re.Pattern[str]) -> re.Match[str]:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := line.search(self.log):
                return found
            time.sleep(0.02)
        log = self.log
        self.close()
        raise AssertionError(f"the gateway did not start: {log}")
