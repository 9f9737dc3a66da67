"""The benchmark of a GPU, where there is none: every row through the references, tiny."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.gpu import main
from bench.gpu_clock import HostClock, Work, measure
from bench.gpu_limits import occupancy
from bench.gpu_table import Row, markdown, share_of_copy, times_as_fast, times_as_long

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "bench.gpu"]
CODECS = ("f8", "i8", "i4", "rh4", "rh3", "rh2", "rhz3", "xs")


def test_every_row_is_measured_and_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gpu.json"
    done = subprocess.run(
        [*COMMAND, "--device", "cpu", "--quick", "--rounds", "1", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Those of xs that are measured without what the processor does go through the interpreter.
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert {"date", "device", "respkv", "packages", "rounds", "took"} <= set(written["machine"])
    rows = written["rows"]
    works = [row["work"] for row in rows]
    for codec in CODECS:
        for side in ("keys", "values"):
            for way in ("encode", "decode"):
                assert f"{codec} {side} {way}" in works
        if codec != "xs":
            assert f"{codec} from NHD blocks encode" in works
            assert f"{codec} to HND blocks decode" in works
    assert {row["part"] for row in rows} == {"copy", "codec", "pages", "decode", "prefill", "moves"}
    for row in rows:
        if "not installed" not in row["work"]:
            assert min(row["samples"]) > 0, row["work"]
        assert "not the reference's" not in row["note"], row["work"]
    table = path.with_suffix(".md").read_text()
    assert done.stdout.strip() == table.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: it would be measured")
def test_without_a_gpu_one_line_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1
    assert any(word in said for word in ("CUDA", "driver")), said


@pytest.mark.parametrize(
    "words",
    [["--device", "cpu"], ["--parts", "copy,other"], ["--rounds", "0"]],
    ids=" ".join,
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert refused.value.code == 2
    assert words[0] in capsys.readouterr().err


def work(name: str, nbytes: int, *samples: float) -> Work:
    return Work(name, lambda: None, nbytes, samples=list(samples))


def test_a_share_is_of_the_bytes_a_second() -> None:
    row = share_of_copy("codec", work("it", 100, 2.0, 1.0, 9.0), work("copy", 100, 1.0), goal=0.5)
    assert (row.seconds, row.ratio, row.is_met) == (2.0, 0.5, True)


def test_speed_is_at_least_and_time_at_most_what_the_goal_says() -> None:
    slow, fast = work("slow", 1, 3.0), work("fast", 1, 2.0)
    assert times_as_fast("decode", fast, slow, goal=1.6).is_met is False
    assert times_as_fast("decode", fast, slow, goal=1.5).is_met is True
    assert times_as_long("decode", fast, slow, goal=0.6).is_met is False
    assert times_as_long("decode", fast, slow, goal=0.67).is_met is True


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (Row("p", "w", 1.0, None, "copy", 0.799, 0.8), "copy | 0.79 | >= 0.80 | MISSED |"),
        (Row("p", "w", 1.0, None, "copy", 0.8, 0.8), "copy | 0.80 | >= 0.80 | met |"),
        (Row("p", "w", 1.0, 9.0, "x", 0.621, 0.62, is_time=True), "0.63 | <= 0.62 | MISSED |"),
        (Row("p", "w: not installed", goal=0.5), "| >= 0.50 | not measured |"),
    ],
    ids=["missed", "met", "time", "absent"],
)
def test_a_row_says_whether_its_goal_was_met(row: Row, cells: str) -> None:
    line = " ".join(markdown([row], {}).splitlines()[2].split())
    assert cells in line


def test_works_take_turns() -> None:
    order: list[str] = []
    works = [Work(name, partial(order.append, name)) for name in "ab"]
    measure(HostClock(), works, 2)
    assert "".join(order) == "ab" + "abab"
    assert [len(each.samples) for each in works] == [2, 2]


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "warps", "expected"),
    [
        (32, 0, 4, (16, "warps")),
        (128, 0, 4, (4, "registers")),
        (33, 100_000, 8, (2, "shared memory")),
        (16, 0, 1, (32, "programs")),
    ],
)
def test_a_multiprocessor_holds_what_its_scarcest_part_allows(
    registers: int, shared_bytes: int, warps: int, expected: tuple[int, str]
) -> None:
    assert expected == occupancy(
        registers=registers,
        shared_bytes=shared_bytes,
        warps=warps,
        registers_max=65536,
        shared_bytes_max=232448,
        warps_max=64,
    )
