"""Time work on a GPU: events on the stream, warmed up, in turns, with a cold second-level cache.

Work is timed one call at a time. Before the calls of a round the GPU is kept busy for some
milliseconds, in which the processor puts all of them in line: what Python takes to launch a kernel
is then not in its time, unless the work itself waits for the device. Between calls a buffer larger
than the cache is written, so that nothing is read from there that a model's other layers would have
pushed out; work that moves much more than the cache holds goes without.

On a processor the same functions take the time of day.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Final, Protocol

import torch

SPIN_CYCLES: Final = 20_000_000  # 10 ms at 2 GHz
ROUND_S: Final = 0.02
CALLS_MIN, CALLS_MAX = 3, 25
FLUSH_BYTES_MIN: Final = 128 << 20  # several times the cache of the GPUs there are


@dataclass(slots=True)
class Work:
    """Something to measure.

    run:    does it once. ``nbytes``: what it reads and writes in the device's memory.
    waits:  it returns when all is done, as copies to the host do: timed from outside.
    samples: seconds of a call, the median of each round.
    """

    name: str
    run: Callable[[], object]
    nbytes: int = 0
    waits: bool = False
    samples: list[float] = field(default_factory=list[float])

    @property
    def seconds(self) -> float:
        """What a call takes: the median of the rounds."""
        return median(self.samples)

    @property
    def bytes_per_s(self) -> float:
        """What it moves in a second."""
        return self.nbytes / self.seconds


class Clock(Protocol):
    """Times calls on one device."""

    def calls(self, work: Work) -> int:
        """Return how many calls a round is, once the first ones have been made."""
        ...

    def seconds(self, work: Work, calls: int) -> float:
        """Return what one of so many calls takes, the median."""
        ...


class HostClock:
    """For tests: the time of day."""

    def calls(self, work: Work) -> int:
        self.seconds(work, 1)
        return 1

    def seconds(self, work: Work, calls: int) -> float:
        return median(_timed(work.run) for _ in range(calls))


class CudaClock:
    """Events on the current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        cached = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        nbytes = max(FLUSH_BYTES_MIN, 2 * cached)
        self._other = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def calls(self, work: Work) -> int:
        self.seconds(work, 1)  # compiles
        took = self.seconds(work, 2)
        return max(CALLS_MIN, min(CALLS_MAX, round(ROUND_S / max(took, 1e-9))))

    def seconds(self, work: Work, calls: int) -> float:
        torch.cuda.synchronize()
        if work.waits:
            return median(_timed(work.run) for _ in range(calls))
        is_cold = work.nbytes > 4 * self._other.nbytes
        pairs = [(_event(), _event()) for _ in range(calls)]
        spin: Callable[[int], None] = torch.cuda._sleep
        spin(SPIN_CYCLES)
        for begin, end in pairs:
            if not is_cold:
                self._other.zero_()
            begin.record()
            work.run()
            end.record()
        torch.cuda.synchronize()
        return median(float(begin.elapsed_time(end)) for begin, end in pairs) / 1e3


def measure(clock: Clock, works: list[Work], rounds: int) -> None:
    """Measure works in turns, so that what disturbs the machine for a while disturbs all of them."""
    calls = [clock.calls(work) for work in works]
    for _ in range(rounds):
        for work, count in zip(works, calls, strict=True):
            work.samples.append(clock.seconds(work, count))


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def _timed(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def _event() -> torch.cuda.Event:
    make: Callable[..., torch.cuda.Event] = torch.cuda.Event  # untyped in torch's stubs
    return make(enable_timing=True)
