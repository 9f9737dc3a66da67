"""Bring a batch of prompts to one length: load what is stored of each, compute what others lack.

A Cache is rectangular, and the prompts of a batch have different prefixes. Cutting all of them to
the shortest would throw most of it away. So those that are behind are computed alone up to where
the next ones begin, and so on: a staircase, at whose top the whole batch goes on together. No token
that is stored is computed, but for a few where a step would be too low to be worth a forward pass.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer

from respkv.client.sequences import ChainOptions
from respkv.integrations.huggingface.layers import layer_for
from respkv.integrations.huggingface.model_kv import ModelKV
from respkv.integrations.huggingface.prefix_cache import PrefixCache, Row
from respkv.integrations.huggingface.prompt_pages import PromptPages
from respkv.integrations.huggingface.rates import Rates

STEP_TOKENS: Final = 16  # lower steps are computed again


class BatchCache(PrefixCache):
    """The cache of one call of generate.

    input_ids: [B, columns]. mask: [B, columns], 0 where padding is, or None where there is none.
    repeats:   lines of the batch for each prompt: beams, or sequences to return.
    starts:    the column at which each prompt begins to be computed.
    answer:    logits [B, V] behind the prompts, which stand in for the first forward pass.
    logits:    those that were computed, [B, V].
    reused:    tokens of each prompt that were loaded. load_s: what that took.
    was_answered: the first forward pass did not happen.
    rates:     what passes cost is told to these.
    """

    def __init__(
        self,
        pages: PromptPages,
        kv: ModelKV,
        rows: Sequence[Row],
        *,
        input_ids: Tensor,
        mask: Tensor | None,
        repeats: int,
        room: int,
        chain: ChainOptions,
        rates: Rates,
    ) -> None:
        super().__init__(pages, kv, rows, room=room, chain=chain)
        self.input_ids = input_ids
        self.mask = mask
        self.repeats = repeats
        self.rates = rates
        self.starts = [row.padding for row in rows]
        self.answer: Tensor | None = None
        self.logits: Tensor | None = None
        self.reused = [0] * len(rows)
        self.load_s = 0.0
        self.was_answered = False

    def begin_at(self, starts: Sequence[int]) -> None:
        """Say at which column each prompt begins to be computed; nothing is loaded yet."""
        self.starts = plan(starts)
        length = max(self.starts)
        lacks_all = all(start == row.padding for start, row in zip(starts, self.rows, strict=True))
        self.set_length(0 if lacks_all else length)

    def take_answer(self) -> Tensor:
        """Return the logits behind the prompts, [B * repeats, 1, V], as a forward pass would."""
        assert self.answer is not None
        answer, self.answer, self.was_answered = self.answer, None, True
        self.set_length(self.columns)
        return answer.repeat_interleave(self.repeats, dim=0)[:, None]

    def bring(self, forward: Callable[..., Any], signature: inspect.Signature) -> None:
        """Get the keys and values of its length: loaded, or computed where that fails.

        forward: of the model.
        """
        target = self.length
        if self.is_loaded:
            return
        begun = time.perf_counter()
        stops = [
            max(0, min(start, target) - row.padding)
            for start, row in zip(self.starts, self.rows, strict=True)
        ]
        self.reused = self.load(stops)
        self.load_s += time.perf_counter() - begun
        reached = [row.padding + end for row, end in zip(self.rows, self.reused, strict=True)]
        if min(reached) < target:
            _Climb(self, forward, signature).run(reached, target)
        self.set_length(target)
        if self.repeats > 1:
            self.batch_repeat_interleave(self.repeats)

    def bring_alone(self) -> None:
        """Get keys and values without the model, as far as they can be had; the others are forgotten."""
        if self.is_loaded:
            return
        target = self.length
        ends = self.load([max(0, target - row.padding) for row in self.rows])
        self.set_length(min(row.padding + end for row, end in zip(self.rows, ends, strict=True)))
        if self.repeats > 1:
            self.batch_repeat_interleave(self.repeats)

    def keep_logits(self, logits: Tensor, end: int) -> None:
        """Note the logits behind the prompts, if these are among some.

        logits: [B * repeats, count, V] of the columns before ``end``.
        """
        behind = end - self.columns
        if self.logits is None and 0 <= behind < logits.shape[1]:
            self.logits = logits[:: self.repeats, logits.shape[1] - 1 - behind].detach().clone()


def plan(starts: Sequence[int]) -> list[int]:
    """Return at which column each prompt begins to be computed: where steps are not too low."""
    levels: list[int] = []
    for start in sorted(set(starts)):
        if not levels or start - levels[-1] >= STEP_TOKENS:
            levels.append(start)
    return [max(level for level in levels if level <= start) for start in starts]


class _Climb:
    """The computation of the prompts that are behind."""

    def __init__(
        self, cache: BatchCache, forward: Callable[..., Any], signature: inspect.Signature
    ) -> None:
        self._cache = cache
        self._forward = forward
        self._accepted = signature.parameters
        mask = cache.mask
        self._positions: Tensor | None = None
        if mask is not None:
            self._positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)

    def run(self, reached: Sequence[int], target: int) -> None:
        """Compute every prompt from the column that it has reached up to the target."""
        cache = self._cache
        order = sorted(range(len(reached)), key=reached.__getitem__)
        self._reorder(order)
        start, active = reached[order[0]], 0
        while start < target:
            while active < len(order) and reached[order[active]] <= start:
                active += 1
            end = min(reached[order[active]], target) if active < len(order) else target
            self._compute(order[:active], start, end)
            start = end
        inverse = sorted(range(len(order)), key=order.__getitem__)
        self._reorder(inverse)
        cache.set_length(target)

    def _reorder(self, order: list[int]) -> None:
        if order != sorted(order):
            for layer in self._cache.kv_layers:
                layer.batch_select_indices(torch.tensor(order))

    def _compute(self, rows: list[int], start: int, end: int) -> None:
        """Compute some columns of the first rows."""
        cache = self._cache
        device = cache.kv.layers[0].device
        picked = torch.tensor(rows)
        inputs: dict[str, Any] = {
            "input_ids": cache.input_ids[picked, start:end].to(device),
            "past_key_values": self._part(len(rows), start),
            "use_cache": True,
            "return_dict": True,
        }
        if cache.mask is not None and "attention_mask" in self._accepted:
            inputs["attention_mask"] = cache.mask[picked, :end].to(device)
        if self._positions is not None and "position_ids" in self._accepted:
            inputs["position_ids"] = self._positions[picked, start:end].to(device)
        if "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = 1
        self._forward(**inputs)

    def _part(self, rows: int, length: int) -> Cache:
        """Return a cache of the first rows, whose layers write into the memory of the whole."""
        cache = self._cache
        layers: list[Any] = []
        for _ in range(cache.kv.num_layers):
            layers.append(DummyLayer())  # type: ignore[no-untyped-call]
        for place, whole in zip(cache.kv.layers, cache.kv_layers, strict=True):
            assert whole.memory is not None
            part = layer_for(place.window, cache.pages.buffers)
            part.adopt(whole.memory[:, :rows], length, whole.base)
            layers[place.index] = part
        return Cache(layers=layers)
