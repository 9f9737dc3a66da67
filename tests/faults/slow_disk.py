"""Values in memory on a server whose disk takes 200 ms for a read: python -m tests.faults.slow_disk.

One client reads small values that are in memory, first alone, then while others read values from the
file tier, each of which takes the disk 200 ms, and put more than memory holds. Prints the median and
the 99th percentile of both, and fails when the second 99th percentile is more than twice the first;
the best of ``--rounds`` counts, since the machine has other things to do.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.preload import faults
from tests.server.raw import Raw
from tests.server_process import ServerProcess

READ_S = 0.2
WRITE_S = 0.02
HOT = {b"hot:%d" % index: bytes([index]) * 1000 for index in range(50)}
COLD_BYTES = 64 << 10
COLD = 600
READERS = 8
SETTLE_S = 2.0  # until what was put is written
FACTOR_MAX = 2.0


def cold_value(index: int) -> bytes:
    """Return the only right value of a key."""
    return index.to_bytes(4, "little") * (COLD_BYTES // 4)


class Hot:
    """Reads what is in memory, for some time."""

    def __init__(self, server: ServerProcess) -> None:
        self._raw = Raw(server.connect())
        for key, value in HOT.items():
            assert self._raw.ask("KV.PUT", key, value, "PRIORITY", 100) == b"OK"
            assert self._raw.ask("KV.PIN", key, 10**9) == 1

    def measure(self, seconds: float) -> tuple[float, float]:
        """Return the median and the 99th percentile, in ms."""
        times: list[float] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for key, value in HOT.items():
                before = time.perf_counter()
                got = self._raw.ask("GET", key)
                times.append((time.perf_counter() - before) * 1000)
                assert got == value
            time.sleep(0.01)
        return statistics.median(times), statistics.quantiles(times, n=100)[98]


@contextmanager
def readers(server: ServerProcess) -> Iterator[list[int]]:
    """Read and put cold values meanwhile; yields a list with the number of values read."""
    is_over = threading.Event()
    done = [0]
    failures: list[BaseException] = []

    def run(first: int) -> None:
        index = first
        try:
            with Raw(server.connect()) as raw:
                while not is_over.is_set():
                    index = (index + READERS) % COLD
                    got = raw.ask("GET", b"cold:%d" % index)
                    assert got in (None, cold_value(index))
                    done[0] += got is not None
                    if got is None:
                        raw.ask("SET", b"cold:%d" % index, cold_value(index))
        except BaseException as error:  # for the thread that waits, which raises it
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(READERS)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def factor(tier: str, seconds: float) -> float:
    """Measure one server; return the quotient of the 99th percentiles."""
    with tempfile.TemporaryDirectory() as folder, faults(Path(folder)) as disk:
        settings: dict[str, object] = {
            "maxmemory": "16mb",
            "environment": disk.environment,
            f"{tier}_path": Path(folder, "tier"),
            f"{tier}_bytes": "128mb",
        }
        if tier == "nvme":
            settings["nvme_engine"] = "threads"
        server = ServerProcess(**settings)
        try:
            hot = Hot(server)
            with Raw(server.connect()) as raw:
                for index in range(COLD):
                    assert raw.ask("SET", b"cold:%d" % index, cold_value(index)) == b"OK"
            time.sleep(SETTLE_S)
            quiet = hot.measure(seconds)
            disk.set("slow", "read", delay_s=READ_S)
            disk.set("slow", "write", "sync", delay_s=WRITE_S)
            with readers(server) as done:
                slow = hot.measure(seconds)
                disk.heal()
        finally:
            server.stop()
    print(
        f"{tier}: alone median {quiet[0]:.3f} p99 {quiet[1]:.3f} ms; slow disk median"
        f" {slow[0]:.3f} p99 {slow[1]:.3f} ms ({slow[1] / quiet[1]:.2f} x), {done[0]} read from it",
        flush=True,
    )
    assert done[0], "nothing was read from the disk"
    return slow[1] / quiet[1]


def main() -> None:
    """Measure both tiers."""
    parser = argparse.ArgumentParser(description="Measure memory hits over a slow disk.")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for tier in ("nvme", "disk"):
        best = min(factor(tier, options.seconds) for _ in range(options.rounds))
        if best > FACTOR_MAX:
            sys.exit(f"{tier}: {best:.2f} x, at most {FACTOR_MAX} x")


if __name__ == "__main__":
    main()
