"""A cache of KV in blocks that sequences share, of all layers of a model.

Keys of a layer are ``[num_blocks, T, H, D]``, and so are its values: a run of blocks is a run of
tokens, in the order in which pages of respkv have them, so these are loaded and stored by plain copies.
On the CPU the memory is mapped and zero, and is taken from the machine as blocks are first
written. block_manager.py says who has which blocks; step.py runs a model over it.
"""

import mmap
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from respkv.errors import OutOfMemory
from respkv.kernels.attention import paged_decode
from respkv.kernels.block_copy import copy_blocks, whole_blocks
from respkv.kernels.paged import PagedBuffer
from respkv.kernels.paged_kv import PLAIN, PagedKV, Scoring
from respkv.paged.block_manager import BlockManager
from respkv.paged.config import PagedCacheConfig
from respkv.paged.host_attention import host_decode


@dataclass(frozen=True, slots=True)
class Run:
    """Where tokens ``first`` to ``stop`` - 1 of a sequence lie: views [stop - first, H, D], a layer each."""

    first: int
    stop: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class PagedStats:
    """What a paged cache holds now, and what happened since the start.

    blocks_free:   nobody has them, and nothing is in them.
    blocks_cached: no sequence has them; they hold prefixes and go when their room is needed.
    blocks_used:   sequences have them; blocks_shared of these are had by more than one.
    peak_used:     the most that sequences had at a time.
    bytes_used:    of blocks_used.
    tokens_found, tokens_missed: of the prompts that came, tokens that were there already or not.
    copies, evictions: of blocks.
    """

    num_blocks: int
    blocks_free: int
    blocks_cached: int
    blocks_used: int
    blocks_shared: int
    peak_used: int
    bytes_used: int
    sequences: int
    tokens_found: int
    tokens_missed: int
    copies: int
    evictions: int


class PagedAttentionCache:
    """KV of many sequences in blocks; prefixes and forks are shared.

    Not for several threads at a time. Whoever reads blocks beside the thread that runs the model
    has them held by a fork.
    Source: Kwon et al., PagedAttention, SOSP 2023, arXiv:2309.06180.
    """

    def __init__(self, config: PagedCacheConfig) -> None:
        self.config = config
        storage = _storage(config)
        self.blocks = BlockManager(
            config.num_blocks, config.block_tokens, prefix_sharing=config.prefix_sharing
        )
        self.keys: tuple[Tensor, ...] = storage[:, 0].unbind(0)
        self.values: tuple[Tensor, ...] = storage[:, 1].unbind(0)
        self._whole = whole_blocks(PagedBuffer(self.keys, self.values))
        self._written: dict[int, list[int]] = {}  # tokens of each layer, by ``append``
        self._peak_used = 0

    # Sequences

    def allocate_sequence(
        self,
        tokens: Sequence[int] | int,
        *,
        salt: Hashable = "",
        limit: int | None = None,
        share: bool = True,
    ) -> int:
        """Begin a sequence; whatever prefix of it the cache has is taken, and nothing else yet.

        tokens: the ids of the prompt; or their number, and then nothing is shared.
        salt:   what else the KV depends on, an adapter or a tenant: others never share with it.
        limit:  the most tokens to take; when not given, all but the last, whose logits take a
                forward pass. Whoever has these already says how long the prompt is.
        share:  False: nothing is taken, and nothing will be left to others.
        Returns: its id; ``computed`` says how many tokens are there already.
        Raises ValueError for no tokens, TypeError for ids that are no integers.
        """
        sequence = self.blocks.allocate(tokens, salt=salt, limit=limit, share=share)
        self._peak_used = max(self._peak_used, self._used())
        return sequence

    def length(self, sequence: int) -> int:
        """Return how many tokens are known, computed or not."""
        return self.blocks.length(sequence)

    def computed(self, sequence: int) -> int:
        """Return how many tokens have their KV here."""
        return self.blocks.computed(sequence)

    def tokens(self, sequence: int) -> tuple[int, ...] | None:
        """Return the ids that are known; None for a sequence without."""
        return self.blocks.tokens(sequence)

    def extend(self, sequence: int, tokens: Iterable[int] | int) -> None:
        """Say which tokens come next; takes no room."""
        self.blocks.extend(sequence, tokens)

    def reserve(self, sequence: int, count: int) -> None:
        """Make room for the next ``count`` tokens, which are then written where ``runs`` says.

        A block that others read is copied first, all layers. A second time does nothing.
        Raises OutOfBlocks, and nothing has changed; ValueError for more tokens than are known.
        """
        copies = self.blocks.reserve(sequence, count)
        if copies:
            pairs = torch.tensor(copies, dtype=torch.int64, device=self._whole.device)
            copy_blocks(self._whole, pairs[:, 0].contiguous(), pairs[:, 1].contiguous())
        self._peak_used = max(self._peak_used, self._used())

    def runs(self, sequence: int, first: int, stop: int) -> list[Run]:
        """Return where tokens lie, in as few pieces as there are; they have to be reserved.

        The views are of the cache's memory: load into them what is not computed yet, read from them what
        is. They are good while the sequence has its blocks.
        """
        table, size = self.blocks.blocks(sequence), self.config.block_tokens
        if not 0 <= first <= stop <= len(table) * size:
            raise ValueError(
                f"tokens {first} to {stop} of sequence {sequence} are not within the"
                f" {len(table) * size} that it has room for; reserve them first"
            )
        runs = list[Run]()
        while first < stop:
            at = low = first // size
            while (at + 1) * size < stop and table[at + 1] == table[at] + 1:
                at += 1
            end = min(stop, (at + 1) * size)
            begin = table[low] * size + first % size
            rows = slice(begin, begin + end - first)
            runs.append(Run(first, end, _rows(self.keys, rows), _rows(self.values, rows)))
            first = end
        return runs

    def commit(self, sequence: int, count: int) -> None:
        """Say that the next ``count`` tokens are written: others may take their blocks now."""
        self.blocks.commit(sequence, count)

    def fork(self, sequence: int) -> int:
        """Begin a sequence with all that this one has computed; no block is copied until one writes."""
        return self.blocks.fork(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens from ``length`` on, which is 1 or more."""
        self._written.pop(sequence, None)
        self.blocks.truncate(sequence, length)

    def free_sequence(self, sequence: int, *, keep: bool = True) -> None:
        """End a sequence. What it computed stays until the room is needed.

        keep: False: its last block, which is not full, goes at once.
        """
        self._written.pop(sequence, None)
        self.blocks.free(sequence, keep=keep)

    # The cache as a whole

    @property
    def num_free_blocks(self) -> int:
        """Return how many blocks sequences can have now, those of cached prefixes included."""
        return self.blocks.num_free_blocks

    def blocks_needed(self, sequence: int, count: int) -> int:
        """Return how many blocks ``reserve`` would take."""
        return self.blocks.blocks_needed(sequence, count)

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks so many tokens take when nothing is shared."""
        return -(-tokens // self.config.block_tokens)

    def match(self, tokens: Sequence[int], salt: Hashable = "") -> int:
        """Return how many tokens of a prompt are here."""
        return self.blocks.match(tokens, salt)

    def clear(self) -> int:
        """Forget the prefixes that no sequence has; return how many blocks that frees."""
        return self.blocks.clear()

    def stats(self) -> PagedStats:
        """Return what is here and what happened."""
        manager, counts = self.blocks, self.blocks.stats
        used = self._used()
        return PagedStats(
            num_blocks=manager.num_blocks,
            blocks_free=manager.num_free_blocks - manager.num_cached_blocks,
            blocks_cached=manager.num_cached_blocks,
            blocks_used=used,
            blocks_shared=manager.num_shared_blocks,
            peak_used=self._peak_used,
            bytes_used=used * self.config.block_bytes,
            sequences=len(manager.sequences()),
            tokens_found=counts.tokens_found,
            tokens_missed=counts.tokens_missed,
            copies=counts.copies,
            evictions=counts.evictions,
        )

    def _used(self) -> int:
        return self.blocks.num_blocks - self.blocks.num_free_blocks

    # Layer by layer, for who brings attention of his own

    def append(self, sequence: int, layer: int, key: Tensor, value: Tensor) -> None:
        """Write the next tokens of one layer; they count once the last layer has them.

        key, value: [tokens, H, D]. Of a sequence with ids these have to be known by then.
        They are converted to the cache's type.
        Raises OutOfBlocks, and ValueError for a layer, a shape or tokens that there are not; then
        nothing has changed.
        """
        if not 0 <= layer < self.config.num_layers:
            raise ValueError(f"layer {layer} is not one of {self.config.num_layers}")
        heads, dim = self.config.num_kv_heads, self.config.head_dim
        if key.dim() != 3 or key.shape[1:] != (heads, dim) or key.shape != value.shape:
            raise ValueError(
                f"key {list(key.shape)} and value {list(value.shape)} are not both"
                f" [tokens, {heads}, {dim}]"
            )
        computed = self.blocks.computed(sequence)
        written = self._written.setdefault(sequence, [computed] * self.config.num_layers)
        if min(written) != computed:  # a step or a load came in between
            written[:] = [computed] * self.config.num_layers
        first, stop = written[layer], written[layer] + key.shape[0]
        if stop > self.blocks.length(sequence) and not self.blocks.has_ids(sequence):
            self.blocks.check_room(sequence, stop - computed)
            self.blocks.extend(sequence, stop - self.blocks.length(sequence))
        self.reserve(sequence, stop - computed)
        for run in self.runs(sequence, first, stop):
            part = slice(run.first - first, run.stop - first)
            run.keys[layer].copy_(key[part])
            run.values[layer].copy_(value[part])
        written[layer] = stop
        self.commit(sequence, min(written) - computed)

    def block_tables(self, sequences: Sequence[int]) -> Tensor:
        """Return [B, blocks] int32, filled up with zeros."""
        tables = [self.blocks.blocks(each) for each in sequences]
        return table_tensor(tables, self.keys[0].device)

    def context_lens(self, sequences: Sequence[int]) -> Tensor:
        """Return [B] int32: how many tokens are computed."""
        lengths = [self.blocks.computed(each) for each in sequences]
        return torch.tensor(lengths, dtype=torch.int32, device=self.keys[0].device)

    def paged_attention(
        self,
        query: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        *,
        layer: int,
        scoring: Scoring = PLAIN,
    ) -> Tensor:
        """Attend with the newest token of each sequence to its blocks.

        query:        [B, Q, D] of the cache's type; query head q reads kv head q // (Q / H).
        block_tables: [B, blocks] int32, as ``block_tables`` returns; context_lens: [B] int32.
        Returns: [B, Q, D]; zeros for a sequence of no tokens.
        Error:   as ``kernels.attention.paged_decode``.
        Raises ValueError when shapes or types do not fit, and for a layer that there is not; on the
        CPU also for blocks that there are not and contexts longer than their tables.
        """
        if not 0 <= layer < self.config.num_layers:
            raise ValueError(f"layer {layer} is not one of {self.config.num_layers}")
        pages = PagedKV(self.keys[layer], self.values[layer], block_tables, context_lens)
        if query.is_cuda:
            return paged_decode(query, pages, scoring=scoring)
        return host_decode(query, pages, scoring=scoring)


def table_tensor(tables: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return block tables as [B, blocks] int32, filled up with zeros."""
    widest = max((len(table) for table in tables), default=0)
    rows = [[*table, *[0] * (widest - len(table))] for table in tables]
    return torch.tensor(rows, dtype=torch.int32, device=device).view(len(tables), widest)


def _rows(planes: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, ...]:
    return tuple(plane.flatten(0, 1)[rows] for plane in planes)


def _storage(config: PagedCacheConfig) -> Tensor:
    """Return [L, 2, num_blocks, T, H, D]."""
    shape = (
        config.num_layers,
        2,
        config.num_blocks,
        config.block_tokens,
        config.num_kv_heads,
        config.head_dim,
    )
    if torch.device(config.device).type != "cpu":
        return torch.empty(shape, dtype=config.dtype, device=config.device)
    try:
        memory = mmap.mmap(
            -1, prod(shape) * config.dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except OSError as error:
        raise OutOfMemory(
            f"{config.memory_bytes} bytes for blocks cannot be had: {error}"
        ) from error
    return torch.frombuffer(memory, dtype=config.dtype).view(shape)
