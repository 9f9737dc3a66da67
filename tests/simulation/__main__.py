"""Play many histories: ``python -m tests.simulation --histories 10000 --seed 1``."""

import argparse
import sys
import time

from tests.simulation.world import STEPS, play_history


def main() -> int:
    """Play histories of consecutive seeds until one fails; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--histories", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="of the first history")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each history")
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    options = parser.parse_args()
    started_s = time.monotonic()
    totals = [0, 0, 0, 0]
    number = 0
    for number in range(1, options.histories + 1):
        seed = options.seed + number - 1
        result = play_history(seed, backend=options.backend, steps=options.steps)
        found = (result.answers, result.evicted, result.oom, result.lapsed)
        totals = [total + one for total, one in zip(totals, found, strict=True)]
        seconds = time.monotonic() - started_s
        if number % 50 == 0 or number == options.histories or seconds > options.seconds:
            answers, evicted, oom, lapsed = totals
            print(
                f"\r{number} histories, seeds {options.seed} to {seed}, {seconds:.0f} s: "
                f"{answers} answers, {evicted} evictions, {oom} OOM, {lapsed} leases lapsed",
                end="",
                flush=True,
            )
        if seconds > options.seconds:
            break
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
