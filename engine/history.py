"""Why a key is not here: a bounded memory of the keys that left, for KV.EXPLAIN.

Keys are kept as their 8-byte hash, oldest forgotten first. A collision can name a wrong reason; it
can never change what is served.
"""

from collections import OrderedDict
from typing import Literal

from xxhash import xxh3_64_intdigest

Reason = Literal[
    "evicted", "quota", "expired", "deleted", "flushed", "schema", "corrupt", "lost", "replaced"
]


class History:
    """The reason why each of the last ``count_max`` keys left."""

    def __init__(self, count_max: int = 65536) -> None:
        self._count_max = count_max
        # Not a dict, which passes all that was deleted before it finds its oldest.
        self._reasons: OrderedDict[int, Reason] = OrderedDict()

    def note(self, key: bytes, reason: Reason) -> None:
        """Remember why a key left, or was refused."""
        digest = xxh3_64_intdigest(key)
        self._reasons[digest] = reason
        self._reasons.move_to_end(digest)
        if len(self._reasons) > self._count_max:
            self._reasons.popitem(last=False)

    def find(self, key: bytes) -> Reason | None:
        """Return why a key left; None when it was never here or too long ago."""
        return self._reasons.get(xxh3_64_intdigest(key))
