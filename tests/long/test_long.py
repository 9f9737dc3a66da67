"""A sample of each long run that needs no root, as the gate can afford it."""

import subprocess
import sys

import pytest

RUNS = [
    ["fuzz", "--inputs", "20000", "--sent", "500"],
    ["kill", "--rounds", "60"],
    ["soak", "--seconds", "6"],
    ["crash", "--rounds", "20"],
    ["bit_flip", "--flips", "400"],
]


@pytest.mark.parametrize("run", RUNS, ids=[run[0] for run in RUNS])
def test_a_short_form_of_the_long_run_passes(run: list[str]) -> None:
    name, *options = run
    done = subprocess.run(
        [sys.executable, "-m", f"tests.long.{name}", *options],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"  # the seed is in what it printed
