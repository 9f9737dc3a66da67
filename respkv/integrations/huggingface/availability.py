"""Whether it is worth asking a cache that failed: a worker must not wait for one that is away."""

import logging
import time
from typing import Final

from respkv.errors import CacheError, ConfigError, ConnectionLost, ServerError, TimedOut
from respkv.integrations.huggingface.locks import ForkLock

logger = logging.getLogger(__name__)

PAUSE_S: Final = 1.0
PAUSE_MAX_S: Final = 60.0
# A server that hangs costs each question a client's timeout: it is asked so much less often.
PAUSE_PER_S: Final = 10.0
PAUSE_OF_HANG_MAX_S: Final = 600.0


class Availability:
    """Errors, counted; after one that a dead server gives, nobody asks for a while.

    errors: how many there were. last_error: its text. refused: why the namespace is none of ours,
    which time does not change.
    """

    def __init__(self) -> None:
        self.errors = 0
        self.last_error = ""
        self.refused = ""
        self._last_kind = "", ""
        self._retry_at = 0.0
        self._pause_s = PAUSE_S
        self._lock = ForkLock()

    @property
    def is_open(self) -> bool:
        """Whether to ask."""
        return not self.refused and time.monotonic() >= self._retry_at

    def failed(self, what: str, error: CacheError, seconds: float = 0.0) -> None:
        """Count an error; it is logged when it is of another kind than the last one.

        seconds: that were spent on waiting for it.
        """
        text = f"{what}: {error}"
        with self._lock:
            self.errors += 1
            # Not by its text: that of a full cache has numbers in it, which differ each time.
            kind = what, error.word if isinstance(error, ServerError) else type(error).__name__
            is_new, self.last_error, self._last_kind = kind != self._last_kind, text, kind
            if isinstance(error, ConnectionLost | TimedOut):
                hang_s = min(PAUSE_PER_S * seconds, PAUSE_OF_HANG_MAX_S)
                self._retry_at = time.monotonic() + max(self._pause_s, hang_s)
                self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        if is_new:
            logger.warning("%s; generation goes on without the cache", text)

    def refuse(self, error: CacheError) -> None:
        """Note that the namespace holds the KV of something else."""
        with self._lock:
            self.errors += 1
            self.refused = self.last_error = str(error)
        logger.error("the cache is not used: %s", error)

    def succeeded(self) -> None:
        """Note an answer."""
        self._pause_s = PAUSE_S


def is_schema_refusal(error: CacheError) -> bool:
    """Whether a schema was declared that another one stands against."""
    return isinstance(error, ServerError) and error.word == "KVSCHEMA"


def is_final(error: CacheError) -> bool:
    """Whether a schema was refused for what it says, and will be again."""
    words = ("ERR", "KVSCHEMA", "NOAUTH", "NOPERM", "WRONGPASS")
    return isinstance(error, ServerError) and error.word in words


def is_no_shared_memory(error: CacheError) -> bool:
    """Whether a lease failed because there is no memory to share, now and for ever."""
    if isinstance(error, ConfigError):
        return True
    return isinstance(error, ServerError) and (
        "shared memory" in error.message or "unknown command" in error.message
    )
