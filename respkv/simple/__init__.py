"""Tensors under names, the simplest way to have a KV cache: ``SimpleKVCache``."""

from respkv.errors import required

with required("respkv.simple", "torch", "torch"):
    from respkv.simple.cache import SimpleKVCache

__all__ = ["SimpleKVCache"]
