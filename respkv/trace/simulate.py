"""Simulate caches on a trace: the engine's own policies at several capacities, and the ceiling.

A cell is one policy at one capacity; shelf.py is the cache that it runs, belady.py the ceiling. Cells
know nothing of each other, so as many run at a time as there are processors.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

from respkv.engine.admission import Mode
from respkv.engine.eviction import POLICIES
from respkv.errors import ConfigError
from respkv.trace.belady import Belady, last_requests, next_uses
from respkv.trace.file_shelf import FileShelf
from respkv.trace.flops import DEFAULT_MODEL, Model
from respkv.trace.format import Request, Trace
from respkv.trace.shelf import LISTENERS, Shelf

BELADY = "belady"
NAMES = (*POLICIES, BELADY)
MODES: tuple[Mode, ...] = ("all", "second", "tinylfu")


@dataclass(frozen=True, slots=True)
class Cell:
    """One simulation. has_end_hints: whether the cache is told of each session's last request.

    is_chained: whether blocks know what they stand behind, as in the engine, so that leaves go first.
    files_max:  blocks in a file tier behind memory; 0: there is none. admission: what goes there.
    """

    policy: str
    blocks_max: int
    has_end_hints: bool = False
    is_chained: bool = True
    files_max: int = 0
    admission: Mode = "all"

    @property
    def label(self) -> str:
        """What tables and plots call it."""
        words = [self.policy]
        if self.has_end_hints:
            words.append("end hints")
        if self.files_max:
            words.append(f"files, {self.admission}")
        return " + ".join(words)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cell.

    hit_tokens:   at the front of prompts, of num_tokens in all.
    hit_flops:    that computing them again would have taken, of num_flops for all prompts.
    num_hits:     blocks that were resident; num_raised: of these, in files alone.
    num_written:  blocks that were stored; with a file tier those that went there.
    decision_us:  of processor time for an eviction, on average, without what Python's collector takes;
                  0.0 without evictions.
    ghost_bytes:  what the policy keeps about blocks that are not there, for each that could be.
    """

    cell: Cell
    num_tokens: int = 0
    hit_tokens: int = 0
    num_flops: float = 0.0
    hit_flops: float = 0.0
    num_hits: int = 0
    num_raised: int = 0
    num_written: int = 0
    num_evicted: int = 0
    num_verdicts: int = 0
    decision_us: float = 0.0
    slowest_us: float = 0.0
    ghost_bytes: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Tokens that were hit, as a share of all."""
        return self.hit_tokens / self.num_tokens if self.num_tokens else 0.0

    @property
    def flops_saved(self) -> float:
        """Operations that hits saved, as a share of all."""
        return self.hit_flops / self.num_flops if self.num_flops else 0.0

    @property
    def written_per_hit(self) -> float:
        """Bytes written for each byte that was hit; blocks have one size."""
        return self.num_written / self.num_hits if self.num_hits else 0.0


def cells_of(
    policies: str,
    capacities: Sequence[int],
    *,
    has_end_hints: bool = False,
    files_max: int = 0,
    admissions: str = "all",
) -> list[Cell]:
    """Return the cells of policies, names with commas between or ``all``, at each capacity.

    has_end_hints: tell those that listen. files_max: blocks in files behind each capacity, in each
    way of admission, names with commas between. The ceiling has all of them as one.
    Raises ConfigError for a name that is none.
    """
    ways = _modes(admissions) if files_max else ("all",)
    names = NAMES if policies == "all" else tuple(name.strip() for name in policies.split(","))
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"policy {name!r} is none of {', '.join(NAMES)}, or all")
    return [
        Cell(
            name,
            capacity,
            has_end_hints=has_end_hints and name in LISTENERS,
            files_max=files_max,
            admission=way,
        )
        for name in names
        for way in (ways if name != BELADY else ways[:1])
        for capacity in capacities
    ]


def simulate(cell: Cell, trace: Trace, model: Model = DEFAULT_MODEL) -> Outcome:
    """Run one cell over a trace."""
    return _ceiling(cell, trace, model) if cell.policy == BELADY else _cached(cell, trace, model)


def simulate_all(
    cells: Sequence[Cell],
    trace: Trace,
    *,
    model: Model = DEFAULT_MODEL,
    num_processes: int | None = None,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run cells, each in a process of its own, as many at a time as there are processors.

    progress: told each outcome, in the order of the cells.
    """
    run = partial(simulate, trace=trace, model=model)
    found: list[Outcome] = []
    if num_processes == 1 or len(cells) == 1:
        outcomes: Iterable[Outcome] = map(run, cells)
        for outcome in outcomes:
            found.append(outcome)
            progress(outcome)
        return found
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        for outcome in pool.map(run, cells):
            found.append(outcome)
            progress(outcome)
    return found


class _Counts:
    """The tokens and operations of the prompts so far, and what of them was hit."""

    def __init__(self, trace: Trace, model: Model) -> None:
        self._block_tokens = trace.block_tokens
        self._model = model
        self.num_hits = 0
        self.num_tokens = self.hit_tokens = 0
        self.num_flops = self.hit_flops = 0.0

    def add(self, request: Request, prefix: int) -> None:
        tokens = min(prefix * self._block_tokens, request.num_tokens)
        self.num_hits += prefix
        self.num_tokens += request.num_tokens
        self.hit_tokens += tokens
        self.num_flops += self._model.flops(0, request.num_tokens)
        self.hit_flops += self._model.flops(0, tokens)

    def outcome(self, cell: Cell) -> Outcome:
        return Outcome(
            cell, self.num_tokens, self.hit_tokens, self.num_flops, self.hit_flops, self.num_hits
        )


def _modes(names: str) -> tuple[Mode, ...]:
    by_name: dict[str, Mode] = {mode: mode for mode in MODES}
    words = [name.strip() for name in names.split(",")]
    for word in words:
        if word not in by_name:
            raise ConfigError(f"admission {word!r} is none of {', '.join(MODES)}")
    return tuple(by_name[word] for word in words)


def _shelf(cell: Cell, block_tokens: int) -> Shelf:
    if not cell.files_max:
        return Shelf(cell.policy, cell.blocks_max, block_tokens, is_chained=cell.is_chained)
    return FileShelf(
        cell.policy,
        cell.blocks_max,
        block_tokens,
        files_max=cell.files_max,
        admission=cell.admission,
    )


def _cached(cell: Cell, trace: Trace, model: Model) -> Outcome:
    shelf = _shelf(cell, trace.block_tokens)
    counts = _Counts(trace, model)
    lasts = (
        last_requests(trace.requests, trace.block_tokens)
        if cell.has_end_hints
        else [False] * len(trace.requests)
    )
    with _uncollected() as collect:
        for request, is_last in zip(trace.requests, lasts, strict=True):
            counts.add(request, shelf.serve(request, is_last=is_last))
            collect()
    shelf.check()
    return replace(
        counts.outcome(cell),
        num_raised=shelf.num_raised if isinstance(shelf, FileShelf) else 0,
        num_written=shelf.num_written if isinstance(shelf, FileShelf) else shelf.num_stored,
        num_evicted=shelf.num_evicted,
        num_verdicts=shelf.num_verdicts,
        decision_us=shelf.decision_us,
        slowest_us=shelf.slowest_s * 1e6,
        ghost_bytes=shelf.ghost_bytes,
    )


@contextmanager
def _uncollected() -> Iterator[Callable[[], object]]:
    """Keep Python's collector out of what is timed; what is yielded lets it look at the young.

    A server does the same (DESIGN.md, decision 11): entries are never garbage, and a full collection
    looks at all of them, in the middle of whatever is done just then.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield partial(gc.collect, 1)
    finally:
        if was_enabled:
            gc.enable()


def _ceiling(cell: Cell, trace: Trace, model: Model) -> Outcome:
    belady, counts = Belady(cell.blocks_max + cell.files_max), _Counts(trace, model)
    for request, uses in zip(trace.requests, next_uses(trace.requests), strict=True):
        counts.add(request, belady.serve(request, uses))
    return replace(counts.outcome(cell), num_written=belady.num_stored)
