"""What attention reads: a layer's pages, which of them hold which sequence, and how scores are made."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

CODE_DTYPES: Final = (torch.int8, torch.float8_e4m3fn)
NUMBER_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class PagedKV:
    """One layer's pages, and which of them hold which sequence.

    keys, values:             [num_blocks, T, H, D], any strides with D contiguous.
    block_tables:             [B, blocks] int32: the block of tokens T * i to T * i + T - 1.
    context_lens:             [B] int32: how many tokens of a sequence are in its pages; 0 is allowed.
    key_scales, value_scales: [num_blocks, T, H] float32, any strides, when pages hold codes.

    Nothing is read beyond a sequence's tokens, or a window's: what is there need not be a number,
    and entries of the table for it need not be blocks.
    """

    keys: Tensor
    values: Tensor
    block_tables: Tensor
    context_lens: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores come from products of queries and keys.

    sm_scale: factor of the products; 1 / sqrt(D) when None.
    window:   how many keys a token sees, its own included; all when None.
    soft_cap: scores become soft_cap * tanh(score / soft_cap); no cap when None.
    Raises ValueError for a window of no key, and for a cap that is not above 0.
    """

    sm_scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} must be 1 or more, or None to see all keys")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap {self.soft_cap} must be above 0, or None for no cap")

    def scale(self, head_dim: int) -> float:
        """Return the factor of the products."""
        return head_dim**-0.5 if self.sm_scale is None else self.sm_scale


PLAIN: Final = Scoring()
