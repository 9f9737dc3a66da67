"""Loads into the blocks of a paged cache; the long ones beside the model's steps.

A load of a few pages takes less time than a step. One of gigabytes, or from a disk, takes as long as
many: it is done by a thread, into blocks that the sequence has already and nobody reads before.
"""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from respkv.batching.sequence import Sequence
from respkv.client import SequenceMatch
from respkv.client.sequences import ChainOptions
from respkv.integrations.huggingface.prompt_pages import PromptPages
from respkv.paged import Run

ASIDE_US: Final = 5_000  # as respkv estimates it
ASIDE_BYTES: Final = 16 << 20
THREADS_MAX: Final = 2
WAIT_S: Final = (
    0.005  # so long may a new request wait for one that is loaded, with nothing to compute
)


@dataclass(slots=True)
class Load:
    """Some tokens of a prompt, on their way into blocks.

    runs:     where tokens first to stop - 1 go.
    is_whole: nothing of the prompt is missing then, and its last logits are stored.
    is_long:  others should not wait for it.
    end:      tokens first to ``end`` - 1 have come; logits: [V], when all of the prompt has.
    """

    pages: PromptPages
    tokens: list[int]
    chain: ChainOptions
    match: SequenceMatch
    first: int
    stop: int
    runs: list[Run]
    is_whole: bool
    is_long: bool
    end: int = field(init=False)
    logits: Tensor | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.end = self.first

    @property
    def has_failed(self) -> bool:
        """Whether something that was there did not come."""
        return self.end < self.stop

    def run(self) -> None:
        """Bring the tokens; in any thread, once."""
        begun = time.perf_counter()
        logits = None
        if self.is_whole:
            logits = self.pages.logits(self.tokens, match=self.match, **self.chain)
        if self.is_whole and logits is None:
            self.stop = max(self.first, self.stop - 1)  # the last token is computed, for its logits
        for run in self.runs:
            stop = min(run.stop, self.stop)
            pairs = list(zip(run.keys, run.values, strict=True))
            self.end = self.pages.load(
                self.tokens, pairs, first=run.first, stop=stop, match=self.match, **self.chain
            )
            if self.end < run.stop:
                break
        if self.end == len(self.tokens):
            self.logits = logits
        self.seconds = time.perf_counter() - begun


class LoadThreads:
    """Loads that are under way, by the sequence that they are for."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._under_way: dict[Future[None], Sequence] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def start(self, sequence: Sequence, work: Callable[[], None]) -> None:
        """Have a thread do the work."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="respkv-load")
        self._under_way[self._threads.submit(work)] = sequence

    def finished(self, *, wait: bool) -> list[Sequence]:
        """Return the sequences whose work is over, each once; ``wait`` a moment for one.

        Raises what the work has raised.
        """
        if not self._under_way:
            return []
        done, _ = wait_for(self._under_way, WAIT_S if wait else 0, FIRST_COMPLETED)
        for each in done:
            each.result()
        return [self._under_way.pop(each) for each in done]

    def close(self) -> None:
        """End the threads when they have done their work."""
        if self._threads is not None:
            self._threads.shutdown()
