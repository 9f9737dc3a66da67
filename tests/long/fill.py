"""File tiers on a file system that is too small: `make fill-test`, or
python -m tests.long.fill [--seconds N] [--only NAME] [--jobs N] [--seed N].

On 200 MiB of ext4 and of tmpfs, with a byte cap above what there is and below it, clients fill a tier
for a time. No client may get an error, no byte may be wrong, the directory never exceeds its cap (it
is looked at 20 times a second), and a few values that are in use stay in memory and quick. Then
another file takes the rest of the space away: puts still work, and within 5 s of its removal the tier
says that it is well, and a durable put is acknowledged. Needs root.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.long.ledger import DURABLE, Ledger, Values, make_keys
from tests.long.load import Load
from tests.long.mounts import FileSystem, enter_own_namespace
from tests.server.raw import Raw
from tests.server_process import ServerProcess

SPACE_BYTES = 200 << 20
CLIENTS = 3
KEYS_PER_CLIENT = 900  # some 500 MiB
LOOKS_PER_S = 20
HOT = {b"hot:%d" % index: bytes([index]) * (100 << index) for index in range(12)}
HOT_S_MAX = 2.0
TAKEN_S = 4.0
BACK_S_MAX = 5.0


@dataclass(frozen=True)
class Run:
    """One tier on one file system."""

    tier: str
    kind: str
    tier_bytes: int

    @property
    def name(self) -> str:
        """How the command line calls it."""
        return f"{self.tier}-{self.kind}-{'above' if self.tier_bytes > SPACE_BYTES else 'below'}"


RUNS = [
    Run(tier, kind, mib << 20)
    for tier, kind in (("nvme", "ext4"), ("nvme", "tmpfs"), ("disk", "ext4"), ("disk", "tmpfs"))
    for mib in (400, 120)
]


class Watch:
    """Looks at a directory again and again. ``most_bytes``: the most that its files ever took."""

    def __init__(self, folder: Path) -> None:
        self.most_bytes = self.looks = 0
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(1 / LOOKS_PER_S):
            self.most_bytes = max(self.most_bytes, taken_bytes(self._folder))
            self.looks += 1


def taken_bytes(folder: Path) -> int:
    """Return the size of all files of a directory, and no less than what they take of the disk."""
    total = 0
    for path in folder.rglob("*"):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file():
            # The file system rounds every file up, and counts what it needs itself to find it.
            total += max(found.st_size, found.st_blocks * 512 - (64 << 10))
    return total


class Hot:
    """Reads values that are in memory, all the time. ``slowest_s``: the longest wait for one."""

    def __init__(self, server: ServerProcess) -> None:
        self.slowest_s = 0.0
        self.missing = self.reads = 0
        self.failures: list[BaseException] = []
        self._raw = Raw(server.connect())
        self._over = threading.Event()
        for key, value in HOT.items():
            assert self._raw.ask("KV.PUT", key, value, "PRIORITY", 100) == b"OK"
            assert self._raw.ask("KV.PIN", key, 10**9) == 1
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read no more. Raises what went wrong."""
        self._over.set()
        self._thread.join()
        self._raw.close()
        if self.failures:
            raise self.failures[0]
        assert not self.missing, f"{self.missing} of {self.reads} reads of pinned values missed"
        assert self.slowest_s <= HOT_S_MAX, f"a value in memory took {self.slowest_s:.2f} s"

    def _run(self) -> None:
        try:
            while not self._over.wait(0.01):
                for key, value in HOT.items():
                    before = time.monotonic()
                    got = self._raw.ask("GET", key)
                    self.slowest_s = max(self.slowest_s, time.monotonic() - before)
                    self.reads += 1
                    self.missing += got is None
                    assert got in (None, value), f"{key!r} is wrong: {got!r:.100}"
        except BaseException as error:  # for the thread that waits, which raises it
            self.failures.append(error)


def state_of(server: ServerProcess, tier: str) -> str:
    """Return what INFO says about a tier's health."""
    return server.info()[f"kv_{tier}_state"]


def take_space(files: FileSystem) -> Path:
    """Fill the rest of a file system."""
    path = files.path / "other"
    with path.open("wb", buffering=0) as file:
        block = bytes(1 << 16)
        while True:
            try:
                file.write(block)
            except OSError:
                if len(block) == 1:
                    return path
                block = block[: len(block) // 2]


def check_space_back(server: ServerProcess, files: FileSystem, run: Run, load_s: float) -> float:
    """Take the space away, give it back; return how long the tier was unwell after that."""
    path = take_space(files)
    time.sleep(load_s)
    path.unlink()
    given = time.monotonic()
    with Raw(server.connect()) as raw:
        while True:
            state = state_of(server, run.tier)
            reply = raw.ask("KV.PUT", "probe", bytes(100_000), "DURABLE")
            seconds = time.monotonic() - given
            if state == "ok" and reply == b"OK":
                return seconds
            assert seconds < BACK_S_MAX, f"{run.tier} is {state} after {seconds:.1f} s: {reply}"
            time.sleep(0.05)


def fill(run: Run, folder: Path, seconds: float, seed: str) -> str:
    """Carry out one run; return what happened. Raises AssertionError."""
    files = FileSystem(folder, run.kind, SPACE_BYTES)
    place = files.path / run.tier
    place.mkdir()
    settings = {f"{run.tier}_path": place, f"{run.tier}_bytes": run.tier_bytes}
    server = ServerProcess(maxmemory="64mb", **settings)
    watch = Watch(place)
    shares = make_keys(CLIENTS, KEYS_PER_CLIENT)
    keys = [key for share in shares for key in share]
    ledger = Ledger(Values(seed), keys, level_kept=DURABLE, may_evict=True)
    try:
        hot = Hot(server)
        load = Load(ledger, shares, server.connect, seed, fair_errors=("OOM",), flush_chance=0)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not load.failures:
            time.sleep(min(0.5, seconds))
        load.end()
        load.wait()
        counts = load.counts
        assert state_of(server, run.tier) == "ok", state_of(server, run.tier)
        # Durable puts may fail now: it is the truth.
        load = Load(
            ledger,
            shares,
            server.connect,
            seed + "/taken",
            fair_errors=("OOM", "KVTIER"),
            flush_chance=0,
        )
        back_s = check_space_back(server, files, run, TAKEN_S)
        load.end()
        load.wait()
        hot.stop()
        assert "Traceback" not in server.log, "an exception in the log"
        assert server.stop() == 0
    except BaseException:
        print(f"--- {run.name}, log:\n{server.log[-5000:]}\n---", flush=True)
        raise
    finally:
        watch.stop()
        server.stop(signal.SIGKILL)
        files.unmount()
    assert watch.most_bytes <= run.tier_bytes, f"{watch.most_bytes} bytes for {run.tier_bytes}"
    return report(run, counts, watch, hot, back_s)


def report(run: Run, counts: Counter[str], watch: Watch, hot: Hot, back_s: float) -> str:
    """Say what a run has seen."""
    puts = sum(count for name, count in counts.items() if name.startswith("puts"))
    return (
        f"{run.name}: {puts:,} puts, {counts['hits']:,} hits, {counts['refused']} refused; at most"
        f" {watch.most_bytes >> 20} of {run.tier_bytes >> 20} MiB in {watch.looks:,} looks; slowest of"
        f" {hot.reads:,} hot reads {hot.slowest_s * 1000:.0f} ms; well again after {back_s:.2f} s"
    )


def run_one(name: str, seconds: float, seed: str, base: str | None) -> None:
    """Carry out the run of that name in a folder of its own."""
    run = next(run for run in RUNS if run.name == name)
    folder = Path(tempfile.mkdtemp(prefix="respkv-fill-", dir=base))
    print(fill(run, folder, seconds, f"{seed}/{name}"), flush=True)
    shutil.rmtree(folder)


def main() -> None:
    """Run it as the command line says."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--seconds", type=float, default=300, help="of each run")
    options.add_argument("--jobs", type=int, default=2, help="runs at once")
    options.add_argument("--only", metavar="TEXT", default="", help="runs whose names contain it")
    options.add_argument("--seed", default=str(int(time.time())))
    options.add_argument("--folder", help="where the disks' images are made; default: /tmp")
    options.add_argument("--run", choices=[run.name for run in RUNS], help="be this run")
    chosen = options.parse_args()
    enter_own_namespace()
    if chosen.run:
        run_one(chosen.run, chosen.seconds, chosen.seed, chosen.folder)
        return
    print(f"seed {chosen.seed}", flush=True)
    names = [run.name for run in RUNS if chosen.only in run.name]
    random.Random(chosen.seed).shuffle(names)
    command = [sys.executable, "-m", "tests.long.fill", "--seed", chosen.seed]
    command += ["--seconds", str(chosen.seconds)]
    command += ["--folder", chosen.folder] if chosen.folder else []
    for at in range(0, len(names), chosen.jobs):
        some = names[at : at + chosen.jobs]
        started = [subprocess.Popen([*command, "--run", name]) for name in some]
        statuses = [each.wait() for each in started]
        assert not any(statuses), "a run failed"


if __name__ == "__main__":
    main()
