"""Layers of a Cache that are filled by copying pages, and grow without being copied at each step.

Keys and values lie token by token, ``[2, B, room, H, D]``, as they do in a page, with room behind
the last token. So loading a prompt is a copy of memory, a new token is written behind the others,
and storing needs no transposition. What attention sees are views ``[B, H, tokens, D]``.

A layer with a sliding window keeps the tokens that fell out of it, since pages are stored whole; what
attention sees is the window.
"""

import copy
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from respkv.integrations.huggingface.buffers import BufferPool

ROOM_MIN: Final = 64  # tokens that are made room for at least


class TokenMajorLayer(DynamicLayer):
    """Keys and values of one layer of full attention.

    memory: ``[2, B, room, H, D]``, or None before there are any. base: the token in row 0.
    length: tokens so far, those in front of ``base`` included.
    """

    is_compileable = False
    is_sliding = False
    window = 0

    def __init__(self, buffers: BufferPool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: Tensor | None = None
        self.base = 0
        self.length = 0
        self.record_past = False
        self._buffers = buffers
        self._lent = 0  # tokens that someone reads meanwhile: they are not written over
        self._halves: tuple[Tensor, Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenMajorLayer":
        """Return a layer with the same tokens in memory of its own."""
        twin = copy.copy(self)
        if self.memory is not None:
            memory = self._buffers.empty(tuple(self.memory.shape), self.dtype, self.device)
            used = self.length - self.base
            memory[:, :, :used].copy_(self.memory[:, :, :used])
            twin.adopt(memory, self.length, self.base)
        return twin

    def adopt(self, memory: Tensor, length: int, base: int = 0) -> None:
        """Take memory over that has ``length - base`` tokens in its first rows."""
        self.memory = memory
        self.dtype, self.device = memory.dtype, memory.device
        self.is_initialized = True
        self.base = base
        self._lent = 0
        self.set_length(length)

    def set_length(self, length: int) -> None:
        """Say how many tokens there are; those behind are forgotten."""
        self.length = length
        self._show(self._first_visible(0))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for the first tokens."""
        if self.length:
            raise RuntimeError(
                f"{self.length} tokens of this layer were to be loaded, and have not been; compute"
                " with the adapter's generate, which loads them first"
            )
        batch, heads, count, dim = key_states.shape
        shape = (2, batch, max(ROOM_MIN, count + count // 8), heads, dim)
        memory = self._buffers.empty(shape, key_states.dtype, key_states.device)
        self.adopt(memory, self.length, self.base)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the next tokens, ``[B, H, count, D]``; return what they attend to."""
        if self.memory is None:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states)
        count = key_states.shape[-2]
        row = self.length - self.base
        keys, values = self._sides(self._room_for(row + count))
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        keys.narrow(2, row, count).copy_(key_states)
        values.narrow(2, row, count).copy_(value_states)
        first, is_first = self._first_visible(count), not self.length
        self.length += count
        shown = self._first_visible(0)
        self._show(shown)
        if is_first:  # what was given lies better for attention than what a page looks like
            return key_states, value_states
        if first == shown and self.keys is not None and self.values is not None:
            return self.keys, self.values
        return self._views(first)

    def get_seq_length(self) -> int:
        """Return how many tokens there are."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens the next ones attend to, themselves among them, and the first."""
        first = self._first_visible(query_length)
        return self.length + query_length - first, first

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a count of them is negative."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of tokens, not {tokens_to_remove}")
        length = self.length + tokens_to_remove
        if length < 0 or (self.base and length - self.base < self.window - 1):
            raise RuntimeError(
                f"{-tokens_to_remove} tokens cannot be removed: the tokens from {self.base} to"
                f" {self.length} are kept, with a window of {self.window}"
            )
        self.set_length(length)

    def reset(self) -> None:
        """Forget everything."""
        self.memory = self.keys = self.values = self._halves = None
        self.is_initialized = False
        self.base = self.length = 0

    def activate_past_recording(self) -> None:
        """Nothing to do: the past is kept."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows of the batch, in another order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        if self.memory is None:
            return
        old, rows = self.memory, self.length - self.base
        picked = torch.arange(old.shape[1], device=old.device)[indices.to(old.device)]
        shape = (2, len(picked), *old.shape[2:])
        memory = self._buffers.empty(shape, old.dtype, old.device)
        for row, source in enumerate(picked.tolist()):
            memory[:, row, :rows].copy_(old[:, source, :rows])
        self.adopt(memory, self.length, self.base)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.memory is not None:
            rows = torch.arange(self.memory.shape[1]).repeat_interleave(repeats)
            self.batch_select_indices(rows)

    def offload(self) -> None:
        """Raise: the tensors of this layer are views of its memory, which stays where it is."""
        raise NotImplementedError("a cache that loads from respkv cannot be offloaded")

    def kv_of(self, row: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Lend keys and values of positions ``first`` to ``stop`` of a row, ``[n, H, D]``.

        They stay as they are: what is cropped and written anew is written elsewhere.
        """
        assert self.memory is not None
        self._lent = max(self._lent, stop)
        part = self.memory[:, row, first - self.base : stop - self.base]
        return part[0], part[1]

    def _first_visible(self, query_length: int) -> int:
        """Return the first token that the next ones attend to."""
        return 0

    def _views(self, first: int) -> tuple[Tensor, Tensor]:
        assert self.memory is not None
        keys, values = self._sides(self.memory)
        row, count = first - self.base, self.length - first
        return keys.narrow(2, row, count), values.narrow(2, row, count)

    def _sides(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        # Each step and layer takes views of them, and a view costs as much as copying a token: the
        # two halves are cut once for each memory.
        if self._halves is None or self._halves[0] is not memory:
            halves = memory.transpose(2, 3)
            self._halves = memory, halves[0], halves[1]
        return self._halves[1:]

    def _show(self, first: int) -> None:
        if self.memory is not None:
            self.keys, self.values = self._views(first)

    def _room_for(self, rows: int) -> Tensor:
        memory = self.memory
        assert memory is not None
        if rows > memory.shape[2] or self.length < self._lent:
            grown = max(rows + ROOM_MIN, memory.shape[2] * 3 // 2)
            room = grown if rows > memory.shape[2] else memory.shape[2]
            larger = self._buffers.empty(
                (2, memory.shape[1], room, *memory.shape[3:]), memory.dtype, memory.device
            )
            used = self.length - self.base
            larger[:, :, :used].copy_(memory[:, :, :used])
            self.memory, self._lent = larger, 0
            return larger
        return memory

    def _check(self, states: Tensor) -> None:
        assert self.memory is not None
        _, batch, _, heads, dim = self.memory.shape
        new_batch, new_heads, _, new_dim = states.shape
        if (new_batch, new_heads, new_dim, states.dtype) != (batch, heads, dim, self.dtype):
            raise ValueError(
                f"the cache holds {batch} sequences of {heads} heads of {dim} {self.dtype}; the"
                f" model gave {list(states.shape)} {states.dtype}"
            )


class SlidingTokenMajorLayer(TokenMajorLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer that attends to the last ``window`` tokens."""

    is_sliding = True

    def __init__(self, buffers: BufferPool, window: int) -> None:
        super().__init__(buffers)
        self.window = self.sliding_window = window
        self._sliding_window_tensor = torch.tensor(window, dtype=torch.long)

    def get_max_length(self) -> int:
        """Return the window."""
        return self.window

    def _first_visible(self, query_length: int) -> int:
        return max(0, self.length - self.window + 1)


def layer_for(window: int, buffers: BufferPool) -> TokenMajorLayer:
    """Return an empty layer. window: in tokens, of one that slides; else 0."""
    return SlidingTokenMajorLayer(buffers, window) if window else TokenMajorLayer(buffers)
