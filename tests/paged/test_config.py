"""The size of a paged cache, from bytes or from blocks."""

import pytest
import torch

from respkv.paged import PagedCacheConfig


def test_a_budget_holds_as_many_blocks_as_fit() -> None:
    config = PagedCacheConfig(2, 3, 8, 1, block_tokens=4, dtype=torch.bfloat16)
    assert (config.token_bytes, config.block_bytes) == (2 * 2 * 3 * 8 * 2, 4 * 192)
    assert config.with_bytes(3 * 768 + 767).num_blocks == 3
    assert config.with_blocks(5).memory_bytes == 5 * 768


def test_sizes_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks must be 1 or more, not 0"):
        PagedCacheConfig(1, 1, 1, 0)
    with pytest.raises(ValueError, match="7 bytes do not hold one block of 128"):
        PagedCacheConfig(1, 1, 1, 1).with_bytes(7)
