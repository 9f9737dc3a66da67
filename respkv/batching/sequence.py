"""One request on its way through the model: what is known of it, and how far it is computed."""

from dataclasses import dataclass, field
from operator import index

from respkv.batching.request import GenerationRequest


@dataclass(slots=True, weakref_slot=True, eq=False)
class Sequence:
    """A request's tokens, the generated ones included, and how many have their KV in the cache.

    id:       unique among the sequences of a loop.
    computed: of ``tokens``, the first so many are in the runner's cache. Without ``use_cache`` it
              stays 0.
    A sequence that waits to be computed has tokens beyond ``computed``; the step that computes the
    last of them yields the logits of the next one.
    """

    request: GenerationRequest
    id: int = 0
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    computed: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(map(index, self.request.tokens))
        self.num_prompt = len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Return how many tokens have been chosen so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def pending(self) -> int:
        """Return how many tokens have yet to be computed."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some tokens of a sequence that a step computes: tokens[start:stop].

    is_last: nothing is left after it, so the logits of its last token are wanted.
    """

    sequence: Sequence
    start: int
    stop: int
    is_last: bool

    @property
    def tokens(self) -> list[int]:
        """Return the tokens to compute."""
        return self.sequence.tokens[self.start : self.stop]
