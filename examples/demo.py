"""What the demos of one process have in common: options, the model, the cache, the report."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from examples import small_model
from examples.comparison import Comparison, save
from examples.processes import DemoFailed
from examples.readers import CachedReader, cached_reader
from examples.small_model import SmallModel
from respkv.errors import CacheError

Run = Callable[[SmallModel, CachedReader], Comparison]


def options_of(
    parser: argparse.ArgumentParser,
    about: str | None,
    workload: Any,
    argv: Sequence[str] | None,
) -> argparse.Namespace:
    """Parse the options of a demo: those of its model, and one for each number of its workload."""
    parser.description = about
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    small_model.add_options(parser)
    for each in fields(workload):
        parser.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=_positive,
            default=getattr(workload, each.name),
            help="(%(default)s)",
        )
    return parser.parse_args(argv)


def run_demo(name: str, options: argparse.Namespace, run: Run) -> int:
    """Run a demo and report it; return its exit code."""
    try:
        subject = small_model.load(options)
        print(f"{subject.describe()}\n", flush=True)
        with cached_reader(subject.model, options.url) as cached:
            comparison = run(subject, cached)
            comparison.store_s = cached.store_s
    except (DemoFailed, CacheError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return conclude(name, options, comparison)


def conclude(name: str, options: argparse.Namespace, comparison: Comparison) -> int:
    """Print the report, write the plot, and say what must not be; return the exit code."""
    print(comparison.report())
    if options.plot is not None:
        print(f"plot: {save(comparison, options.plot, name)}")
    if failure := comparison.failure():
        print(f"FAILED: {failure}", file=sys.stderr)
        return 1
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
