"""Between the blocks of a paged cache and pages of respkv: load what is missing, store what is new."""

import threading
from collections import deque
from typing import Final

import torch
from torch import Tensor

from respkv.client import SequenceMatch
from respkv.client.sequences import ChainOptions
from respkv.integrations.huggingface.page_copies import KVPair
from respkv.integrations.huggingface.paged_loads import ASIDE_US, Load
from respkv.integrations.huggingface.prompt_pages import PromptPages
from respkv.integrations.huggingface.rates import Rates
from respkv.paged import OutOfBlocks, PagedAttentionCache

LOAD_TOKENS_MIN: Final = 8  # fewer are computed along with what is left of the prompt


class PagedPages:
    """The traffic of one paged cache; the model's thread alone calls it.

    rates: what computing and loading cost, by which a load is left out; None to load in any case.
    aside_bytes: loads of more are long.
    """

    def __init__(
        self, cache: PagedAttentionCache, pages: PromptPages, rates: Rates | None, aside_bytes: int
    ) -> None:
        self._cache = cache
        self._pages = pages
        self._rates = rates
        self._aside_bytes = aside_bytes
        self._under_way = 0  # stores whose blocks are held
        self._news = threading.Condition()
        self._finished: deque[int] = deque()  # the forks of those that are over

    def begin_load(self, number: int, tokens: list[int], chain: ChainOptions) -> Load | None:
        """Make room for what respkv has of a prompt and the blocks have not; None: not worth it."""
        have = self._cache.computed(number)
        match = self._pages.match(tokens, logits=True, **chain)
        is_whole = match.tokens == len(tokens) and match.has_logits
        stop = match.tokens if is_whole else min(match.tokens, len(tokens) - 1)
        if stop <= have or not self._is_worth(stop - have, match, is_whole):
            return None
        try:
            self._cache.reserve(number, stop - have)
        except OutOfBlocks:  # stores hold some; the tokens are computed when these are done
            return None
        nbytes = (stop - have) * self._cache.config.token_bytes
        runs = self._cache.runs(number, have, stop)
        is_long = nbytes > self._aside_bytes or match.load_us > ASIDE_US
        return Load(self._pages, tokens, chain, match, have, stop, runs, is_whole, is_long)

    def end_load(self, number: int, load: Load) -> None:
        """Make what has come of a load count."""
        self._cache.commit(number, load.end - load.first)
        if self._rates is not None:
            nbytes = (load.end - load.first) * self._cache.config.token_bytes
            self._rates.loaded(nbytes, load.seconds)

    def _is_worth(self, count: int, match: SequenceMatch, is_whole: bool) -> bool:
        """Whether to load so many tokens; those of a whole prompt save a step besides."""
        if count < LOAD_TOKENS_MIN:
            return is_whole
        nbytes = count * self._cache.config.token_bytes
        return self._rates is None or self._rates.is_worth(count, nbytes, match.load_us / 1e6)

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

    def _done(self, hold: int) -> None:
        """Note that a store is over; its thread calls this."""
        with self._news:
            self._finished.append(hold)
            self._news.notify()
