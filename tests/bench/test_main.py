"""The harness as it is run: every row once, tiny, and what becomes of its servers."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
QUICK = [sys.executable, "-m", "bench", "--quick"]
GONE_S = 60.0


def test_every_row_is_measured_and_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    done = subprocess.run(
        [*QUICK, "--rounds", "1", "--json", str(path), "--folder", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert {"cpu", "cores", "memory", "kernel", "redis-server", "fio", "files", "date"} <= set(
        written["machine"]
    )
    rows = written["rows"]
    count = {
        1: 4,
        2: 4,
        3: 1,
        4: 1,
        5: 4,
        6: 2,
        7: 1,
        8: 2 * 2 * 2 + 1,
        9: 2,
        10: 2 + 1,
        11: 6,
        12: 3,
    }
    assert Counter(row["row"] for row in rows) == count
    for row in rows:
        samples = row["peer_samples"] + row["ours_samples"]
        # So little was put in row 11 that it may all be in memory still.
        assert min(samples) > 0 or (row["row"], row["unit"]) == (11, "bytes"), row["work"]
    table = path.with_suffix(".md").read_text()
    assert done.stdout.strip() == table.strip()
    assert all(row["work"] in table and row["ours"] in table for row in rows)


def test_the_row_that_was_asked_for_is_shown_and_nothing_is_written() -> None:
    before = sorted((ROOT / "bench").rglob("*.json"))
    done = subprocess.run(
        [*QUICK, "--rows", "6", "--rounds", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line[:5] for line in done.stdout.splitlines()[:4]] == [
        "| row",
        "| ---",
        "| 6  ",
        "| 6  ",
    ]
    assert sorted((ROOT / "bench").rglob("*.json")) == before


@pytest.mark.parametrize("rows", ["0", "13", "1,x", ""])
def test_a_row_that_does_not_exist_is_refused(rows: str) -> None:
    done = subprocess.run([*QUICK, "--rows", rows], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--rows" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_both_servers_end_with_the_harness(number: signal.Signals) -> None:
    with _measuring() as harness:
        servers = Path(f"/proc/{harness.pid}/task/{harness.pid}/children").read_text().split()
        assert len(servers) == 2
        harness.send_signal(number)
        assert harness.wait(GONE_S) != 0
        deadline = time.monotonic() + GONE_S
        while any(map(_is_running, servers)):
            assert time.monotonic() < deadline, "a server is left"
            time.sleep(0.02)


@contextmanager
def _measuring() -> Iterator[subprocess.Popen[bytes]]:
    command = [*QUICK, "--rows", "1", "--rounds", "1000000"]
    with (
        tempfile.TemporaryDirectory() as folder,  # one that is killed leaves its files
        subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | {"TMPDIR": folder}
        ) as harness,
    ):
        assert harness.stderr is not None
        try:
            assert harness.stderr.readline().startswith(b"row 1")
            yield harness
        finally:
            harness.kill()


def _is_running(pid: str) -> bool:
    # One that nobody has waited for yet is not running any more.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
