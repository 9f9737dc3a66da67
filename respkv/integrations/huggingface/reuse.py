"""What the adapter reused: of one call, and since the beginning."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Reuse:
    """One call of generate.

    prompt_tokens:  of all prompts, padding left out. stored_tokens: of them, those that were stored.
    reused_tokens:  those that were not computed.
    is_full_hit:    the first token came without a forward pass.
    load_s:         seconds that loading took; the adapter loads when keys and values are needed.
    reason:         why the cache was not used at all; empty when it was.
    """

    prompt_tokens: int = 0
    stored_tokens: int = 0
    reused_tokens: int = 0
    is_full_hit: bool = False
    load_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AdapterStats:
    """All calls of generate.

    calls: of them hits reused at least one token, full_hits computed nothing before the first one,
    and uncached could not use the cache. prompt_tokens, reused_tokens: of all but the uncached.
    """

    calls: int = 0
    hits: int = 0
    full_hits: int = 0
    uncached: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    load_s: float = 0.0

    @property
    def token_hit_rate(self) -> float:
        """The part of the prompts' tokens that was not computed."""
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def plus(self, one: Reuse) -> "AdapterStats":
        """Return these with one more call."""
        return replace(
            self,
            calls=self.calls + 1,
            hits=self.hits + (one.reused_tokens > 0),
            full_hits=self.full_hits + one.is_full_hit,
            uncached=self.uncached + bool(one.reason),
            prompt_tokens=self.prompt_tokens + one.prompt_tokens,
            reused_tokens=self.reused_tokens + one.reused_tokens,
            load_s=self.load_s + one.load_s,
        )
