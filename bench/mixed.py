"""Row 11: puts and gets of four times the memory, with a file tier and without."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from bench.files import file_server, tier_counts, tier_folder
from bench.load import Load, Values, WrongReplyError, command, command_with
from bench.result import MIB, Result, duration, size
from bench.rows import Bench
from bench.servers import respkv_server

# Of the steps; the others get.
PUT_SHARE = 0.25
NUM_PAYLOADS = 4096
WRITTEN = "kv_nvme_written_bytes"
CHECKED = 8  # one hit of so many is compared byte by byte


@dataclass(slots=True)
class Turn:
    """What some steps came to.

    took_s: in the server's hands, the client's own work left out.
    """

    hits_s: list[float] = field(default_factory=list)
    num_misses: int = 0
    num_puts: int = 0
    took_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        return len(self.hits_s) / (len(self.hits_s) + self.num_misses)


class Worker:
    """A client that gets pages, puts those it misses and, now and then, one that nobody had yet.

    It asks for the newest pages alone, and half of its gets are for the newest quarter of them.
    """

    def __init__(self, load: Load, *, page_bytes: int, num_pages: int) -> None:
        self._load = load
        self._num_pages = num_pages
        self._newest = -1
        self._random = random.Random(11)
        self._noise = Values(page_bytes, NUM_PAYLOADS).payloads
        self._page = bytearray(page_bytes)

    def fill(self) -> None:
        """Put as many pages as will be asked for."""
        for _ in range(self._num_pages):
            self._put_new()

    def work(self, steps: int) -> Turn:
        """Take some steps."""
        turn = Turn()
        for _ in range(steps):
            if self._random.random() < PUT_SHARE:
                turn.took_s += self._put_new()
                turn.num_puts += 1
            else:
                self._get(turn)
        return turn

    def _get(self, turn: Turn) -> None:
        rank = int(self._num_pages * self._random.random() ** 2)
        number = self._newest - rank
        request = command("KV.GET", _key(number))
        start = perf_counter()
        self._load.send([request], len(request))
        is_hit = self._load.receive_page(self._page)
        took = perf_counter() - start
        turn.took_s += took
        if is_hit:
            turn.hits_s.append(took)
            if len(turn.hits_s) % CHECKED == 0 and self._page != self._payload(number):
                raise WrongReplyError(f"page {number} came back different")
        else:
            turn.num_misses += 1
            turn.num_puts += 1
            turn.took_s += self._put(number)

    def _put_new(self) -> float:
        self._newest += 1
        return self._put(self._newest)

    def _put(self, number: int) -> float:
        payload = self._payload(number)
        request = command_with(payload, "KV.PUT", _key(number))
        answer = bytearray(5)
        start = perf_counter()
        self._load.send(request, sum(map(len, request)))
        self._load.receive([answer], 5)
        took = perf_counter() - start
        if answer != b"+OK\r\n":
            raise WrongReplyError(f"to page {number}: {bytes(answer)!r}")
        return took

    def _payload(self, number: int) -> memoryview:
        return self._noise[number % NUM_PAYLOADS]


def mixed_work(bench: Bench) -> Iterator[Result]:
    """Run the same steps on a server with files and one without, in turns."""
    scale = bench.scale.files
    with ExitStack() as stack:
        path = stack.enter_context(tier_folder(bench.folder))
        memory = scale.mixed_memory_bytes
        servers = [respkv_server(memory), file_server(memory, path, scale.mixed_file_bytes)]
        workers = []
        for server in map(stack.enter_context, servers):
            load = stack.enter_context(Load(server.unix))
            worker = Worker(load, page_bytes=scale.mixed_page_bytes, num_pages=scale.mixed_pages)
            bench.progress(f"row 11: filling {server.name}")
            worker.fill()
            worker.work(scale.mixed_steps)
            workers.append(worker)
        before = tier_counts(servers[1])
        without: list[Turn] = []
        with_files: list[Turn] = []
        for _ in bench.count(11, "mixed puts and gets"):
            for worker, turns in zip(workers, (without, with_files), strict=True):
                turns.append(worker.work(scale.mixed_steps))
        after = tier_counts(servers[1])
        times = scale.mixed_pages * scale.mixed_page_bytes / memory
        work = f"{size(scale.mixed_page_bytes)} pages, {times:.0f} x memory, 1/4 new:"
        yield from _compared(work, without, with_files, scale.mixed_page_bytes)
        yield from _wear(work, with_files, before, after, scale.mixed_page_bytes)


def _compared(
    work: str, without: list[Turn], with_files: list[Turn], page_bytes: int
) -> Iterator[Result]:
    """Yield what both kinds of server have: hits, bytes and latencies."""

    def line(
        what: str,
        unit: str,
        show: Callable[[float], str],
        figure: Callable[[Turn], float],
        *,
        up: bool,
    ) -> Result:
        peer, ours = [figure(turn) for turn in without], [figure(turn) for turn in with_files]
        return Result(
            row=11,
            work=f"{work} {what}, against no files",
            peer=show(median(peer)),
            ours=show(median(ours)),
            ratio=_ratio(median(peer), median(ours), up=up),
            ratios=[_ratio(*pair, up=up) for pair in zip(peer, ours, strict=True)],
            target=None,
            at_least=True,
            unit=unit,
            peer_samples=peer,
            ours_samples=ours,
        )

    def hit_bytes_per_s(turn: Turn) -> float:
        return len(turn.hits_s) * page_bytes / turn.took_s

    yield line("hit rate", "share", "{:.1%}".format, lambda turn: turn.hit_rate, up=True)
    yield line("hits served", "bytes/s", _rate, hit_bytes_per_s, up=True)
    yield line("p50 of hits", "s", duration, lambda turn: _percentile(turn.hits_s, 50), up=False)
    yield line("p99 of hits", "s", duration, lambda turn: _percentile(turn.hits_s, 99), up=False)


def _wear(
    work: str, turns: list[Turn], before: dict[str, int], after: dict[str, int], page_bytes: int
) -> Iterator[Result]:
    """Yield what the device had to write for it."""
    written = after[WRITTEN] - before[WRITTEN]
    put = sum(turn.num_puts for turn in turns) * page_bytes
    hit = sum(len(turn.hits_s) for turn in turns) * page_bytes
    for what, per in (("stored", put), ("hit", hit)):
        yield Result(
            row=11,
            work=f"{work} bytes written to files for each byte {what}",
            peer="",
            ours=f"{written / MIB:,.0f} MiB of {per / MIB:,.0f}",
            ratio=written / per,
            ratios=[written / per],
            target=None,
            at_least=False,
            unit="bytes",
            peer_samples=[],
            ours_samples=[written],
        )


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / MIB:,.0f} MiB/s"


def _ratio(peer: float, ours: float, *, up: bool) -> float:
    """Return how much better ours is, where more is better or, for times, less."""
    return ours / peer if up else peer / ours


def _percentile(samples: list[float], percent: int) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]


def _key(number: int) -> bytes:
    return b"mixed:%064x" % number
