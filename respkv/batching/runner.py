"""What the model loop needs of whatever holds the model and its KV cache."""

from collections.abc import Sequence as Several
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from respkv.batching.sequence import Chunk, Sequence


@dataclass(frozen=True, slots=True)
class Admission:
    """What the cache had of a sequence when it was admitted.

    computed: of its tokens, so many need not be computed; all of them only with ``logits``.
    local:    of those, the ones that lay in the runner's own memory.
    logits:   [V] of the last token, when all tokens were there: the next token needs no step.
    lookup_s: what it took to find and load that, in seconds.
    failures: how often something cached could not be loaded, for a reason other than its absence.
    """

    computed: int = 0
    local: int = 0
    logits: Tensor | None = None
    lookup_s: float = 0.0
    failures: int = 0


class Refusal(Enum):
    """Why a sequence is not taken in now.

    NO_ROOM: there is none; who came later is not to take it away.
    SOON:    what another sequence is computing, or loading, will spare it work; others may go first.
    """

    NO_ROOM = "no room"
    SOON = "soon"


class Loading(Enum):
    """A sequence was taken in, and what is cached of it is on its way; ``arrived`` will tell."""

    LOADING = "loading"


class Room(Protocol):
    """The cache memory that sequences compete for. All calls come from one thread."""

    def begin(self, sequence: Sequence) -> Admission | Loading | Refusal:
        """Take a sequence in, with what is cached of it, or say why not now.

        There is room when its tokens and one more fit beside what the others hold. With no other
        sequence begun there always is, up to ``tokens_max``, and it is not SOON.
        """
        ...

    def arrived(self, *, wait: bool) -> Several[tuple[Sequence, Admission]]:
        """Return the sequences whose cached tokens have come, each once.

        wait: a moment for one, some milliseconds, as there is nothing to compute; others may come
              meanwhile. Only when one is LOADING.
        """
        ...

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for its first ``num_tokens`` tokens; False, and nothing changes, without."""
        ...

    def drop(self, sequence: Sequence) -> None:
        """Give its memory to others; what is computed may be kept elsewhere. It will begin again."""
        ...


class Runner(Room, Protocol):
    """A model, and the memory of its KV cache."""

    @property
    def tokens_max(self) -> int:
        """The most tokens of one sequence, prompt and answer together."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    def step(self, chunks: Several[Chunk]) -> Tensor:
        """Compute chunks of different sequences; those with a cache have room for them.

        Returns: [N, V], the logits of the last token of each chunk that is its sequence's last
        (``is_last``), in their order.
        An exception means that nothing is known of any sequence any more.
        """
        ...

    def end(self, sequence: Sequence, *, is_good: bool) -> None:
        """Let go of a sequence that has finished or is not wanted any more.

        is_good: False: what was computed may be wrong, so nothing of it may be used for others.
        """
        ...

    def clear(self) -> int:
        """Forget what is kept for later requests only; returns its bytes."""
        ...

    def close(self, *, is_good: bool) -> None:
        """Finish what is under way in the background, and let go of everything. Idempotent.

        is_good: False after a crash: of the sequences that are left nothing may be used any more.
        """
        ...
