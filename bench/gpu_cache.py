"""The KV that the benchmarks of a GPU work on: a worker's paged caches, filled like a model's.

One prompt's keys and values, with outlier channels and heavy tails, are made as the tests make them
and repeated: no kernel's time depends on numbers, but for the escapes of ``xs``, which are as many.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import torch
from torch import Tensor

from respkv.kernels.layout import Side
from respkv.kernels.paged import PagedBuffer
from tests.kernels import data

Order = Literal["NHD", "HND"]
BLOCK_TOKENS: Final = 16
MADE_TOKENS: Final = 2048
DTYPE: Final = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    layers, heads, dim: of the KV. page_tokens, num_pages: of the codecs' rows.
    copy_bytes:  what the device copy reads, and writes.
    sequences, context: of a batch that decodes; ``long_`` of the one that is split.
    query_heads, new_tokens: of attention, and of its prefill. prompts: sequences of a prefill.
    moved_pages: evicted and brought back.
    """

    layers: int = 32
    heads: int = 8
    dim: int = 128
    page_tokens: int = 256
    num_pages: int = 64
    copy_bytes: int = 2 << 30
    sequences: int = 32
    context: int = 4096
    long_sequences: int = 4
    long_context: int = 32768
    query_heads: int = 32
    prompts: int = 4
    new_tokens: int = 512
    moved_pages: int = 32

    @property
    def tokens(self) -> int:
        """Tokens of the codecs' rows."""
        return self.page_tokens * self.num_pages

    @property
    def side_bytes(self) -> int:
        """Bytes of the keys of the codecs' rows, or of the values."""
        return self.tokens * self.layers * self.heads * self.dim * DTYPE.itemsize


QUICK: Final = Sizes(
    layers=2,
    heads=2,
    dim=32,
    page_tokens=32,
    num_pages=2,
    copy_bytes=1 << 16,
    sequences=2,
    context=128,
    long_sequences=1,
    long_context=256,
    query_heads=4,
    prompts=2,
    new_tokens=16,
    moved_pages=2,
)


@dataclass(frozen=True)
class Caches:
    """The caches of one run, on one device, each made when it is first asked for."""

    sizes: Sizes
    device: torch.device

    @cached_property
    def nhd(self) -> PagedBuffer:
        """Token before head."""
        return PagedBuffer.from_nhd(self._layers("NHD"))

    @cached_property
    def hnd(self) -> PagedBuffer:
        """Head before token."""
        return PagedBuffer.from_hnd(self._layers("HND"))

    @cached_property
    def slots(self) -> Tensor:
        """Where the tokens are, in blocks in no order."""
        blocks = self.sizes.tokens // BLOCK_TOKENS
        order = torch.randperm(blocks, generator=data.seeded(0))
        slots = order[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)
        return slots.flatten().to(self.device)

    def cache(self, order: Order) -> PagedBuffer:
        """Return the cache of an order."""
        return self.nhd if order == "NHD" else self.hnd

    def planes(self, side: Side) -> Tensor:
        """Return all planes of one side, [P * L, T, H, D] contiguous."""
        return self._keys if side == "key" else self._values

    @cached_property
    def _keys(self) -> Tensor:
        return self._planes("key")

    @cached_property
    def _values(self) -> Tensor:
        return self._planes("value")

    def _planes(self, side: Side) -> Tensor:
        shape = self.sizes
        prompt = torch.unflatten(self._prompt(side), 0, (-1, shape.page_tokens))
        count = -(-shape.num_pages * shape.layers // prompt.shape[0])
        return prompt.repeat(count, 1, 1, 1)[: shape.num_pages * shape.layers]

    def _layers(self, order: Order) -> list[Tensor]:
        shape = self.sizes
        sides = torch.stack([self._prompt("key"), self._prompt("value")])
        repeats = -(-shape.tokens // sides.shape[1])
        tokens = sides.repeat(1, repeats, 1, 1)[:, : shape.tokens]
        kv = torch.unflatten(tokens, 1, (-1, BLOCK_TOKENS))
        if order == "HND":
            kv = kv.transpose(2, 3)
        return [kv.clone(memory_format=torch.contiguous_format) for _ in range(shape.layers)]

    def _prompt(self, side: Side) -> Tensor:
        shape = self.sizes
        generate = data.keys if side == "key" else data.values
        tokens = max(MADE_TOKENS // shape.page_tokens, 1) * shape.page_tokens
        tokens = min(tokens, shape.tokens)
        return generate(tokens, shape.heads, shape.dim, 1).to(self.device)


def copy_of(nbytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what a device copy reads, and where it writes."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    return source, torch.empty_like(source)
