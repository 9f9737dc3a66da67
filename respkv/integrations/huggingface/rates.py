"""What computing and loading cost here, learned while it happens, so that a hit is never slower.

Computing n more tokens of a prompt costs about n times what one costs in a long forward pass; the
fixed cost of the pass is due either way. Loading costs what the server expects for its tier, or what
loads of as many bytes took here, and never less than the quickest of them. Both change with the
machine's other work, so new values count for a quarter each, and a load that was refused makes the
next one look a little cheaper: a cache that was slow once is tried again.
"""

import math
from typing import Final

from respkv.integrations.huggingface.locks import ForkLock

_NEW: Final = 0.25
_FORGET: Final = 0.9
_MANY: Final = 32  # tokens of a pass whose fixed cost is not most of it


class Rates:
    """The costs of one model and one cache. Threads may share it."""

    def __init__(self) -> None:
        self._token_s: float | None = None  # of computing, in a pass of many tokens
        self._step_s: float | None = None  # of a pass of one token
        self._load_byte_s: float | None = None
        self._load_least_s = math.inf
        self._has_loaded = False
        self._lock = ForkLock()

    def computed(self, num_tokens: int, seconds: float) -> None:
        """Learn from a forward pass. Of a few tokens there is nothing to learn if more is known."""
        with self._lock:
            if num_tokens == 1:
                self._step_s = _mixed(self._step_s, seconds)
            elif num_tokens >= _MANY or self._token_s is None:
                fixed = min(self._step_s or 0.0, seconds / 2)
                self._token_s = _mixed(self._token_s, (seconds - fixed) / num_tokens)

    def loaded(self, nbytes: int, seconds: float) -> None:
        """Learn from a load; the first one is slow whatever comes, as it maps memory."""
        if nbytes:
            with self._lock:
                if not self._has_loaded:
                    self._has_loaded = True
                    return
                self._load_byte_s = _mixed(self._load_byte_s, seconds / nbytes)
                self._load_least_s = min(self._load_least_s / _FORGET, seconds)

    def compute_s(self, num_tokens: int) -> float | None:
        """Return what computing so many tokens more takes; None: nobody knows yet."""
        return None if self._token_s is None else num_tokens * self._token_s

    def is_worth(self, num_tokens: int, nbytes: int, expected_s: float) -> bool:
        """Whether to load tokens, of so many bytes.

        expected_s: what the server says; what was seen counts where it is more.
        """
        compute_s = self.compute_s(num_tokens)
        if compute_s is None:
            return True
        with self._lock:
            if self._load_byte_s is None:
                return expected_s <= compute_s
            seen_s = max(nbytes * self._load_byte_s, self._load_least_s)
            if max(expected_s, seen_s) <= compute_s:
                return True
            self._load_byte_s *= _FORGET
            self._load_least_s *= _FORGET
        return False


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else old + _NEW * (new - old)
