"""A sample of each run of this folder, as the gate can afford it."""

import subprocess
import sys

import pytest

RUNS = [
    ["fuzz", "--inputs", "20000"],
    pytest.param(["stall", "--seconds", "0.5", "--max-ms", "2000"], marks=pytest.mark.alone),
]


@pytest.mark.parametrize("run", RUNS, ids=["fuzz", "stall"])
def test_a_short_form_of_the_run_passes(run: list[str]) -> None:
    name, *options = run
    line = [sys.executable, "-m", f"tests.stress.{name}", *options]
    done = subprocess.run(line, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"  # the seed is in what it printed
