"""Measure what the cache is worth to a model: ``python -m bench.inference``, or ``make bench-inference``.

Prints a table with the goals, and writes it to bench/results/inference.json and inference.md with the
samples, the hardware and the versions. The models have random weights: no figure depends on what they
say, and every answer is held against that of the same model without the cache. Without a GPU the part
that needs one says so. ``--quick`` takes every row at tiny sizes, which shows that the rows work and
nothing else.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

# What transformers would load is made here; nothing may be asked of a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.inference_demos import demos
from bench.inference_gpu import gpu_tiers
from bench.inference_hits import full_hits
from bench.inference_loop import concurrent
from bench.inference_policies import policies
from bench.inference_setup import QUICK, Bench, Sizes
from bench.inference_table import Row, markdown, write
from bench.inference_ttft import first_tokens
from bench.machine import hardware, load, software

PARTS: Final[dict[str, Callable[[Bench], Iterator[Row]]]] = {
    "demos": demos,
    "hits": full_hits,
    "ttft": first_tokens,
    "concurrent": concurrent,
    "policies": policies,
    "gpu": gpu_tiers,
}
PACKAGES: Final = ("torch", "transformers", "numpy", "anyio", "uvloop")
RESULTS: Final = Path(__file__).parent / "results" / "inference.json"


def main(argv: list[str] | None = None) -> int:
    """Run the parts that were asked for; return 0 also when goals are missed."""
    options = _options(argv)
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    bench = Bench(QUICK if options.quick else Sizes(), _progress)
    machine = hardware() | load() | software(PACKAGES)
    rows: list[Row] = []
    for part in options.parts:
        rows += PARTS[part](bench)
    machine["threads of torch"] = str(options.threads)
    machine["model of the demos"] = bench.subject.describe()
    machine["model of first tokens, full hits and eviction"] = bench.grid_subject.describe()
    machine["took"] = f"{time.monotonic() - start:.0f} s"
    print(markdown(rows, machine))
    if options.json is not None:
        write(options.json, rows, machine)
    return 0


def _progress(text: str) -> None:
    print(f"bench-inference: {text}", file=sys.stderr, flush=True)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.inference", description="what the cache is worth to a model"
    )
    parser.add_argument(
        "--parts",
        type=_parts,
        default=list(PARTS),
        help=f"of {','.join(PARTS)}; default all",
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument(
        "--json",
        type=Path,
        help="where to write; the table goes beside it as .md. "
        "Default bench/results/inference.json, nowhere when not all parts are run",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: the figures mean nothing")
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    if options.json is None and options.parts == list(PARTS) and not options.quick:
        options.json = RESULTS
    return options


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {min(unknown)!r}; there are {', '.join(PARTS)}")
    return [part for part in PARTS if part in parts]


if __name__ == "__main__":
    sys.exit(main())
