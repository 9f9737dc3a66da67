"""Measure kernels, attention and copies on a GPU: ``python -m bench.gpu``, or ``make bench-gpu``.

Prints a table with the goals, and writes it to bench/results/gpu.json and gpu.md with the samples,
the hardware and the versions. Everything is compared with what was measured in the same run, in
turns: kernels with a copy of the device's memory, attention with torch's and others', eviction with
plain copies. ``--device cpu --quick`` takes every row through the references at tiny sizes, which
shows that the rows work and nothing else.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

import respkv
from bench import gpu_attention, gpu_kernels, gpu_moves
from bench.gpu_cache import QUICK, Caches, Sizes
from bench.gpu_clock import clock_of
from bench.gpu_kernels import Bench
from bench.gpu_table import Row, markdown, write

PARTS: Final[dict[str, Callable[[Bench], Iterator[Row]]]] = {
    "copy": gpu_kernels.device_copy,
    "codecs": gpu_kernels.codecs,
    "lossless": gpu_kernels.lossless,
    "pages": gpu_kernels.pages,
    "decode": gpu_attention.decode,
    "prefill": gpu_attention.prefill,
    "moves": gpu_moves.moves,
    "tier": gpu_moves.tier,
}
ROUNDS: Final = 7
RESULTS: Final = Path(__file__).parent / "results" / "gpu.json"
PACKAGES: Final = ("torch", "triton", "flashinfer-python", "vllm")
DRIVER: Final = Path("/proc/driver/nvidia/version")


def main(argv: list[str] | None = None) -> int:
    """Run the parts that were asked for; return 0 also when goals are missed or there is no GPU."""
    options = _options(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and (missing := missing_gpu()):
        print(f"bench-gpu: nothing was measured: {missing}")
        return 0
    if device.type == "cpu":
        torch.set_num_threads(1)
    start = time.monotonic()
    sizes = QUICK if options.quick else Sizes()
    bench = Bench(clock_of(device), Caches(sizes, device), options.rounds, _progress)
    machine = describe(device)
    rows: list[Row] = []
    with torch.no_grad():
        for part in options.parts:
            rows += PARTS[part](bench)
    machine |= {"rounds": str(options.rounds), "took": f"{time.monotonic() - start:.0f} s"}
    if device.type == "cuda":
        machine["clock at the end"] = _clock_rate(device)
    print(markdown(rows, machine))
    if options.json is not None:
        write(options.json, rows, machine)
    return 0


def describe(device: torch.device) -> dict[str, str]:
    """Return the hardware, the versions and the date, in words."""
    facts = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": gpu.name,
            "multiprocessors": str(gpu.multi_processor_count),
            "memory": f"{gpu.total_memory / (1 << 30):.1f} GiB",
            "compute capability": f"{gpu.major}.{gpu.minor}",
            "driver": _driver(),
            "cuda of torch": str(torch.version.cuda),
            "clock at the start": _clock_rate(device),
        }
    else:
        facts["device"] = f"{device}: references, not kernels; the figures mean nothing"
    facts |= {
        "kernel": f"{platform.system()} {platform.release()}",
        "respkv": respkv.__version__,
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }
    return facts


def missing_gpu() -> str:
    """Say what is missing for a GPU; "" when one can be used."""
    if torch.cuda.is_available():
        return ""
    if not torch.version.cuda:
        return (
            f"this torch ({torch.__version__}) is built without CUDA; install one that has it and "
            "triton beside it"
        )
    if not DRIVER.exists():
        return "there is no NVIDIA driver on this machine (no /proc/driver/nvidia)"
    return "torch sees no GPU that it can use (look at CUDA_VISIBLE_DEVICES and at the driver)"


def _driver() -> str:
    try:
        words = DRIVER.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return "unknown"
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def _clock_rate(device: torch.device) -> str:
    # torch asks NVML, whose bindings it does not bring, and which a container may not have.
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return "not readable (no pynvml)"
    try:
        rate: int = torch.cuda.clock_rate(device)
    except (RuntimeError, nvml.NVMLError) as error:
        return f"not readable ({error})"
    return f"{rate} MHz"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _progress(text: str) -> None:
    print(f"bench-gpu: {text}", file=sys.stderr, flush=True)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.gpu", description="respkv's kernels on a GPU")
    parser.add_argument(
        "--parts",
        type=_parts,
        default=list(PARTS),
        help=f"of {','.join(PARTS)}; default all",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each row (%(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (%(default)s)")
    parser.add_argument(
        "--json",
        type=Path,
        help="where to write; the table goes beside it as .md. "
        "Default bench/results/gpu.json, nowhere when not all parts are run",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: the figures mean nothing")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.device.startswith("cpu") and not options.quick:
        parser.error("--device cpu is for --quick")
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
