"""A model that is ready to be asked, and what its cache has done."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from respkv.batching.model_loop import ModelLoop
from respkv.client import Client
from respkv.errors import CacheError
from respkv.gateway.outputs import CacheStats
from respkv.gateway.tokenizer import TextCoder


class Pages(Protocol):
    """What is asked of the model's pages in the store; PromptPages is one."""

    namespace: str

    def clear(self) -> int:
        """Forget them all; returns how many there were. Raises CacheError."""
        ...


@dataclass(frozen=True, slots=True)
class Local:
    """What the runner keeps in this process for later requests: blocks, their bytes, and evictions so far."""

    blocks: int = 0
    size: int = 0
    evictions: int = 0


@dataclass(slots=True, kw_only=True)
class Model:
    """One model, behind its loop.

    store, pages: the cache behind the model, and its pages there; both or neither.
    local:        asks the runner what it keeps; from any thread.
    close_store:  lets go of pages and store, after the loop is closed.
    """

    name: str
    coder: TextCoder
    loop: ModelLoop
    stop_tokens: frozenset[int]
    store: Client | None = None
    pages: Pages | None = None
    local: Callable[[], Local] = Local
    close_store: Callable[[], None] = lambda: None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.loop.runner.vocab_size

    @property
    def tokens_max(self) -> int:
        """The most tokens of one sequence, prompt and answer together."""
        return self.loop.runner.tokens_max

    def stats(self) -> CacheStats:
        """Ask everyone what the cache has done; waits for the store, so not in the event loop."""
        loop, local, store = self.loop.stats(), self.local(), self._store_counts()
        asked = loop.prefix_hits + loop.prefix_misses
        return CacheStats(
            cache_size=local.blocks + store.get("pages", 0),
            hits=loop.prefix_hits,
            misses=loop.prefix_misses,
            hit_rate=loop.prefix_hits / asked if asked else 0.0,
            total_requests=loop.submitted,
            evictions_lru=local.evictions + store.get("evicted", 0),
            evictions_ttl=store.get("expired", 0),
            cached_tokens_reused=loop.prefix_tokens_saved,
            local_tokens_reused=loop.local_tokens_saved,
            prompt_tokens=loop.prompt_tokens,
            prompt_tokens_computed=loop.prompt_tokens_computed,
            tokens_generated=loop.tokens_generated,
            running=loop.running,
            waiting=loop.waiting,
            rejected=loop.rejected,
            local_blocks=local.blocks,
            local_bytes=local.size,
            store_reachable=bool(store),
            store_pages=store.get("pages", 0),
            store_bytes=store.get("bytes", 0),
            load_errors=loop.load_errors,
        )

    def clear(self) -> tuple[int, int]:
        """Forget what no request uses now; returns bytes freed here and pages forgotten in the store.

        Waits for a step of the model and for the store. Raises CacheError.
        """
        freed = self.loop.clear()
        return freed, self.pages.clear() if self.pages is not None else 0

    def close(self, drain_s: float) -> None:
        """Let what is in flight finish for so long, then let go of everything. Waits for it."""
        self.loop.close(drain_s)
        self.close_store()

    def _store_counts(self) -> dict[str, int]:
        """Return the store's counts; nothing while it cannot be asked."""
        if self.store is None or self.pages is None:
            return {}
        try:
            info = self.store.info()
            held = self.store.quota(self.pages.namespace)
        except CacheError:
            return {}
        return {
            "pages": held["pages"],
            "bytes": held["bytes"],
            "evicted": int(info["evicted_keys"]),
            "expired": int(info["expired_keys"]),
        }
