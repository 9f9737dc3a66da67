"""What was simulated or replayed, as tables for people and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from respkv.errors import ConfigError
from respkv.trace.format import Trace
from respkv.trace.replay import Plan, Report
from respkv.trace.simulate import BELADY, Outcome

PERCENTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
_FLOOR = "lru"
_LABEL_WIDTH = 28


def simulate_table(trace: Trace, outcomes: Sequence[Outcome], block_bytes: int | None) -> str:
    """Return hit rates by policy and capacity, and below them what each cell cost."""
    capacities = sorted({outcome.cell.blocks_max for outcome in outcomes})
    labels = list(dict.fromkeys(outcome.cell.label for outcome in outcomes))
    rates = {(each.cell.label, each.cell.blocks_max): each for each in outcomes}
    width = max(_LABEL_WIDTH, *(len(label) + 1 for label in labels))
    lines = [
        f"{trace.name}: {len(trace.requests)} requests, {trace.num_tokens} tokens, "
        f"blocks of {trace.block_tokens}{_left_out(trace)}",
        "",
        f"{'token hit rate':{width}}" + "".join(f"{capacity:>9}" for capacity in capacities),
    ]
    if block_bytes is not None:
        sizes = (_size(capacity * block_bytes) for capacity in capacities)
        lines.append(f"{'':{width}}" + "".join(f"{size:>9}" for size in sizes))
    for label in labels:
        row = (rates.get((label, capacity)) for capacity in capacities)
        cells = ("" if each is None else f"{each.hit_rate:.4f}" for each in row)
        lines.append(f"{label:{width}}" + "".join(f"{cell:>9}" for cell in cells))
    lines += [
        "",
        f"{'':{width}}{'blocks':>9}{'of the gap':>12}{'flops saved':>13}{'written/hit':>13}"
        f"{'us each':>9}{'ghost B':>9}" + (f"{'written':>10}" if block_bytes else ""),
    ]
    for each in outcomes:
        share = gap_closed(each, outcomes)
        lines.append(
            f"{each.cell.label:{width}}{each.cell.blocks_max:>9}"
            f"{'' if share is None else f'{share:.1%}':>12}{each.flops_saved:>13.4f}"
            f"{each.written_per_hit:>13.2f}{each.decision_us:>9.2f}{each.ghost_bytes:>9.1f}"
            + (f"{_size(each.num_written * block_bytes):>10}" if block_bytes else "")
        )
    return "\n".join(lines)


def gap_closed(outcome: Outcome, outcomes: Sequence[Outcome]) -> float | None:
    """Return how far from lru to the ceiling an outcome is; None without both beside it."""
    same = {
        each.cell.policy: each.hit_rate
        for each in outcomes
        if each.cell.blocks_max == outcome.cell.blocks_max
    }
    floor, ceiling = same.get(_FLOOR), same.get(BELADY)
    if floor is None or ceiling is None or ceiling <= floor:
        return None
    return (outcome.hit_rate - floor) / (ceiling - floor)


def simulate_summary(
    trace: Trace, outcomes: Sequence[Outcome], block_bytes: int | None
) -> dict[str, Any]:
    """Return all figures of a simulation."""
    return {
        "trace": _trace(trace),
        "bytes_per_block": block_bytes,
        "cells": [
            {
                "policy": each.cell.policy,
                "capacity": each.cell.blocks_max,
                "end_hints": each.cell.has_end_hints,
                "hit_rate": each.hit_rate,
                "gap_closed": gap_closed(each, outcomes),
                "flops_saved": each.flops_saved,
                "written_per_hit": each.written_per_hit,
                "blocks_hit": each.num_hits,
                "files": each.cell.files_max,
                "admission": each.cell.admission,
                "blocks_hit_in_files": each.num_raised,
                "blocks_written": each.num_written,
                "evicted": each.num_evicted,
                "decision_us": each.decision_us,
                "slowest_us": each.slowest_us,
                "ghost_bytes_per_block": each.ghost_bytes,
            }
            for each in outcomes
        ],
    }


def replay_table(trace: Trace, plan: Plan, report: Report) -> str:
    """Return what a replay found, in lines."""
    tiers = ", ".join(f"{letter} {count}" for letter, count in sorted(report.tiers.items()))
    lines = [
        f"{trace.name}: {report.num_requests} requests in {report.seconds:.1f} s, "
        f"pages of {_size(plan.page_bytes)}{_left_out(trace)}",
        f"token hit rate  {report.hit_rate:.4f} of {report.num_tokens} tokens",
        f"flops saved     {report.flops_saved:.4f} of {report.num_flops:.3g} ({plan.model.name})",
        f"pages           {tiers or 'none'} matched, {report.num_put} put, "
        f"{report.num_refused} refused",
        f"wrong           {report.num_wrong} pages of other bytes, {report.num_lost} matched and "
        "gone when fetched",
    ]
    if plan.speed:
        lines.append(f"late            {report.late_s:.3f} s at most")
    lines.append(
        f"{'us':10}" + "".join(f"{name:>10}" for name, _ in PERCENTILES) + f"{'calls':>10}"
    )
    for name, found in report.latencies.items():
        figures = (report.percentile_us(name, share) for _, share in PERCENTILES)
        lines.append(
            f"{name:10}" + "".join(f"{each:>10.0f}" for each in figures) + f"{len(found):>10}"
        )
    return "\n".join(lines)


def replay_summary(trace: Trace, plan: Plan, report: Report) -> dict[str, Any]:
    """Return all figures of a replay."""
    return {
        "trace": _trace(trace),
        "speed": plan.speed,
        "workers": plan.num_workers,
        "page_bytes": plan.page_bytes,
        "settings": dict(plan.settings),
        "seconds": report.seconds,
        "late_s": report.late_s,
        "hit_rate": report.hit_rate,
        "flops_saved": report.flops_saved,
        "model": plan.model.name,
        "tiers": dict(report.tiers),
        "pages_put": report.num_put,
        "pages_refused": report.num_refused,
        "pages_lost": report.num_lost,
        "pages_wrong": report.num_wrong,
        "latency_us": {
            name: {word: report.percentile_us(name, share) for word, share in PERCENTILES}
            | {"calls": len(found)}
            for name, found in report.latencies.items()
        },
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write figures into a file. Raises ConfigError when that cannot be."""
    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error


def _trace(trace: Trace) -> dict[str, Any]:
    return {
        "name": trace.name,
        "requests": len(trace.requests),
        "tokens": trace.num_tokens,
        "block_tokens": trace.block_tokens,
        "left_out": trace.num_left_out,
    }


def _left_out(trace: Trace) -> str:
    if not trace.num_left_out:
        return ""
    return f" ({trace.num_left_out} requests with pages of another size are left out)"


def _size(nbytes: float) -> str:
    """Print a size in the unit that leaves at most four digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g}{unit}"
        nbytes /= 1024
    return f"{nbytes:.4g}TiB"
