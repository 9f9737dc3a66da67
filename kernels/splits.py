"""Split-KV decoding: among how many programs a sequence is split, and where they leave their parts."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

SPLIT_TOKENS_MIN: Final = 256  # a split of fewer costs more to merge than it saves
SPLITS_MAX: Final = 256
PROGRAMS_PER_SM: Final = 2  # of the decode kernel; see decode_triton.decode_tile


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Where splits of a sequence leave their parts: made once, also for captured graphs.

    partial: [B, Q, num_splits, D] float32. lse: [B, Q, num_splits] float32. Contiguous; need not be
    cleared. One launch at a time may use them.
    """

    partial: Tensor
    lse: Tensor

    @property
    def num_splits(self) -> int:
        """Programs that share a sequence and kv head."""
        return self.lse.shape[2]


def num_splits(*, programs: int, context_max: int, sm_count: int) -> int:
    """Choose among how many programs to split each sequence.

    programs:    without splits: sequences times kv heads.
    context_max: tokens of the longest sequence that will come.
    Returns:     the fewest splits whose last wave of programs leaves the GPU at most 15 % less busy
                 than the best number of splits does.
    Source:      the rule of FlashAttention's decoding (Dao et al., Flash-Decoding, 2023).
    """
    most = max(1, min(SPLITS_MAX, context_max // SPLIT_TOKENS_MIN))
    slots = sm_count * PROGRAMS_PER_SM

    def busy(splits: int) -> float:
        waves = max(1, programs) * splits / slots
        return waves / -(-max(1, programs) * splits // slots)

    best = max(busy(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if busy(splits) >= 0.85 * best)


def decode_workspace(
    batch: int, query_heads: int, head_dim: int, splits: int, device: torch.device
) -> DecodeWorkspace:
    """Make a workspace for so many sequences and splits."""
    sizes = (batch, query_heads, splits)
    return DecodeWorkspace(
        partial=torch.empty((*sizes, head_dim), dtype=torch.float32, device=device),
        lse=torch.empty(sizes, dtype=torch.float32, device=device),
    )
