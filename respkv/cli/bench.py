"""``respkv bench``: how fast pages go into a server and come out of it."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from respkv.cli import Refused
from respkv.cli.load import STAMP_BYTES, Phase, Plan, run
from respkv.cli.target import url_option
from respkv.client.url import settings
from respkv.config.kinds import size_bytes, size_text
from respkv.errors import ServerError

PERCENTILES = (50, 90, 99, 99.9)


def _size(context: click.Context, option: click.Parameter, value: str) -> int:
    size = size_bytes(value)
    if size is None or size < 2 * STAMP_BYTES:
        raise click.BadParameter(f"{value!r}: accepted are 32 and up, such as 65536, 64k or 1mb")
    return size


@click.command(short_help="Measure putting and getting pages.")
@url_option
@click.option(
    "--size", callback=_size, default="1mb", metavar="SIZE", show_default=True, help="Of a page."
)
@click.option("--clients", type=click.IntRange(1, 256), default=4, show_default=True)
@click.option(
    "--pages", type=click.IntRange(1), default=16, show_default=True, help="Of each client."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    show_default=True,
    help="Of putting, and again of getting.",
)
@click.option("--plain", "how", flag_value="plain", help="SET and GET: any Redis can be measured.")
@click.option("--shm", "how", flag_value="shm", help="Shared memory: reserve, commit and lease.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    url: str, size: int, clients: int, pages: int, seconds: float, how: str | None, as_json: bool
) -> None:
    """Put pages with KV.PUT, get them with KV.GET, and print speed and latencies.

    All pages together, size x clients x pages, should fit in the server's maxmemory; those that were
    evicted count as misses. What is over is deleted.
    """
    plan = Plan(
        url=url,
        how=how or "kv",
        page_bytes=size,
        num_clients=clients,
        num_pages=pages,
        phase_s=seconds,
    )
    address = settings(url, {}).address
    try:
        with _progress(plan) as progress:
            phases = run(plan, progress)
    except ServerError as error:
        if "unknown command" not in error.message:
            raise
        raise Refused(f"{address} knows no KV.PUT and KV.GET; try --plain") from error
    if as_json:
        click.echo(json.dumps(_summary(plan, address, phases), indent=2))
    else:
        click.echo(_table(plan, address, phases))


@contextmanager
def _progress(plan: Plan) -> Iterator[Callable[[str, float], None]]:
    if not sys.stderr.isatty():
        yield lambda name, seconds: None
        return
    with click.progressbar(length=round(plan.phase_s * 2000), file=sys.stderr) as bar:

        def tell(name: str, seconds: float) -> None:
            bar.label = name
            bar.update(round(seconds * 1000))

        yield tell


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest value that ``percent`` of them do not exceed; NaN when there is none."""
    if not ordered:
        return math.nan
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def _summary(plan: Plan, address: str, phases: list[Phase]) -> dict[str, Any]:
    return {
        "server": address,
        "how": plan.how,
        "page_bytes": plan.page_bytes,
        "clients": plan.num_clients,
        "pages": plan.num_pages,
        "phases": {phase.name: _figures(plan, phase) for phase in phases},
    }


def _figures(plan: Plan, phase: Phase) -> dict[str, Any]:
    ordered = sorted(phase.latencies)
    figures: dict[str, Any] = {
        "gb_per_s": len(ordered) * plan.page_bytes / phase.seconds / 1e9,
        "pages_per_s": len(ordered) / phase.seconds,
        "pages": len(ordered),
        "misses": phase.num_misses,
        "seconds": phase.seconds,
    }
    for percent in PERCENTILES:
        figures[f"p{percent:g}_ms"] = _ms(percentile(ordered, percent))
    return figures | {"max_ms": _ms(percentile(ordered, 100))}


def _ms(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds * 1e3


def _table(plan: Plan, address: str, phases: list[Phase]) -> str:
    ways = {"kv": "KV.PUT, KV.GET", "plain": "SET, GET", "shm": "reserve and commit, lease"}
    lines = [
        f"{address}: {ways[plan.how]}, {plan.num_clients} clients,"
        f" {plan.num_pages} pages each of {size_text(plan.page_bytes)}",
        "",
        f"{'':4}{'GB/s':>9}{'pages/s':>10}"
        + "".join(f"{f'p{percent:g} ms':>10}" for percent in PERCENTILES)
        + f"{'max ms':>10}{'misses':>8}",
    ]
    for phase in phases:
        figures = _figures(plan, phase)
        times = [figures[name] for name in figures if name.endswith("_ms")]
        lines.append(
            f"{phase.name:4}{figures['gb_per_s']:9.3f}{figures['pages_per_s']:10.0f}"
            + "".join("         -" if ms is None else f"{ms:10.3f}" for ms in times)
            + f"{phase.num_misses:8}"
        )
    return "\n".join(lines)
