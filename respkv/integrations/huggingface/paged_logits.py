"""The last logits of prompts of late, so that the same prompt again needs no forward pass."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from torch import Tensor

_TOKEN_BYTES = 8  # of a tuple


class LastLogits:
    """Logits by the prompt that they follow; those used longest ago go when there are too many.

    bytes_max: of the logits and the prompts together; 0 keeps none.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._rows: OrderedDict[tuple[Hashable, tuple[int, ...]], Tensor] = OrderedDict()
        self.num_bytes = 0

    def find(self, salt: Hashable, tokens: Sequence[int]) -> Tensor | None:
        """Return the logits [V] that follow a prompt."""
        key = salt, tuple(tokens)
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def keep(self, salt: Hashable, tokens: Sequence[int], logits: Tensor) -> None:
        """Keep the logits [V] that follow a prompt; they must not be changed after that."""
        key = salt, tuple(tokens)
        before = self._rows.pop(key, None)
        if before is not None:
            self.num_bytes -= _size(key[1], before)
        self._rows[key] = logits
        self.num_bytes += _size(key[1], logits)
        while self.num_bytes > self._bytes_max:
            (_, old), row = self._rows.popitem(last=False)
            self.num_bytes -= _size(old, row)

    def clear(self) -> int:
        """Forget all; returns their bytes."""
        forgotten, self.num_bytes = self.num_bytes, 0
        self._rows.clear()
        return forgotten


def _size(tokens: tuple[int, ...], logits: Tensor) -> int:
    return _TOKEN_BYTES * len(tokens) + logits.nbytes
