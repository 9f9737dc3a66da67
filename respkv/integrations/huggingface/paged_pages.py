"""Between the blocks of a paged cache and pages of respkv: load what is missing, store what is new."""

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from respkv.client.sequences import ChainOptions
from respkv.integrations.huggingface.page_copies import KVPair
from respkv.integrations.huggingface.prompt_pages import PromptPages
from respkv.paged import OutOfBlocks, PagedAttentionCache

LOAD_TOKENS_MIN: Final = 8  # fewer are computed along with what is left of the prompt


@dataclass(frozen=True, slots=True)
class Brought:
    """What came of a prompt.

    logits: [V] of its end, when all of it is in the blocks now.
    failures: 1 when something was there and could not be had.
    """

    logits: Tensor | None = None
    failures: int = 0


class PagedPages:
    """The traffic of one paged cache; the model's thread alone calls it."""

    def __init__(self, cache: PagedAttentionCache, pages: PromptPages) -> None:
        self._cache = cache
        self._pages = pages
        self._under_way = 0  # stores whose blocks are held
        self._news = threading.Condition()
        self._finished: deque[int] = deque()  # the forks of those that are over

    def bring(self, number: int, tokens: list[int], chain: ChainOptions) -> Brought:
        """Load what respkv has of a prompt and the blocks have not."""
        have = self._cache.computed(number)
        match = self._pages.match(tokens, **chain)
        is_whole = match.tokens == len(tokens) and match.has_logits
        stop = match.tokens if is_whole else min(match.tokens, len(tokens) - 1)
        if not is_whole and stop - have < LOAD_TOKENS_MIN:
            return Brought()
        logits = self._pages.logits(tokens, **chain) if is_whole else None
        if logits is None:
            stop = min(stop, len(tokens) - 1)
        try:
            self._cache.reserve(number, stop - have)
        except OutOfBlocks:  # stores hold some; the tokens are computed when these are done
            return Brought()
        end = have
        for run in self._cache.runs(number, have, stop):
            pairs = list(zip(run.keys, run.values, strict=True))
            end = self._pages.load(
                tokens, pairs, first=run.first, stop=run.stop, match=match, **chain
            )
            if end < run.stop:
                break
        self._cache.commit(number, end - have)
        return Brought(logits if end == len(tokens) else None, int(end < stop))

    def store(
        self, number: int, tokens: list[int], chain: ChainOptions, logits: Tensor | None
    ) -> None:
        """Store the first tokens of a sequence, in the background.

        A fork holds their blocks until that is done, so that nothing is copied here, and nobody
        writes to them meanwhile.
        """
        hold = self._cache.fork(number)

        def piece(start: int, end: int) -> list[KVPair]:
            runs = self._cache.runs(hold, start, end)
            if len(runs) == 1:
                return list(zip(runs[0].keys, runs[0].values, strict=True))
            return [
                (
                    torch.cat([run.keys[layer] for run in runs]),
                    torch.cat([run.values[layer] for run in runs]),
                )
                for layer in range(self._cache.config.num_layers)
            ]

        is_queued = self._pages.store(
            tokens, piece, logits=logits, done=lambda: self._done(hold), **chain
        )
        if is_queued:
            self._under_way += 1
        else:
            self._cache.free_sequence(hold, keep=False)

    def wait(self) -> bool:
        """Wait for a store that holds blocks; returns whether there was one."""
        if not self._under_way:
            return False
        with self._news:
            self._news.wait_for(lambda: self._finished)
        self.take_back()
        return True

    def take_back(self) -> None:
        """Give back the blocks of stores that are over."""
        while self._finished:
            self._cache.free_sequence(self._finished.popleft(), keep=False)
            self._under_way -= 1

    def close(self) -> None:
        """Wait until everything is stored."""
        while self.wait():
            pass

    def _done(self, hold: int) -> None:
        """Note that a store is over; its thread calls this."""
        with self._news:
            self._finished.append(hold)
            self._news.notify()
