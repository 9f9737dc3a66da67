"""One forward pass over a ragged batch: pieces of prompts and single tokens, packed one after the other.

A step takes the next tokens of some sequences, makes room for them and says where each is: which
token, at which position of its sequence, in which slot of the cache. A model embeds and computes all
of them as one row of tokens; only attention has to know whose is whose, and calls ``attend`` in each
layer. When the model is through, ``commit`` makes the tokens count. A step that is not committed
never was: its tokens can be computed again.

Sequences with one new token come first, by length: those are the decodes, which have a kernel of
their own on a GPU, and are done together on a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from respkv.kernels.attention import paged_decode, paged_prefill
from respkv.kernels.paged import to_device
from respkv.kernels.paged_kv import PagedKV, Scoring
from respkv.paged.block_table import OutOfBlocks
from respkv.paged.cache import PagedAttentionCache, table_tensor
from respkv.paged.host_attention import Group, Span, attend, plan


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``count`` tokens of a sequence that are known and not computed.

    logits: whether those at the last of them are wanted.
    """

    sequence: int
    count: int = 1
    logits: bool = True


class PagedStep:
    """The packed tokens of a batch: S of B sequences.

    tokens, positions: [S] int64, on the cache's device.
    last:              [chunks with logits] int64: which of the S are the last of their chunks, in the order
                       in which the chunks were given.
    by_kernels:        whether attention is that of respkv.kernels; when not given, on a GPU, for a processor
                       has a quicker way.
    Raises OutOfBlocks when there is no room for all of them, and none has got any; ValueError for
    chunks of tokens that there are not, or two of one sequence.
    """

    def __init__(
        self,
        cache: PagedAttentionCache,
        chunks: Sequence[Chunk],
        *,
        by_kernels: bool | None = None,
    ) -> None:
        if not chunks or len({each.sequence for each in chunks}) < len(chunks):
            raise ValueError(
                f"a step takes one chunk of each of some sequences, not {list(chunks)}"
            )
        self._cache = cache
        decodes = sorted(
            (each for each in chunks if each.count == 1),
            key=lambda each: -cache.computed(each.sequence),
        )
        order = [*decodes, *(each for each in chunks if each.count != 1)]
        tokens = [cache.blocks.next_tokens(each.sequence, each.count) for each in order]
        _reserve(cache, order)
        self._chunks = order
        self._computed = [cache.computed(each.sequence) for each in order]
        self._tables = [cache.blocks.blocks(each.sequence) for each in order]
        self._plans = dict[int | None, list[Group]]()
        device = cache.keys[0].device
        self.tokens = _ids([token for each in tokens for token in each], device)
        self.positions = _ids(
            [
                computed + index
                for chunk, computed in zip(order, self._computed, strict=True)
                for index in range(chunk.count)
            ],
            device,
        )
        ends, end = dict[int, int](), 0
        for chunk in order:
            end += chunk.count
            ends[chunk.sequence] = end - 1
        self.last = _ids([ends[each.sequence] for each in chunks if each.logits], device)
        self._slots = _ids(self._all_slots(), device)
        self._num_decodes = len(decodes)
        self._by_kernels = device.type == "cuda" if by_kernels is None else by_kernels
        if self._by_kernels:
            self._set_tables(device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        """Write the new tokens' keys and values of a layer, and attend.

        query:      [S, Q, D]; key, value: [S, H, D]; all of the cache's type.
        Returns: [S, Q, D].
        """
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.flatten(0, 1).index_copy_(0, self._slots, key)
        values.flatten(0, 1).index_copy_(0, self._slots, value)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self._by_kernels:
            return self._attend_by_kernels(keys, values, query, key, value, scoring, out)
        groups = self._plans.get(scoring.window)
        if groups is None:
            groups = self._plans[scoring.window] = self._plan(scoring.window, query.dtype)
        return attend(query, keys, values, groups, scoring=scoring, out=out)

    def commit(self) -> None:
        """Make the tokens count, in all layers."""
        for chunk in self._chunks:
            self._cache.commit(chunk.sequence, chunk.count)

    def _plan(self, window: int | None, dtype: torch.dtype) -> list[Group]:
        config = self._cache.config
        spans = [
            Span(table, computed + chunk.count, chunk.count)
            for table, computed, chunk in zip(
                self._tables, self._computed, self._chunks, strict=True
            )
        ]
        return plan(
            spans,
            block_tokens=config.block_tokens,
            token_bytes=config.num_kv_heads * config.head_dim * config.dtype.itemsize,
            dtype=dtype,
            window=window,
        )

    def _all_slots(self) -> list[int]:
        size = self._cache.config.block_tokens
        return [
            table[position // size] * size + position % size
            for table, computed, chunk in zip(
                self._tables, self._computed, self._chunks, strict=True
            )
            for position in range(computed, computed + chunk.count)
        ]

    def _set_tables(self, device: torch.device) -> None:
        """Lay out what the kernels read: a decode sees its own token, new ones of a chunk come apart."""
        decodes = self._num_decodes
        lengths = [
            computed + (chunk.count == 1)
            for computed, chunk in zip(self._computed, self._chunks, strict=True)
        ]
        starts = [0]
        for chunk in self._chunks[decodes:]:
            starts.append(starts[-1] + chunk.count)
        self._new_max = max((each.count for each in self._chunks[decodes:]), default=0)
        self._block_tables = to_device(table_tensor(self._tables, torch.device("cpu")), device)
        self._context_lens = to_device(torch.tensor(lengths, dtype=torch.int32), device)
        self._cu_seqlens = to_device(torch.tensor(starts, dtype=torch.int32), device)

    def _attend_by_kernels(
        self,
        keys: Tensor,
        values: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
        out: Tensor,
    ) -> Tensor:
        tables, lengths, decodes = self._block_tables, self._context_lens, self._num_decodes
        if decodes:
            pages = PagedKV(keys, values, tables[:decodes], lengths[:decodes])
            paged_decode(query[:decodes], pages, out=out[:decodes], scoring=scoring)
        if decodes < len(self._chunks):
            paged_prefill(
                query[decodes:],
                key[decodes:],
                value[decodes:],
                PagedKV(keys, values, tables[decodes:], lengths[decodes:]),
                self._cu_seqlens,
                new_max=self._new_max,
                out=out[decodes:],
                scoring=scoring,
            )
        return out


def _reserve(cache: PagedAttentionCache, chunks: Sequence[Chunk]) -> None:
    """Make room for all chunks or, raising OutOfBlocks, for none."""
    for index, chunk in enumerate(chunks):
        try:
            cache.reserve(chunk.sequence, chunk.count)
        except OutOfBlocks:
            for each in chunks[:index]:
                cache.blocks.unreserve(each.sequence)
            raise


def _ids(numbers: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(numbers, dtype=torch.int64), device)
