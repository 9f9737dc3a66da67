"""The settings of ``KVCacheAdapter``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from respkv.client import Client
from respkv.client.commands import Key
from respkv.client.sequences import ChainOptions
from respkv.client.url import DEFAULT_URL
from respkv.integrations.huggingface.prompt_pages import MATCH_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Where the KV of prompts is kept, and what is done with it.

    cache:           a URL, a ``Client``, or an embedded engine (``respkv.open_sync``).
    namespace:       after the model's fingerprint if None.
    page_tokens, codecs, ttl_ms, durability, fingerprint: as for ``PromptPages``.
    store:           whether prompts are stored; they are loaded in any case.
    store_generated: whether what was generated behind a prompt is stored, too: the next turn of a
                     conversation begins with it.
    use_logits:      whether the logits behind a prompt are stored, so that the same prompt again
                     needs no forward pass before its first token.
    never_slower:    compute where loading is expected to take longer.
    min_tokens:      shorter matches are not worth a load.
    match_timeout_s: for how long generation waits for a cache that does not answer, as for
                     ``PromptPages``.
    salt, tenant, lora, lora_path: prompts that differ in these share nothing.
    spare_bytes:     of memory are kept for the next prompt.
    """

    cache: Client | str = DEFAULT_URL
    namespace: str | None = None
    page_tokens: int | None = None
    store: bool = True
    store_generated: bool = True
    use_logits: bool = True
    never_slower: bool = True
    min_tokens: int = 1
    match_timeout_s: float = MATCH_TIMEOUT_S
    codecs: Mapping[str, str] | None = None
    ttl_ms: int | None = None
    durability: Literal["memory", "written", "durable"] | None = None
    fingerprint: bytes | None = None
    salt: Key | None = None
    tenant: Key | None = None
    lora: Key | None = None
    lora_path: Key | None = None
    spare_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("page_tokens", "min_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not self.match_timeout_s > 0:
            raise ValueError(f"match_timeout_s must be more than 0, not {self.match_timeout_s}")

    @property
    def chain(self) -> ChainOptions:
        """What is mixed into the chains of all prompts."""
        found: ChainOptions = {}
        if self.salt is not None:
            found["salt"] = self.salt
        if self.tenant is not None:
            found["tenant"] = self.tenant
        if self.lora is not None:
            found["lora"] = self.lora
        if self.lora_path is not None:
            found["lora_path"] = self.lora_path
        return found
