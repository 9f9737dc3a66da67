"""Single bits flipped at rest in the files of a stopped server: `make flip-test`, or
python -m tests.long.bit_flip [--flips N] [--seed N].

A directory is filled once, by a server that is then stopped or killed. Each round flips some bits in
a fresh copy of it: anywhere, in one file, in the small files, at the front of the large ones. A
server must start on that, and answer every key rightly or with a miss; a schema is right or absent; a
value that was read and not served must be counted in INFO. When an answer is wrong, the flips are
tried one at a time, to name the guilty one.
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.long.ledger import LEVEL_WORDS, LEVELS, Values
from tests.server.raw import Raw, Word
from tests.server_process import ServerProcess

KEYS = 200
NUMBERS = [number for number in range(3 * KEYS) if number % 9 < 7][:KEYS]  # none over 70 KB
FLIPS_PER_ROUND = 50
LONG_MS = 10**9
NAMESPACE = "flip"
SCHEMA: list[Word] = [
    "LAYERS",
    2,
    "HEADS",
    1,
    "DIM",
    8,
    "TOKENS",
    16,
    "DTYPE",
    "float16",
    "FINGERPRINT",
    "model",
]
SCHEMA_PAGE = bytes(range(256)) * 4
TIERS: list[dict[str, object]] = [
    {"nvme_bytes": "16mb"},
    {"disk_bytes": "16mb"},
    {"nvme_bytes": "16mb", "disk_bytes": "16mb"},
]


@dataclass(frozen=True)
class Flip:
    """One bit of one file."""

    path: str
    offset: int
    bit: int

    def apply(self, folder: Path) -> None:
        """Flip it."""
        with (folder / self.path).open("r+b") as file:
            file.seek(self.offset)
            byte = file.read(1)[0]
            file.seek(self.offset)
            file.write(bytes([byte ^ 1 << self.bit]))


@dataclass
class Expected:
    """What the pristine directory holds: bytes, parent and version of each key."""

    values: dict[bytes, bytes]
    parents: dict[bytes, bytes]
    schema: Any


class Filled:
    """A directory that a server has filled."""

    def __init__(self, folder: Path, tiers: dict[str, object], seed: str) -> None:
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.pristine, self.damaged = folder / "pristine", folder / "damaged"
        self._tiers = tiers
        self._number = self.rng.choice([signal.SIGTERM, signal.SIGKILL])
        self.pristine.mkdir()
        self._server = ServerProcess(**self._settings(self.pristine))
        try:
            self.expected = self._fill(Values(seed))
        finally:
            self._server.stop(self._number)
        self._files = {
            str(path.relative_to(self.pristine)): path.read_bytes()
            for path in self.pristine.rglob("*")
            if path.is_file() and path.stat().st_size
        }
        self._places = self._find_values()

    def round(self, flips: list[Flip]) -> None:
        """Start a server on a copy with these flips, and check all it says. Raises AssertionError."""
        shutil.rmtree(self.damaged, ignore_errors=True)
        copy_sparse(self.pristine, self.damaged)
        for flip in flips:
            flip.apply(self.damaged)
        server = ServerProcess(**self._settings(self.damaged))
        try:
            with Raw(server.connect()) as raw:
                self._check(raw, server, flips)
            assert "Traceback" not in server.log, server.log
        finally:
            status = server.stop()
        assert status == 0, f"it ended with {status}"

    def choose(self, count: int) -> list[Flip]:
        """Choose bits to flip, some rounds more in what describes than in what is described."""
        names = list(self._files)
        small = [name for name in names if "segment" not in name] or names
        match self.rng.randrange(6):
            case 5 if any(self._places.values()):
                return self._choose_in_values(count)
            case 0 | 1:
                sizes = [len(self._files[name]) for name in names]
                chosen = self.rng.choices(names, sizes, k=count)
            case 2:
                chosen = [self.rng.choice(names)] * count
            case 3:
                chosen = self.rng.choices(small, k=self.rng.randint(1, count))
            case _:
                chosen = self.rng.choices(names, k=self.rng.randint(1, 3))
        front = self.rng.random() < 0.3
        return [
            Flip(
                name,
                self.rng.randrange(min(len(self._files[name]), 8192 if front else 1 << 40)),
                self.rng.randrange(8),
            )
            for name in chosen
        ]

    def _choose_in_values(self, count: int) -> list[Flip]:
        """Choose one bit in each of some values, as many as that."""
        places = [(name, *place) for name, found in self._places.items() for place in found]
        return [
            Flip(name, self.rng.randrange(start, stop), self.rng.randrange(8))
            for name, start, stop, _ in self.rng.sample(places, min(count, len(places)))
        ]

    def guilty(self, flips: list[Flip]) -> list[Flip]:
        """Return those of the flips that are enough for a fault on their own."""
        found = []
        for flip in flips:
            try:
                self.round([flip])
            except AssertionError:
                found.append(flip)
        return found

    def _settings(self, folder: Path) -> dict[str, object]:
        settings: dict[str, object] = {"maxmemory": "32mb", "checkpoint_interval": 1, **self._tiers}
        for tier in ("nvme", "disk"):
            if f"{tier}_bytes" in self._tiers:
                (folder / tier).mkdir(exist_ok=True, parents=True)
                settings[f"{tier}_path"] = folder / tier
        return settings

    def _fill(self, values: Values) -> Expected:
        expected = Expected({}, {}, None)
        with Raw(self._server.connect()) as raw:
            assert raw.ask("KV.SCHEMA", "SET", NAMESPACE, *SCHEMA) == b"OK"
            expected.schema = raw.ask("KV.SCHEMA", "GET", NAMESPACE)
            last = b""
            for at, number in enumerate(NUMBERS):
                is_page = number % 3 == 0
                key = b"page:%064x" % number if is_page else b"key:%d" % number
                for version in range(2 if number % 5 == 0 and not is_page else 1):
                    expected.values[key] = values.of(number, version)
                    level = self.rng.choice(
                        LEVELS[1:] if self._number == signal.SIGKILL else LEVELS
                    )
                    words: list[Word] = ["KV.PUT", key, expected.values[key], *LEVEL_WORDS[level]]
                    words += ["PARENT", last] if is_page and last else []
                    words += ["PX", LONG_MS] if number % 4 == 0 else []
                    assert raw.ask(*words) == b"OK"
                expected.parents[key] = last if is_page else b""
                last = key if is_page else last
                if at == KEYS // 2:
                    time.sleep(1.2)  # so that there is a checkpoint in the middle
            page = b"%s:%064x" % (NAMESPACE.encode(), 1)
            assert raw.ask("KV.PUT", page, SCHEMA_PAGE, "DURABLE") == b"OK"
            expected.values[page], expected.parents[page] = SCHEMA_PAGE, b""
        return expected

    def _check(self, raw: Raw, server: ServerProcess, flips: list[Flip]) -> None:
        schema = raw.ask("KV.SCHEMA", "GET", NAMESPACE)
        assert schema in (None, self.expected.schema), f"another schema: {schema}"
        self.counts["schemas lost"] += schema is None
        misses = 0
        commands = [
            words
            for key in self.expected.values
            for words in (("PTTL", key), ("KV.INFO", key), ("GET", key))
        ]
        replies = iter(raw.ask_all(commands))
        for key, right in self.expected.values.items():
            ttl_ms, info, value = next(replies), next(replies), next(replies)
            assert value in (None, right), f"{key!r} is wrong: {wrongness(value, right)}"
            misses += value is None
            if value is not None:
                assert ttl_ms == -1 or 0.9 * LONG_MS < ttl_ms <= LONG_MS, f"{key!r}: TTL {ttl_ms}"
                parent = dict(zip(info[::2], info[1::2], strict=True)).get(b"parent") or b""
                assert parent in (b"", self.expected.parents[key]), f"{key!r}: parent {parent!r}"
        self.counts["values missing"] += misses
        self.counts["values right"] += len(self.expected.values) - misses
        self.counts["flips"] += len(flips)
        keys = [self._values_at(flip) for flip in flips]
        hit = len({key for found in keys for key in found})
        self.counts["values hit"] += hit
        # With what describes a value lost, too, nobody can know that it was hit.
        self._check_counted(server, misses, hit if all(keys) else min(hit, 1))

    def _find_values(self) -> dict[str, list[tuple[int, int, bytes]]]:
        """Return where in each file there are values of which there is one copy only, as it is."""
        found: dict[str, list[tuple[int, int, bytes]]] = {name: [] for name in self._files}
        for key, value in self.expected.values.items():
            copies = [
                (name, data.find(value)) for name, data in self._files.items() if value in data
            ]
            if len(copies) == 1 and self._files[copies[0][0]].count(value) == 1:
                name, start = copies[0]
                found[name].append((start, start + len(value), key))
        return found

    def _values_at(self, flip: Flip) -> list[bytes]:
        """Return the keys whose only copy a flip has hit."""
        return [key for start, stop, key in self._places[flip.path] if start <= flip.offset < stop]

    def _check_counted(self, server: ServerProcess, misses: int, hit: int) -> None:
        """Assert that INFO counts each of the values hit, and that nothing is missing unsaid."""
        info = server.info()
        counted = sum(
            int(value)
            for name, value in info.items()
            if name.endswith(("_corrupt", "_skipped_damaged", "_damaged", "_dropped", "_stale"))
        )
        assert counted >= hit, f"{hit} values were hit, INFO counts {counted}"
        # Without its checkpoint a tier forgets what may be old. Its log says so.
        assert counted or not misses or "damaged" in server.log, f"{misses} missing: {server.log}"
        assert misses >= hit, f"{hit} values were hit and only {misses} are missing"


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a directory of small files; blocks of zeros become holes."""
    for path in source.rglob("*"):
        there = target / path.relative_to(source)
        if path.is_dir():
            there.mkdir(parents=True, exist_ok=True)
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        with there.open("wb") as file:
            for at in range(0, len(data), 1 << 16):
                piece = data[at : at + (1 << 16)]
                if piece.count(0) < len(piece):
                    file.seek(at)
                    file.write(piece)
            file.truncate(len(data))


def wrongness(value: bytes, right: bytes) -> str:
    """Say how a value differs from what it should be."""
    pairs = zip(value, right, strict=False)
    differ = [at for at, (ours, theirs) in enumerate(pairs) if ours != theirs]
    return f"{len(value)} bytes for {len(right)}, {len(differ)} differ, first at {differ[:1]}"


def run(flips: int, seed: str, base: str | None) -> Counter[str]:
    """Flip ``flips`` bits, in directories of every kind."""
    counts: Counter[str] = Counter()
    at = 0
    while counts["flips"] < flips:
        folder = Path(tempfile.mkdtemp(prefix="respkv-flip-", dir=base))
        filled = Filled(folder, TIERS[at % len(TIERS)], f"{seed}/{at}")
        at += 1
        share = max(flips // 12, 1)
        while filled.counts["flips"] < min(share, flips - counts["flips"]):
            chosen = filled.choose(FLIPS_PER_ROUND)
            try:
                filled.round(chosen)
            except AssertionError as error:
                error.add_note(f"seed {seed}, directory {at - 1}, left behind: {folder}")
                error.add_note(f"flips {chosen}")
                error.add_note(f"guilty on their own: {filled.guilty(chosen)}")
                raise
            filled.counts["rounds"] += 1
        counts += filled.counts
        shutil.rmtree(folder)
    return counts


def main() -> None:
    """Run it as the command line says."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--flips", type=int, default=10_000)
    options.add_argument("--seed", default=str(int(time.time())))
    options.add_argument("--folder", default=os.environ.get("TMPDIR"), help="default: /tmp")
    chosen = options.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    began = time.monotonic()
    counts = run(chosen.flips, chosen.seed, chosen.folder)
    print(", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())))
    print(f"done in {time.monotonic() - began:.0f} s: every start went well, no wrong byte")


if __name__ == "__main__":
    main()
