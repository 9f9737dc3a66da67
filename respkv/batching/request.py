"""What is asked of a model, what comes back, and what can go wrong, as plain values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from operator import index
from typing import Final, Literal, TypeAlias

from respkv.errors import CacheError

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
SEED_MAX: Final = (1 << 64) - 1
NAME_BYTES_MAX: Final = 1024  # of a salt or a tenant, as the server takes it
SESSION_BYTES_MAX: Final = 256


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
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if not isinstance(value, Real | None):
                raise BadRequest(f"{name} {value!r} must be a number")
        for name, number in (("top_k", self.top_k), ("seed", self.seed)):
            if number is not None:
                _check_integer(name, number)
        if self.temperature is None or not 0 <= self.temperature < float("inf"):
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
    salt, tenant:     prompts that differ in these never share KV; 1024 bytes at most, as UTF-8.
    session:          the conversation, which tells the cache what will be used again; 1 to 256 bytes.
    Raises BadRequest for no prompt, no token to generate, and anything that is of another type or
    length: once it is submitted, nothing of a request can be what the model's thread stumbles over.
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
        if isinstance(self.tokens, str | bytes) or not hasattr(self.tokens, "__len__"):
            raise BadRequest(f"tokens must be a sequence of integers, not {self.tokens!r:.40}")
        if len(self.tokens) == 0:
            raise BadRequest("the prompt has no tokens; give at least one")
        _check_integer("max_new_tokens", self.max_new_tokens)
        if self.max_new_tokens < 1:
            raise BadRequest(f"max_new_tokens {self.max_new_tokens} must be 1 or more")
        if not isinstance(self.sampling, Sampling):
            raise BadRequest(f"sampling must be a Sampling, not {self.sampling!r:.40}")
        if not isinstance(self.stop_tokens, set | frozenset | tuple | list):
            raise BadRequest(f"stop_tokens must be a set of integers, not {self.stop_tokens!r:.40}")
        for token in self.stop_tokens:
            _check_integer("a stop token", token)
        _check_name("salt", self.salt, 0, NAME_BYTES_MAX)
        _check_name("tenant", self.tenant, 0, NAME_BYTES_MAX)
        _check_name("session", self.session, 1, SESSION_BYTES_MAX)

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


def _check_integer(name: str, value: object) -> None:
    try:
        index(value)  # type: ignore[arg-type]  # whether it is one is the question
    except TypeError:
        raise BadRequest(f"{name} {value!r:.40} must be an integer") from None


def _check_name(name: str, value: object, least: int, most: int) -> None:
    """Check a name that goes to the server as bytes."""
    if value is None:
        return
    if not isinstance(value, str | bytes):
        raise BadRequest(f"{name} {value!r:.40} must be text or bytes")
    try:
        size = len(value.encode() if isinstance(value, str) else value)
    except UnicodeEncodeError:
        raise BadRequest(f"{name} {value!r:.40} is no text that has an encoding") from None
    if not least <= size <= most:
        raise BadRequest(f"{name} has {least} to {most} bytes, not {size}")
