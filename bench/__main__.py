"""Compare respkv with redis-server, and its file tiers with fio, on this machine: ``python -m bench``.

Prints a table with the targets, and writes it to bench/results/ with the samples, the hardware and
the versions. Each line alternates the two that it compares; its figures are medians.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.blocks import device_blocks
from bench.cold import cold_gets
from bench.files import QUICK_FILES
from bench.machine import describe
from bench.memory import resident_memory
from bench.mixed import mixed_work
from bench.pages import tier_pages
from bench.restart import restarts
from bench.result import MIB, Result
from bench.rows import (
    Bench,
    Scale,
    large_values,
    leased_reads,
    medium_values,
    prefix_match,
    reserved_writes,
    small_values,
)
from bench.sequences import sequence_match
from bench.servers import BenchError
from bench.table import markdown, write


def file_reads_and_writes(bench: Bench) -> Iterator[Result]:
    """Row 8: the device of the nvme tier, then the tier."""
    yield from device_blocks(bench)
    yield from tier_pages(bench)


ROWS: dict[int, Callable[[Bench], Iterator[Result]]] = {
    1: large_values,
    2: medium_values,
    3: leased_reads,
    4: reserved_writes,
    5: small_values,
    6: prefix_match,
    7: resident_memory,
    8: file_reads_and_writes,
    9: restarts,
    10: cold_gets,
    11: mixed_work,
    12: sequence_match,
}
ROUNDS = 7
RESULTS = Path(__file__).parent / "results" / "comparison.json"
QUICK = Scale(
    large_bytes=2 * MIB,
    medium_bytes=(MIB,),
    set_bytes=4 * MIB,
    turn_bytes=4 * MIB,
    arena_bytes=128 * MIB,
    zero_copies=2,
    requests=1000,
    deep_requests=1000,
    clients=5,
    pages=20,
    prefixes=2,
    memory_bytes=16 * MIB,
    memory_page_bytes=(MIB,),
    files=QUICK_FILES,
)


class Progress:
    """One line on standard error that is written over, if that is a terminal; else a line each."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._last = ""

    def show(self, text: str) -> None:
        """Say what is being done."""
        if self._is_terminal:
            sys.stderr.write(f"\r\x1b[K{text}")
        elif text.partition(", round")[0] != self._last:
            self._last = text.partition(", round")[0]
            sys.stderr.write(f"{self._last}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Leave the line."""
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")


def main(argv: list[str] | None = None) -> int:
    """Run the rows that were asked for; return the exit code: 0 also when a target is missed."""
    options = _options(argv)
    # The servers stop on the way out, so a signal must be a way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    progress = Progress()
    bench = Bench(
        QUICK if options.quick else Scale(), options.rounds, progress.show, options.folder
    )
    machine = describe(options.folder)
    results: list[Result] = []
    start = time.monotonic()
    try:
        for number in options.rows:
            results += ROWS[number](bench)
    except BenchError as error:
        progress.clear()
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        progress.clear()
    machine["rounds"] = str(options.rounds)
    machine["took"] = f"{time.monotonic() - start:.0f} s"
    print(markdown(results, machine))
    if options.json is not None:
        write(options.json, results, machine)
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench", description="respkv against redis-server and fio"
    )
    parser.add_argument("--rows", type=_rows, default=list(ROWS), help="such as 1,2; default all")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each line (%(default)s)")
    parser.add_argument(
        "--json",
        type=Path,
        help="where to write; the table goes beside it as .md. "
        "Default bench/results/comparison.json, nowhere when not all rows are run",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where rows 8 to 11 have their files: on the device to measure (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: the figures mean nothing")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.json is None and options.rows == list(ROWS) and not options.quick:
        options.json = RESULTS
    return options


def _rows(text: str) -> list[int]:
    try:
        numbers = sorted({int(each) for each in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers such as 1,2 are accepted") from None
    if unknown := set(numbers) - set(ROWS):
        raise argparse.ArgumentTypeError(
            f"no row {min(unknown)}; there are {', '.join(map(str, ROWS))}"
        )
    return numbers


if __name__ == "__main__":
    sys.exit(main())
