"""What a paged cache looks like, and how large it is."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class PagedCacheConfig:
    """The shape of a paged cache: one shape for all layers of a model.

    num_blocks:     how many blocks there are; each is of ``block_tokens`` tokens of all layers.
    block_tokens:   16 suits the kernels, and pages of respkv of as many tokens or a multiple.
    prefix_sharing: whether sequences share what they begin with. Forks share in any case.
    Raises ValueError when a number is none.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_blocks: int
    block_tokens: int = 16
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    prefix_sharing: bool = True

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "num_blocks", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")

    def with_blocks(self, num_blocks: int) -> "PagedCacheConfig":
        """Return a cache of the same shape with so many blocks."""
        return replace(self, num_blocks=num_blocks)

    def with_bytes(self, memory_bytes: int) -> "PagedCacheConfig":
        """Return one of as many blocks as fit. Raises ValueError when not one does."""
        if memory_bytes < self.block_bytes:
            raise ValueError(f"{memory_bytes} bytes do not hold one block of {self.block_bytes}")
        return self.with_blocks(memory_bytes // self.block_bytes)

    @property
    def token_bytes(self) -> int:
        """Return the bytes of a token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Return the bytes of a block."""
        return self.token_bytes * self.block_tokens

    @property
    def memory_bytes(self) -> int:
        """Return the bytes of all blocks."""
        return self.block_bytes * self.num_blocks
