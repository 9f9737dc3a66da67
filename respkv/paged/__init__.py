"""A paged KV cache for one model's sequences: blocks, shared by prefixes and forks."""

from respkv.errors import required

with required("respkv.paged", "torch", "torch"):
    from respkv.paged.block_manager import BlockManager
    from respkv.paged.block_table import BlockStats, OutOfBlocks
    from respkv.paged.cache import PagedAttentionCache, PagedStats, Run
    from respkv.paged.config import PagedCacheConfig
    from respkv.paged.step import Chunk, PagedStep

__all__ = [
    "BlockManager",
    "BlockStats",
    "Chunk",
    "OutOfBlocks",
    "PagedAttentionCache",
    "PagedCacheConfig",
    "PagedStats",
    "PagedStep",
    "Run",
]
