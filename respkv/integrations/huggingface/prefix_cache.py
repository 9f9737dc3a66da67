"""A Cache of transformers that begins with what is stored of its prompts.

``RespKVCache`` is for ``model.generate(..., past_key_values=cache)`` and for those who call the model
themselves: it has loaded when it is made. ``PrefixCache``, what it is made of, holds the prompts of a
batch, and knows how long it is before anything is loaded, so that the adapter can load at the last
moment, or never where the first token needs no keys and values.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer

from respkv.chain import TOKEN_BYTES
from respkv.client import SequenceMatch
from respkv.client.sequences import ChainOptions, Tokens, token_bytes
from respkv.integrations.huggingface.layers import TokenMajorLayer, layer_for
from respkv.integrations.huggingface.model_kv import ModelKV, WeightsNote, read_model
from respkv.integrations.huggingface.page_copies import KVPair
from respkv.integrations.huggingface.prompt_pages import NO_MATCH, PromptPages

GROWTH_TOKENS = 64  # room behind a prompt, when nobody said how much will be generated


@dataclass(slots=True)
class Row:
    """One prompt of a batch: its tokens as int32, and the columns of padding in front of it."""

    tokens: bytes
    padding: int = 0
    match: SequenceMatch = NO_MATCH

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return len(self.tokens) // TOKEN_BYTES


class PrefixCache(Cache):
    """The keys and values of a batch of prompts that end in the same column.

    rows:    the prompts. columns: padding and tokens of each of them.
    room:    tokens that will be generated behind them, as far as is known.
    chain:   salt, tenant, ... of all prompts.
    """

    def __init__(
        self,
        pages: PromptPages,
        kv: ModelKV,
        rows: Sequence[Row],
        *,
        room: int = GROWTH_TOKENS,
        chain: ChainOptions | None = None,
    ) -> None:
        self.pages = pages
        self.kv = kv
        self.rows = list(rows)
        self.columns = self.rows[0].padding + self.rows[0].num_tokens
        self.chain: ChainOptions = chain or {}
        self._room = room
        kept = {layer.index: layer for layer in kv.layers}
        layers: list[Any] = []
        self.kv_layers: list[TokenMajorLayer] = []
        for index in range(kv.num_layers):
            if index not in kept:
                layers.append(DummyLayer())  # type: ignore[no-untyped-call]
                continue
            made = layer_for(kept[index].window, pages.buffers)
            self.kv_layers.append(made)
            layers.append(made)
        super().__init__(layers=layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a cache with keys and values of its own; whence they come is shared."""
        twin = copy.copy(self)
        twin.layers = copy.deepcopy(self.layers, memo)
        twin.kv_layers = [each for each in twin.layers if isinstance(each, TokenMajorLayer)]
        return twin

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Go through keys, values and windows, as those of a ``DynamicCache`` are gone through."""
        for layer in self.layers:
            window = getattr(layer, "_sliding_window_tensor", None)
            yield getattr(layer, "keys", None), getattr(layer, "values", None), window

    @property
    def length(self) -> int:
        """Columns that are there, or will be once they are needed."""
        return self.kv_layers[0].length

    @property
    def base(self) -> int:
        """The first column that is kept: those before it are outside all windows."""
        return self.kv_layers[0].base

    @property
    def is_loaded(self) -> bool:
        """Whether keys and values of its length are there."""
        return not self.length or self.kv_layers[0].memory is not None

    def set_length(self, length: int) -> None:
        """Say how many columns there are, or will be."""
        for layer in self.kv_layers:
            layer.set_length(length)

    def match(self, *, logits: bool = False) -> None:
        """Ask what is stored of each prompt; logits: of the ends of those that are there, too."""
        known: dict[bytes, SequenceMatch] = {}
        for row in self.rows:
            if row.tokens not in known:
                known[row.tokens] = self.pages.match(row.tokens, logits=logits, **self.chain)
            row.match = known[row.tokens]

    def load(self, stops: Sequence[int]) -> list[int]:
        """Make memory, and copy each prompt's tokens before its stop into it.

        Returns: for each prompt how many are there. Lengths stay as they are.
        """
        memory, base = self._make_memory(max(stops))
        ends: list[int] = []
        for number, (row, stop) in enumerate(zip(self.rows, stops, strict=True)):
            if row.padding:
                for layer in memory:
                    layer[:, number, : row.padding].zero_()  # masked, but no NaN may be there
            twin = self._twin(number, stops)
            if twin is not None and ends[twin] == stop:
                for layer in memory:
                    layer[:, number, : row.padding + stop].copy_(
                        layer[:, twin, : row.padding + stop]
                    )
                ends.append(stop)
                continue
            into: list[KVPair] = []
            for layer in memory:
                part = layer[:, number, row.padding :]
                into.append((part[0], part[1]))
            end = base
            if stop > base:
                end = self.pages.load(
                    row.tokens, into, first=base, stop=stop, match=row.match, **self.chain
                )
            if base and end < stop:  # a part of the windows is of no use
                return self._load_nothing(stop)
            ends.append(end if end > base else 0)
        for kept, tensor in zip(self.kv_layers, memory, strict=True):
            kept.adopt(tensor, kept.length, base)
        return ends

    def store(
        self, row: int, tokens: Tokens, *, line: int | None = None, logits: Tensor | None = None
    ) -> bool:
        """Store in the background what the cache has of some tokens.

        row:    of the prompts, with which the tokens begin.
        line:   of the batch, where that has other rows than there are prompts.
        logits: [V] that follow the last token.
        Returns: False when too much waits already.
        """
        data = token_bytes(tokens)
        prompt = self.rows[row]
        wanted = len(data) // TOKEN_BYTES
        count = min(wanted, self.length - prompt.padding)
        if self.kv.text_max:
            count = min(count, self.kv.text_max - 1)  # keys behind are those of longer texts
        if count < wanted:
            logits = None  # they follow a token that is not stored
        data = data[: count * TOKEN_BYTES]
        is_known = prompt.match.tokens >= count
        if is_known or self.kv_layers[0].memory is None:
            if logits is None or prompt.match.has_logits:
                return True
            return self.pages.store(data, None, logits=logits, **self.chain)
        line = row if line is None else line
        first = self.base
        start, stop = prompt.padding + first, prompt.padding + count
        kv = [layer.kv_of(line, start, stop) for layer in self.kv_layers]
        return self.pages.store(data, kv, first=first, logits=logits, **self.chain)

    def _load_nothing(self, stop: int) -> list[int]:
        """Make memory for a prompt that is to be computed from its beginning."""
        memory, _ = self._make_memory(stop, windows=False)
        for layer, tensor in zip(self.kv_layers, memory, strict=True):
            layer.adopt(tensor, layer.length)
        return [0]

    def _twin(self, number: int, stops: Sequence[int]) -> int | None:
        """Return an earlier row with the same prompt, of which as much is wanted."""
        row = self.rows[number]
        for index in range(number):
            if self.rows[index].tokens == row.tokens and stops[index] == stops[number]:
                return index
        return None

    def _make_memory(self, stop: int, *, windows: bool = True) -> tuple[list[Tensor], int]:
        """Return ``[2, B, room, H, D]`` for each layer, and the column that it begins with.

        windows: leave out what is outside the windows of all layers.
        """
        page, base = self.pages.page_tokens, 0
        window = self.kv.window_max if windows else 0
        if window and len(self.rows) == 1 and not self.rows[0].padding:
            base = max(0, stop - window + 1) // page * page
        columns = max(self.columns, self.length) - base + self._room
        batch, heads, dim = len(self.rows), self.kv.heads, self.kv.dim
        devices = [layer.device for layer in self.kv.layers]
        if len(set(devices)) == 1:
            shape = (len(devices), 2, batch, columns, heads, dim)
            whole = self.pages.buffers.empty(shape, self.kv.dtype, devices[0])
            return list(whole), base
        part = (2, batch, columns, heads, dim)
        return [self.pages.buffers.empty(part, self.kv.dtype, each) for each in devices], base


class RespKVCache(PrefixCache):
    """The cache of one prompt, with its longest stored prefix in it.

    At least one token is left to compute: that gives the logits of the next one. What was computed is
    stored by ``save``, and at the latest when the cache is dropped, closed, or left as a context.
    What is computed with it has to be this very prompt, without padding, by the model in eval mode:
    others will be given it. It is empty, and stores nothing, when the model's weights have changed
    since the pages were made or it is in training mode, and for prompts that are too long for one
    kind of rope (``text_max``); what autocast had a part in is not stored. A copy (``deepcopy``) has
    keys and values of its own, and stores when ``save`` is called.

    tokens: the prompt, as ``model.generate`` gets it in ``input_ids`` besides.
    model:  the one of ``pages`` if None.
    limit:  tokens that are loaded at most.
    room:   tokens that will be generated, as far as is known.
    store:  whether the prompt is stored.
    chain:  salt, tenant, lora, ... of ``Client.seq.match``.
    Raises: ValueError for a prompt that is empty; UnsupportedModel.
    """

    def __init__(
        self,
        pages: PromptPages,
        tokens: Tokens,
        *,
        model: PreTrainedModel | None = None,
        limit: int | None = None,
        room: int = GROWTH_TOKENS,
        store: bool = True,
        **chain: Unpack[ChainOptions],
    ) -> None:
        kv = pages.model_kv if model is None else read_model(model)
        if kv is None:
            raise TypeError("these pages were made without a model; give it here")
        row = Row(token_bytes(tokens))
        if not row.num_tokens:
            raise ValueError("a prompt has at least 1 token")
        super().__init__(pages, kv, [row], room=room, chain=chain)
        is_short = not kv.text_max or row.num_tokens < kv.text_max
        self._note = None if model is None else WeightsNote(model)
        self._is_usable = is_short and self._has_its_weights
        self._is_stored = not (store and self._is_usable)
        self.loaded_tokens = 0
        if not self._is_usable:
            return
        self.match()
        self._load(min(row.match.tokens, row.num_tokens - 1, limit or row.num_tokens))

    def save(self, tokens: Tokens = None, *, logits: Tensor | None = None) -> bool:
        """Store what was computed, in the background.

        tokens: the prompt and what was generated behind it, as far as it shall be stored; the
                prompt alone if None.
        logits: [V] that follow the last of these tokens.
        Returns: False when too much waits already, and for a prompt whose keys are not to be mixed
                 with those that are stored.
        """
        self._is_stored = True
        return (
            self._is_usable
            and self._has_its_weights
            and self.store(0, self.rows[0].tokens if tokens is None else tokens, logits=logits)
        )

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of the next tokens, as ``Cache.update`` does."""
        if torch.is_autocast_enabled(self.kv.layers[0].device.type):
            self._is_usable = False  # they are less precise than the weights say
        return super().update(*args, **kwargs)

    def activate_past_recording(self) -> None:
        """Forget what was loaded, if nothing has been computed behind it.

        Assisted decoding calls this before its first step, in which it feeds the whole prompt to
        the model whatever the cache has. The adapter can do better.
        """
        if self.loaded_tokens and self.length == self.loaded_tokens:
            self.loaded_tokens = 0
            self.reset()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Store the prompt, unless that was done."""
        if not self._is_stored and self.length >= self.columns:
            self.save()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a cache with keys and values of its own, which stores when it is told to."""
        twin = super().__deepcopy__(memo)
        twin._is_stored = True
        return twin

    def __enter__(self) -> "RespKVCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_is_stored") and not self._is_stored:
            self.close()

    @property
    def _has_its_weights(self) -> bool:
        return self.pages.has_its_weights and (self._note is None or self._note.is_right)

    def _load(self, stop: int) -> None:
        if stop <= 0:
            return
        (end,) = self.load([stop])
        if not end:
            self.reset()  # type: ignore[no-untyped-call]
            return
        self.set_length(end)
        self.loaded_tokens = end


def as_rows(input_ids: Tensor, mask: Tensor | None) -> list[Row] | None:
    """Return the prompts of a batch; None when padding stands elsewhere than in front.

    input_ids: [B, columns]. mask: [B, columns], 0 where padding is, and 1 elsewhere: other numbers
    would mean other positions, and count as padding elsewhere.
    """
    # As lists: behind a long forward pass, each operation of torch took longer than all of this.
    ids: list[list[int]] = input_ids.tolist()
    if mask is None:
        return [Row(token_bytes(row)) for row in ids]
    rows = []
    given: list[list[float]] = mask.tolist()
    for row, marks in zip(ids, given, strict=True):
        padding = marks.index(1) if 1 in marks else len(marks)
        if not 0 < len(row) - padding == marks.count(1) or marks.count(0) != padding:
            return None
        rows.append(Row(token_bytes(row[padding:]), padding))
    return rows
