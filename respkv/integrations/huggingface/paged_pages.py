"""Between the blocks of a paged cache and pages of respkv: load what is missing, store what is new."""

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
        """Store the first tokens of a sequence, in the background."""
        runs = self._cache.runs(number, 0, len(tokens))
        kv: list[KVPair] = [
            (
                torch.cat([run.keys[layer] for run in runs]),
                torch.cat([run.values[layer] for run in runs]),
            )
            for layer in range(self._cache.config.num_layers)
        ]
        self._pages.store(tokens, kv, logits=logits, **chain)

    def wait(self) -> bool:
        """Wait for a store that holds blocks; returns whether any were given back."""
        return False

    def close(self) -> None:
        """Wait until everything is stored."""
        self._pages.flush()
