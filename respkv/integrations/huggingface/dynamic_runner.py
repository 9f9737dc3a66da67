"""Serve any decoder-only model of transformers through the model loop, a cache of its own for each.

The forward pass is one per sequence, so many at a time are no faster than one after the other, and
nothing is shared. What this is for: models whose layers keep something else than the K and V of
tokens (recurrent states, latents), which PagedRunner refuses, and something plain to compare that
one with.
"""

from collections.abc import Sequence as Several
from typing import Final

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from respkv.batching.runner import Admission, Refusal
from respkv.batching.sequence import Chunk, Sequence

CONTEXT_TOKENS: Final = 4096  # of a model whose configuration names no longest context


class DynamicRunner:
    """A model with a DynamicCache per sequence.

    model:      on any device; the loop's thread alone uses it from now on.
    tokens_max: of one sequence; the longest context of the model's configuration when None.
    slots:      tokens of all sequences together; beyond that some have to wait.
    """

    def __init__(
        self, model: PreTrainedModel, *, tokens_max: int | None = None, slots: int | None = None
    ) -> None:
        self.model = model
        self.tokens_max = tokens_max or context_tokens(model)
        self.vocab_size = vocab_size(model)
        self._slots = slots or 16 * self.tokens_max
        if self._slots < self.tokens_max:
            raise ValueError(
                f"{self._slots} slots are too few for a sequence of {self.tokens_max} tokens"
            )
        self._caches: dict[Sequence, DynamicCache] = {}
        self._room: dict[Sequence, int] = {}

    def begin(self, sequence: Sequence) -> Admission | Refusal:
        """Take a sequence in if its tokens and one more fit."""
        if not self.grow(sequence, len(sequence.tokens) + 1):
            return Refusal.NO_ROOM
        self._caches[sequence] = DynamicCache(config=self.model.config)
        return Admission()

    def arrived(self, *, wait: bool) -> Several[tuple[Sequence, Admission]]:
        """Nothing is loaded."""
        return ()

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Count the tokens, as if they were slots of one memory."""
        others = sum(room for each, room in self._room.items() if each is not sequence)
        if others + num_tokens > self._slots:
            return False
        self._room[sequence] = max(num_tokens, self._room.get(sequence, 0))
        return True

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        del self._caches[sequence], self._room[sequence]

    def end(self, sequence: Sequence, *, is_good: bool) -> None:
        """Forget a sequence."""
        self.drop(sequence)

    def step(self, chunks: Several[Chunk]) -> Tensor:
        """Compute the chunks, one after the other."""
        rows = []
        for chunk in chunks:
            logits = forward(self.model, chunk.tokens, self._caches.get(chunk.sequence))
            if chunk.is_last:
                rows.append(logits)
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def clear(self) -> int:
        """Nothing is kept for later requests."""
        return 0

    def close(self, *, is_good: bool = True) -> None:
        """Forget all sequences."""
        self._caches.clear()
        self._room.clear()


def forward(model: PreTrainedModel, tokens: list[int], cache: DynamicCache | None) -> Tensor:
    """Compute the tokens that follow those in the cache, or all there are without one.

    Returns: [V], the logits of the last token.
    """
    output = model(
        input_ids=torch.tensor([tokens], device=model.device),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[0, -1]
    return logits


def vocab_size(model: PreTrainedModel) -> int:
    """Return below what token ids are."""
    return int(model.config.get_text_config().vocab_size)


def context_tokens(model: PreTrainedModel) -> int:
    """Return how many tokens the model was made for."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or CONTEXT_TOKENS)
