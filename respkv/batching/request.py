"""What is asked of a model, what comes back, and what can go wrong, as plain values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from respkv.errors import CacheError

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
SEED_MAX: Final = (1 << 64) - 1


class BadRequest(CacheError, ValueError):
    """A request that can never be served as it is; the message names the value and what is accepted."""


class GenerationFailed(CacheError):
    """No more tokens of this request will come: its logits were no numbers, or the model crashed."""


class LoopClosed(CacheError):
    """The model loop was closed, or crashed, and takes no more requests."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen from the logits, in the order and with the meaning of ``generate``.

    temperature: 0 takes the likeliest token; else the logits are divided by it.
    top_k:       of the likeliest tokens only so many; all when None.
    top_p:       of the likeliest tokens only as many as together reach this probability.
    seed:        of the request's own random numbers; from the system when None. With one seed the
                 tokens are the same whatever else the model computes.
    Raises BadRequest for values outside these.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise BadRequest(f"temperature {self.temperature} must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise BadRequest(f"top_k {self.top_k} must be 1 or more, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadRequest(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed <= SEED_MAX:
            raise BadRequest(f"seed {self.seed} must be from 0 to 2**64 - 1")


GREEDY: Final = Sampling()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt, and how to go on from it.

    tokens:           the prompt's token ids, at least one.
    max_new_tokens:   generation ends after so many.
    stop_tokens:      generation ends with the first of these, which is part of the answer.
    use_cache:        False recomputes everything for every token: what a model does without a KV
                      cache, to compare with. Nothing is then looked up or stored either.
    use_prefix_cache: False neither looks up, nor shares, nor stores anything.
    salt, tenant:     prompts that differ in these never share KV.
    session:          the conversation, which tells the cache what will be used again.
    Raises BadRequest when there is no prompt or no token to generate.
    """

    tokens: Sequence[int]
    max_new_tokens: int = 16
    sampling: Sampling = GREEDY
    stop_tokens: frozenset[int] = field(default=frozenset())
    use_cache: bool = True
    use_prefix_cache: bool = True
    salt: str | bytes | None = None
    tenant: str | bytes | None = None
    session: str | bytes | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) == 0:
            raise BadRequest("the prompt has no tokens; give at least one")
        if self.max_new_tokens < 1:
            raise BadRequest(f"max_new_tokens {self.max_new_tokens} must be 1 or more")

    @property
    def shares(self) -> bool:
        """Whether KV of earlier requests may be used, and what is computed be kept for later ones."""
        return self.use_cache and self.use_prefix_cache


@dataclass(frozen=True, slots=True)
class Timings:
    """What a request took, in seconds, and what it was spared.

    queue_s:             from ``submit`` to its first admission.
    cache_lookup_s:      finding and loading what is cached of it.
    ttft_s:              from ``submit`` to the first token; 0 when there was none.
    decode_s:            from the first token to the last.
    total_s:             from ``submit`` to the end.
    prefix_tokens_saved: tokens of the prompt that were not computed.
    local_tokens:        of those, the ones that lay in the model's own blocks.
    preemptions:         how often it had to make room for others, to go on later.
    """

    queue_s: float
    cache_lookup_s: float
    ttft_s: float
    decode_s: float
    total_s: float
    prefix_tokens_saved: int
    local_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of an answer, as soon as it is known.

    token:         None only in the last event of a request that was cancelled.
    finish_reason: set in the last event, and so are ``timings``.
    """

    index: int
    token: int | None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. tokens: without the prompt; those so far if it was cancelled."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
