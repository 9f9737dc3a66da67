"""A server whose power is cut while clients work: `make power-test`, or
python -m tests.long.power_cut [--rounds N] [--seed N].

Its directories are on ext4 on a loop device, and a cut is either a shutdown of that file system or one
of the disk below it (volatile_disk.py); both lose what was not synced, the second out of order.
Acknowledgements from the cut's beginning on do not count. The server must go on, which is seen, and is
then killed. The file system is mounted again under another boot id, and a server on it must start, hold
every value whose put was acknowledged as durable, and no wrong, older or deleted one. Needs root.
"""

import argparse
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.long.crash import check_kept, tell
from tests.long.ledger import DURABLE, Ledger, Values, make_keys
from tests.long.load import Load, check_all
from tests.long.mounts import (
    BootId,
    FileSystem,
    FileSystemOnVolatileDisk,
    check_that_a_cut_loses_what_was_not_synced,
    enter_own_namespace,
)
from tests.server.raw import Raw
from tests.server_process import ServerProcess

CLIENTS = 4
KEYS_PER_CLIENT = 60
ROUNDS_PER_DISK = 10
DISK_BYTES = 600 << 20
LOAD_S = (0.05, 0.6)
DARK_S_MAX = 0.3  # a server runs for so long without its file system

TIERS: list[dict[str, object]] = [
    {"nvme_bytes": "256mb"},
    {"nvme_bytes": "256mb", "nvme_engine": "threads"},
    {"disk_bytes": "256mb"},
    {"nvme_bytes": "128mb", "disk_bytes": "256mb"},
    {"nvme_bytes": "256mb"},  # the first again, on the other kind of disk
]


class Disk:
    """A file system, what it must hold, and the servers that run on it, one after the other."""

    def __init__(
        self,
        folder: Path,
        tiers: dict[str, object],
        boot_id: BootId,
        seed: str,
        *,
        is_volatile: bool,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._rng = random.Random(seed)
        self._boot_id = boot_id
        self._shares = make_keys(CLIENTS, KEYS_PER_CLIENT)
        keys = [key for share in self._shares for key in share]
        self._ledger = Ledger(Values(seed), keys, level_kept=DURABLE, may_evict=False)
        self._files = (
            FileSystemOnVolatileDisk(folder, DISK_BYTES)
            if is_volatile
            else FileSystem(folder, "ext4", DISK_BYTES)
        )
        self._settings: dict[str, object] = {"maxmemory": "32mb", "checkpoint_interval": 1, **tiers}
        for tier in ("nvme", "disk"):
            if f"{tier}_bytes" in tiers:
                self._settings[f"{tier}_path"] = self._files.path / tier
                (self._files.path / tier).mkdir()

    def run(self, index: int) -> None:
        """Start, check, load, and cut the power."""
        server = ServerProcess(**self._settings)
        try:
            with Raw(server.connect()) as raw:
                self.counts += check_all(raw, self._ledger, clean=False)
            load = Load(self._ledger, self._shares, server.connect, f"{self._seed}/{index}")
            time.sleep(self._rng.uniform(*LOAD_S))
            check_kept(server.info())
            load.end(work_on=True)
            self._files.cut_power()
            time.sleep(self._rng.uniform(0, DARK_S_MAX))
            assert server.process.poll() is None, "it ended by itself when its files were gone"
            assert "Traceback" not in server.log, "an exception in the log"
            server.process.kill()
            load.wait()
        except BaseException as error:
            tell(server, error, f"round {index}")
            raise
        finally:
            server.stop(signal.SIGKILL)
        self.counts += load.counts
        self._files.unmount()
        self._boot_id.change()
        self._files.mount()

    def close(self) -> None:
        """Take it away."""
        self._files.unmount()
        self._files.close()


def run(rounds: int, seed: str, base: str | None) -> Counter[str]:
    """Cut the power ``rounds`` times."""
    counts: Counter[str] = Counter()
    top = Path(tempfile.mkdtemp(prefix="respkv-cut-", dir=base))
    boot_id = BootId(top)
    (top / "check").mkdir()
    check_that_a_cut_loses_what_was_not_synced(top / "check")
    per_disk = min(ROUNDS_PER_DISK, max(rounds // len(TIERS), 1))
    for start in range(0, rounds, per_disk):
        number = start // per_disk
        tiers, is_volatile = TIERS[number % len(TIERS)], bool(number % 2)
        folder = top / str(start)
        folder.mkdir()
        disk = Disk(folder, tiers, boot_id, f"{seed}/{start}", is_volatile=is_volatile)
        for index in range(start, min(start + per_disk, rounds)):
            try:
                disk.run(index)
            except BaseException as error:
                error.add_note(
                    f"seed {seed}, round {index}, {tiers}, volatile: {is_volatile}; left behind: {folder}"
                )
                raise
        disk.close()
        counts += disk.counts
        shutil.rmtree(folder)
    shutil.rmtree(top)
    return counts


def main() -> None:
    """Run it as the command line says."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--seed", default=str(int(time.time())))
    options.add_argument("--folder", help="where the disks' images are made; default: /tmp")
    chosen = options.parse_args()
    enter_own_namespace()
    print(f"seed {chosen.seed}", flush=True)
    began = time.monotonic()
    counts = run(chosen.rounds, chosen.seed, chosen.folder)
    print(", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())))
    seconds = time.monotonic() - began
    print(f"{chosen.rounds} power cuts in {seconds:.0f} s: nothing durable lost, no wrong byte")


if __name__ == "__main__":
    main()
