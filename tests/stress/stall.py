"""The longest wait of a small command while large values are put, got and committed beside it:
python -m tests.stress.stall [--seconds N] [--max-ms N].

One process only PINGs; another moves values of 32 MiB all the time, over its own connection. What is
worse than in the quiet phase is time for which the event loop served nobody, or a core was missing.
"""

import argparse
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.server.raw import Raw
from tests.server_process import ServerProcess

VALUE_BYTES = 32 << 20
PHASES = ("quiet", "put", "get", "mget", "set-evicting", "commit", "scan")
SETTLE_S = 0.3


def put(raw: Raw) -> None:
    """Put a page again and again; each is another one."""
    page = bytes(VALUE_BYTES)
    for each in range(1 << 30):
        assert raw.ask("KV.PUT", f"page-{each % 3}", page) == b"OK"


def get(raw: Raw) -> None:
    """Get one page again and again."""
    raw.ask("SET", "got", bytes(VALUE_BYTES))
    while raw.ask("GET", "got") is not None:
        pass


def mget(raw: Raw) -> None:
    """Get many smaller pages in one reply."""
    keys = [f"part-{each}" for each in range(64)]
    for key in keys:
        raw.ask("SET", key, bytes(1 << 20))
    while True:
        assert len(raw.ask("KV.MGET", 64, *keys)) == 64


def set_evicting(raw: Raw) -> None:
    """Set values of many sizes, for each of which others must go."""
    for each in range(1 << 30):
        nbytes = (1 << 20, 300_000, 7 << 20, 5000)[each % 4]
        assert raw.ask("SET", f"value-{each}", bytes(nbytes)) == b"OK"


def commit(raw: Raw) -> None:
    """Reserve, write in place and commit; the server takes the checksum of each."""
    path, nbytes, *_ = raw.ask("KV.ATTACH")
    page = bytes(VALUE_BYTES)
    with open(os.fsdecode(path), "r+b") as file, mmap.mmap(file.fileno(), nbytes) as arena:
        for each in range(1 << 30):
            lease, offset = raw.ask("KV.RESERVE", f"page-{each % 3}", VALUE_BYTES)
            arena[offset : offset + VALUE_BYTES] = page
            assert raw.ask("KV.COMMIT", lease) == b"OK"


def scan(raw: Raw) -> None:
    """List many keys."""
    for start in range(0, 20_000, 500):
        names = [f"key-{each}" for each in range(start, start + 500)]
        raw.ask("MSET", *[word for name in names for word in (name, "v")])
    while True:
        raw.ask("KEYS", "*7")
        raw.ask("SCAN", 0, "COUNT", 1000)


LOADS: dict[str, Callable[[Raw], None]] = {
    "put": put,
    "get": get,
    "mget": mget,
    "set-evicting": set_evicting,
    "commit": commit,
    "scan": scan,
}


@contextmanager
def loaded(server: ServerProcess, phase: str) -> Iterator[None]:
    """Let another process load the server for a while."""
    if phase == "quiet":
        yield
        return
    line = [
        sys.executable,
        "-m",
        "tests.stress.stall",
        "--load",
        phase,
        "--socket",
        server.unixsocket,
    ]
    with subprocess.Popen(line) as process:
        time.sleep(SETTLE_S)
        try:
            yield
            assert process.poll() is None, f"the load {phase} ended by itself"
        finally:
            process.kill()


def waits_s(raw: Raw, seconds: float) -> list[float]:
    """PING as fast as it goes; return every wait, the shortest first."""
    waits = []
    end = time.perf_counter() + seconds
    while (before := time.perf_counter()) < end:
        assert raw.ask("PING") == b"PONG"
        waits.append(time.perf_counter() - before)
    return sorted(waits)


def measure(seconds: float) -> dict[str, list[float]]:
    """Return the waits of each phase."""
    server = ServerProcess(maxmemory="256mb", shm="rw")
    try:
        found = {}
        for phase in PHASES:
            with Raw(server.connect()) as raw:
                raw.ask("FLUSHALL")
                with loaded(server, phase):
                    found[phase] = waits_s(raw, seconds)
        return found
    finally:
        assert server.stop() == 0


def main() -> int:
    """Print median, 99.9 % and worst of each phase; 1 when one was worse than allowed."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.stall", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each phase")
    parser.add_argument("--max-ms", type=float, default=20.0, help="the worst wait that passes")
    parser.add_argument("--load", choices=LOADS, help="be the process that loads the server")
    parser.add_argument("--socket", help="where that server listens")
    options = parser.parse_args()
    if options.load:
        import socket

        unix = socket.socket(socket.AF_UNIX)
        unix.connect(options.socket)
        with Raw(unix) as raw:
            LOADS[options.load](raw)
    found = measure(options.seconds)
    print(f"{'PING, ms':>14} {'median':>9} {'99.9 %':>9} {'worst':>9} {'pings':>9}")
    for phase, waits in found.items():
        middle, high = waits[len(waits) // 2], waits[int(len(waits) * 0.999)]
        row = " ".join(f"{wait * 1000:9.2f}" for wait in (middle, high, waits[-1]))
        print(f"{phase:>14} {row} {len(waits):9,}")
    worst = max(waits[-1] for waits in found.values()) * 1000
    return int(worst > options.max_ms)


if __name__ == "__main__":
    sys.exit(main())
