"""A server with file tiers, killed with SIGKILL at random moments under load: `make crash-test`, or
python -m tests.long.crash [--rounds N] [--jobs N] [--seed N].

Each round a server starts on the directory that the last one left behind. It must start, hold no
wrong and no older byte, none of a deleted or flushed value, and every value whose put was
acknowledged as written or durable. Then clients work, and it is killed: in the middle of that, while
it starts, or while it stops; a few rounds end with an orderly stop. In some regimes the directories
are too small for everything; what is missing is then no fault, but what is there must be right.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.long.ledger import WRITTEN, Ledger, Values, Wrong, make_keys
from tests.long.load import Load, check_all
from tests.server.raw import Raw
from tests.server_process import ServerProcess

CLIENTS = 4
KEYS_PER_CLIENT = 80
ROUNDS_PER_DIRECTORY = 25
LOAD_S = (0.05, 0.6)
START_S_MAX = 0.6
STOP_S_MAX = 0.4
ENDS = {"kill": 78, "kill at start": 8, "kill while stopping": 6, "stop": 8}


@dataclass(frozen=True)
class Regime:
    """The file tiers of a server. may_evict: they cannot hold all that is put."""

    name: str
    may_evict: bool
    nvme_bytes: str = ""
    disk_bytes: str = ""


REGIMES = [
    Regime("nvme", False, nvme_bytes="512mb"),
    Regime("disk", False, disk_bytes="512mb"),
    Regime("nvme and disk", False, nvme_bytes="32mb", disk_bytes="512mb"),
    Regime("small nvme", True, nvme_bytes="32mb"),
    Regime("small nvme and disk", True, nvme_bytes="24mb", disk_bytes="32mb"),
]


def settings_of(regime: Regime, folder: Path, rng: random.Random) -> dict[str, object]:
    """Return the settings of a server in this regime."""
    settings: dict[str, object] = {"maxmemory": "32mb", "checkpoint_interval": 1}
    settings["promote"] = rng.choice(["second", "first", "never"])
    if regime.nvme_bytes:
        settings |= {"nvme_path": folder / "nvme", "nvme_bytes": regime.nvme_bytes}
        settings |= {"nvme_engine": rng.choice(["auto", "threads"])}
    if regime.disk_bytes:
        settings |= {"disk_path": folder / "disk", "disk_bytes": regime.disk_bytes}
    for name in ("nvme", "disk"):
        (folder / name).mkdir(exist_ok=True)
    return settings


class Round:
    """A directory, what it must hold, and the server that runs on it, again and again."""

    def __init__(self, regime: Regime, folder: Path, seed: str) -> None:
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._settings = settings_of(regime, folder, self.rng)
        self._shares = make_keys(CLIENTS, KEYS_PER_CLIENT)
        keys = [key for share in self._shares for key in share]
        self._ledger = Ledger(Values(seed), keys, level_kept=WRITTEN, may_evict=regime.may_evict)
        self._was_clean = False

    def run(self, index: int) -> None:
        """Start, check, load, and end in one of the ways."""
        end = self.rng.choices(list(ENDS), list(ENDS.values()))[0]
        if end == "kill at start":
            self._start_and_kill()
        server = ServerProcess(**self._settings)
        try:
            with Raw(server.connect()) as raw:
                found = check_all(raw, self._ledger, clean=self._was_clean)
            self.counts += found
            load = Load(self._ledger, self._shares, server.connect, f"{self._seed}/{index}")
            time.sleep(self.rng.uniform(*LOAD_S))
            if not self._ledger.may_evict:
                check_kept(server.info())
            self._was_clean = self._end(server, load, end)
            assert "Traceback" not in server.log, "an exception in the log"
        except BaseException as error:
            tell(server, error, f"round {index}, {end}")
            raise
        finally:
            server.stop(signal.SIGKILL)
        self.counts += load.counts
        self.counts[end] += 1

    def _start_and_kill(self) -> None:
        """Start a server and kill it on its way."""
        server = ServerProcess(is_awaited=False, **self._settings)
        time.sleep(self.rng.uniform(0.1, START_S_MAX))
        assert server.process.poll() is None, f"it ended by itself: {server.log}"
        self._was_clean = False
        server.stop(signal.SIGKILL)

    def _end(self, server: ServerProcess, load: Load, end: str) -> bool:
        """End the server; return whether it had the time to do so in order."""
        if "stop" in end:
            server.process.terminate()
        if end == "kill while stopping":
            time.sleep(self.rng.uniform(0, STOP_S_MAX))
        if end != "stop":
            server.process.kill()
        load.wait()
        status = server.process.wait(timeout=30)
        assert status in (0, -signal.SIGKILL), f"it ended with {status}"
        return status == 0


def check_kept(info: dict[str, str]) -> None:
    """Assert that the last of the file tiers, which can hold all, has evicted nothing."""
    evicted = info.get("kv_disk_evicted") or info["kv_nvme_evicted"]
    assert evicted == "0", f"{evicted} values evicted from a tier that can hold them all"


def tell(server: ServerProcess, error: BaseException, when: str) -> None:
    """Print what a server that failed has to say."""
    print(f"--- {when}, log:\n{server.log[-5000:]}", flush=True)
    if server.process.poll() is None:
        with suppress(AssertionError, OSError), Raw(server.connect()) as raw:
            if isinstance(error, Wrong):
                print(raw.ask("KV.EXPLAIN", error.key.name), raw.ask("KV.INFO", error.key.name))
            print({name: value for name, value in server.info().items() if name[:3] == "kv_"})
    print("---", flush=True)


@contextmanager
def directory(base: str | None) -> Iterator[Path]:
    """Make a directory; it is left there when what was done in it fails."""
    folder = Path(tempfile.mkdtemp(prefix="respkv-crash-", dir=base))
    try:
        yield folder
    except BaseException:
        print(f"left behind: {folder}", flush=True)
        raise
    shutil.rmtree(folder)


def run_share(rounds: int, seed: str, base: str | None, only: str | None) -> None:
    """Be one process of the run."""
    counts: Counter[str] = Counter()
    regimes = [regime for regime in REGIMES if only in (None, regime.name)]
    per_directory = min(ROUNDS_PER_DIRECTORY, max(rounds // len(regimes), 1))
    for start in range(0, rounds, per_directory):
        regime = regimes[start // per_directory % len(regimes)]
        with directory(base) as folder:
            each = Round(regime, folder, f"{seed}/{start}")
            for index in range(start, min(start + per_directory, rounds)):
                try:
                    each.run(index)
                except BaseException as error:
                    error.add_note(f"seed {seed}, round {index}, {regime}")
                    raise
            counts += each.counts
        print(f"{seed}: {min(start + per_directory, rounds)} of {rounds}", flush=True)
    print(", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())), flush=True)


def main() -> None:
    """Run it as the command line says."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--rounds", type=int, default=1000)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--seed", default=str(int(time.time())))
    options.add_argument("--regime", choices=[regime.name for regime in REGIMES])
    options.add_argument("--folder", help="where the directories are made; default: /tmp")
    options.add_argument("--share", metavar="SEED", help="be one process of a run")
    chosen = options.parse_args()
    if chosen.share:
        run_share(chosen.rounds, chosen.share, chosen.folder, chosen.regime)
        return
    print(f"seed {chosen.seed}", flush=True)
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "tests.long.crash",
        "--rounds",
        str(chosen.rounds // chosen.jobs),
    ]
    command += ["--folder", chosen.folder] if chosen.folder else []
    command += ["--regime", chosen.regime] if chosen.regime else []
    shares = [
        subprocess.Popen([*command, "--share", f"{chosen.seed}/{job}"])
        for job in range(chosen.jobs)
    ]
    statuses = [share.wait() for share in shares]
    assert not any(statuses), "a server lost or changed what it may not"
    seconds = time.monotonic() - began
    print(f"{chosen.rounds} rounds in {seconds:.0f} s: nothing lost, no wrong byte")


if __name__ == "__main__":
    main()
