"""Simulate every policy on a trace and hold the default against its targets: ``python -m bench.eviction``.

Writes bench/results/eviction.md and .json, and the plots and figures of docs/retention.md. The trace is the one that
RESPKV_TRACE names, or Mooncake's conversation trace beside this repository.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Final

from bench.machine import describe
from respkv.trace.plot import draw
from respkv.trace.read import find_trace, read_trace
from respkv.trace.report import gap_closed
from respkv.trace.simulate import BELADY, Cell, Outcome, cells_of, simulate_all

ROOT: Final = Path(__file__).parent.parent
RESULTS: Final = Path(__file__).parent / "results"
JSON: Final = RESULTS / "eviction.json"
DOCS: Final = ROOT / "docs"
BEGIN, END = "<!-- figures: made by python -m bench.eviction -->", "<!-- end of figures -->"
CAPACITIES: Final = (1000, 3000, 6000, 10_000, 20_000, 30_000, 50_000, 100_000)
DEFAULT: Final = "survival"
RIVALS: Final = ("lru", "arc", "s3fifo")
MEMORY, FILES = 3000, 30_000  # blocks of the cells that have files as well
# What the default should come to: at this capacity so many times lru's hit rate, and so on.
AT, TIMES, BELOW, GAP, DECISION_US, GHOST_BYTES = 6000, 1.15, 0.005, 0.85, 15.0, 64.0
FACTS: Final = (
    "date",
    "cpu",
    "cores",
    "memory",
    "kernel",
    "load average at start",
    "respkv",
    "python",
)

Target = tuple[str, str, str, bool]  # what, as measured, as wanted, whether it is met


def targets(outcomes: list[Outcome]) -> Iterator[Target]:
    """Yield the default policy's targets."""
    rates = {
        (each.cell.policy, each.cell.blocks_max): each.hit_rate
        for each in outcomes
        if not each.cell.has_end_hints
    }
    ours = [each for each in outcomes if each.cell.policy == DEFAULT]
    plain = [each for each in ours if not each.cell.has_end_hints]
    times = rates[DEFAULT, AT] / rates["lru", AT]
    yield f"hit rate at {AT}, of lru's", f"{times:.3f}", f">= {TIMES}", times >= TIMES
    lead = min(
        each.hit_rate - max(rates[rival, each.cell.blocks_max] for rival in RIVALS)
        for each in plain
    )
    yield (
        f"lead over the best of {', '.join(RIVALS)}, at worst",
        f"{lead:+.4f}",
        f">= {-BELOW}",
        (lead >= -BELOW),
    )
    gap = next(
        gap_closed(each, outcomes) or 0.0
        for each in ours
        if each.cell.has_end_hints and each.cell.blocks_max == AT
    )
    yield (
        f"gap from lru to the ceiling at {AT}, with hints",
        f"{gap:.1%}",
        f">= {GAP:.0%}",
        gap >= GAP,
    )
    slowest = max(each.decision_us for each in ours)
    yield "us a decision, at worst", f"{slowest:.1f}", f"< {DECISION_US:g}", slowest < DECISION_US
    ghosts = max(each.ghost_bytes for each in ours)
    yield (
        "bytes of ghosts a block, at worst",
        f"{ghosts:.1f}",
        f"<= {GHOST_BYTES:g}",
        (ghosts <= GHOST_BYTES),
    )


def matrix(outcomes: list[Outcome], of: str) -> str:
    """Return a Markdown table of one figure: a row for each policy, a column for each capacity."""
    cells = {(each.cell.label, each.cell.blocks_max): each for each in outcomes}
    labels = list(dict.fromkeys(each.cell.label for each in outcomes))
    lines = [
        "| policy | " + " | ".join(f"{capacity:,}" for capacity in CAPACITIES) + " |",
        "|---|" + "---|" * len(CAPACITIES),
    ]
    for label in labels:
        row = (cells[label, capacity] for capacity in CAPACITIES)
        lines.append(f"| {label} | " + " | ".join(_figure(each, of) for each in row) + " |")
    return "\n".join(lines)


def files_table(outcomes: list[Outcome]) -> str:
    """Return a Markdown table of what admission saves and costs."""
    lines = [
        "| policy | admission | token hit rate | hit in files, of all hits | written for each byte hit |",
        "|---|---|---|---|---|",
    ]
    for each in outcomes:
        lines.append(
            f"| {each.cell.policy} | {each.cell.admission} | {each.hit_rate:.4f} "
            f"| {each.num_raised / each.num_hits:.0%} | {each.written_per_hit:.2f} |"
        )
    return "\n".join(lines)


def page(outcomes: list[Outcome], filed: list[Outcome], trace: str, facts: str) -> str:
    """Return bench/results/eviction.md."""
    wanted = "\n".join(
        f"| {what} | {measured} | {target} | {'met' if is_met else 'MISSED'} |"
        for what, measured, target, is_met in targets(outcomes)
    )
    return f"""# Eviction policies on a trace

{trace}. Columns are capacities in blocks of 512 tokens; `belady` is the ceiling. One setting for all.

| what | measured | target | |
|---|---|---|---|
{wanted}

## Token hit rate

{matrix(outcomes, "hit_rate")}

## Recompute FLOPs saved, share of all

{matrix(outcomes, "flops_saved")}

## Bytes written for each byte hit

{matrix(outcomes, "written_per_hit")}

## Microseconds of processor a decision

{matrix(outcomes, "decision_us")}

## Bytes of ghost state a block

{matrix(outcomes, "ghost_bytes")}

## Memory of {MEMORY:,} blocks and files of {FILES:,}

{files_table(filed)}

{facts}
"""


def cells_of_all() -> list[Cell]:
    """Return all cells: every policy, the default with hints, and two with files."""
    cells = cells_of("all", CAPACITIES)
    cells += [Cell(DEFAULT, capacity, has_end_hints=True) for capacity in CAPACITIES]
    for policy in ("lru", DEFAULT):
        cells += cells_of(policy, (MEMORY,), files_max=FILES, admissions="all,second,tinylfu")
    return cells


def load() -> dict[Cell, Outcome]:
    """Return the outcomes that were measured last time."""
    if not JSON.exists():
        return {}
    found = json.loads(JSON.read_text())["outcomes"]
    outcomes = (Outcome(**{**each, "cell": Cell(**each["cell"])}) for each in found)
    return {outcome.cell: outcome for outcome in outcomes}


def main() -> None:
    """Simulate, write and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trace", type=Path, default=find_trace())
    parser.add_argument("--processes", type=int, help="1 for times that nothing else disturbs")
    parser.add_argument("--policy", nargs="+", help="only these, and the others as last time")
    options = parser.parse_args()
    if options.trace is None:
        parser.error("no trace: give --trace or set RESPKV_TRACE")
    trace = read_trace(options.trace)
    with tempfile.TemporaryDirectory() as folder:
        found = describe(Path(folder))
    started = time.monotonic()
    cells = cells_of_all()
    todo = [cell for cell in cells if not options.policy or cell.policy in options.policy]
    told = f"{trace.name}: {len(trace.requests):,} requests, {trace.num_tokens:,} tokens"

    def keep(outcome: Outcome) -> None:
        print(
            f"{outcome.cell.label:28} {outcome.cell.blocks_max:7} {outcome.hit_rate:.4f}",
            flush=True,
        )
        known = load() | {outcome.cell: outcome}  # another run may have written meanwhile
        body = {
            "trace": told,
            "machine": found,
            "outcomes": [asdict(each) for each in known.values()],
        }
        JSON.write_text(json.dumps(body, indent=1) + "\n")

    if not options.policy:
        JSON.unlink(missing_ok=True)
    simulate_all(todo, trace, num_processes=options.processes, progress=keep)
    known = load()
    every = [known[cell] for cell in cells if cell in known]
    facts = "; ".join(f"{name} {found[name]}" for name in FACTS)
    facts += f"; took {time.monotonic() - started:.0f} s."
    if len(every) < len(cells):
        print(f"{len(cells) - len(every)} cells are still missing: run it without --policy")
        return
    write(every, told, facts)


def write(every: list[Outcome], told: str, facts: str) -> None:
    """Write the page and the plots."""
    outcomes = [each for each in every if not each.cell.files_max]
    filed = [each for each in every if each.cell.files_max]
    (RESULTS / "eviction.md").write_text(page(outcomes, filed, told, facts))
    plain = [each for each in outcomes if not each.cell.has_end_hints]
    draw(plain, DOCS / "retention.svg", "Conversation trace: every policy, one setting each")
    few = [each for each in outcomes if each.cell.policy in ("lru", DEFAULT, BELADY)]
    draw(few, DOCS / "retention-hints.svg", "What it is worth to say that a session ended")
    put_figures(outcomes)
    for what, measured, target, is_met in targets(outcomes):
        print(f"{what}: {measured}, wanted {target}: {'met' if is_met else 'MISSED'}")


def put_figures(outcomes: list[Outcome]) -> None:
    """Write the table of hit rates, and what follows from it, into docs/retention.md."""
    told = {what: measured for what, measured, _, _ in targets(outcomes)}
    times, lead, gap, *_ = told.values()
    ahead = "ahead of" if float(lead) >= 0 else "behind"
    text = (DOCS / "retention.md").read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    figures = f"""{matrix(outcomes, "hit_rate")}

At {AT:,} blocks `{DEFAULT}` hits {times} times what lru hits. Of lru, arc and s3fifo it is {ahead} whichever is
best at a capacity, by {lead.lstrip("+-")} where that is closest. Told of the ends of sessions, it comes {gap} of the way from lru to the
ceiling at {AT:,} blocks.
"""
    (DOCS / "retention.md").write_text(f"{before}{BEGIN}\n\n{figures}\n{END}{after}")


def _figure(outcome: Outcome, name: str) -> str:
    value: float = getattr(outcome, name)
    return f"{value:.4f}" if name in ("hit_rate", "flops_saved") else f"{value:.1f}"


if __name__ == "__main__":
    main()
