"""respkv for models of Hugging Face transformers: prompts whose KV is known are not computed again.

``KVCacheAdapter(model, ...).generate(...)`` does what ``model.generate`` does. ``RespKVCache`` is a
``past_key_values`` for those who call the model themselves, and ``PromptPages`` what both are made
of: a model's KV, as pages of a namespace. Nothing is imported before it is asked for.
"""

from typing import TYPE_CHECKING, Any

from respkv.errors import require

if TYPE_CHECKING:
    from respkv.integrations.huggingface.adapter import KVCacheAdapter
    from respkv.integrations.huggingface.cache_config import CacheConfig
    from respkv.integrations.huggingface.model_kv import ModelKV, UnsupportedModel
    from respkv.integrations.huggingface.pages_stats import PagesStats
    from respkv.integrations.huggingface.prefix_cache import RespKVCache
    from respkv.integrations.huggingface.prompt_pages import PromptPages

_MODULES = {
    "CacheConfig": "cache_config",
    "KVCacheAdapter": "adapter",
    "ModelKV": "model_kv",
    "PagesStats": "pages_stats",
    "PromptPages": "prompt_pages",
    "RespKVCache": "prefix_cache",
    "UnsupportedModel": "model_kv",
}

__all__ = [
    "CacheConfig",
    "KVCacheAdapter",
    "ModelKV",
    "PagesStats",
    "PromptPages",
    "RespKVCache",
    "UnsupportedModel",
]

require("respkv.integrations.huggingface", "hf", "torch", "transformers")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
