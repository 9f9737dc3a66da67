"""Looking at a running server from outside: fields of INFO, memory, processor time, worst PING."""

import time
from collections.abc import Callable
from pathlib import Path

from tests.server.raw import Raw
from tests.server_process import ServerProcess

WAIT_S = 60.0
TICKS_PER_S = 100


def number_of(server: ServerProcess, field: str) -> int:
    """Return a number of INFO."""
    return int(server.info()[field])


def wait_until(server: ServerProcess, field: str, is_met: Callable[[int], bool]) -> int:
    """Wait for a number of INFO to become what is wanted; return it."""
    deadline = time.monotonic() + WAIT_S
    while not is_met(number := number_of(server, field)):
        assert time.monotonic() < deadline, f"{field} is still {number}"
        time.sleep(0.01)
    return number


def wait_for(server: ServerProcess, field: str, value: int) -> None:
    """Wait for a number of INFO to be ``value``."""
    wait_until(server, field, lambda number: number == value)


def worst_ping_s(raw: Raw, seconds: float) -> float:
    """PING for some time; return the longest wait for an answer."""
    worst = 0.0
    end = time.monotonic() + seconds
    while (before := time.monotonic()) < end:
        assert raw.ask("PING") == b"PONG"
        worst = max(worst, time.monotonic() - before)
    return worst


def cpu_s(server: ServerProcess) -> float:
    """Return the processor time that a server has used."""
    stat = Path(f"/proc/{server.process.pid}/stat").read_text()
    parts = stat.rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / TICKS_PER_S


def descriptors_of(server: ServerProcess) -> int:
    """Count the file descriptors that a server has open."""
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
