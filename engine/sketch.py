"""How often keys were used of late, in a few bytes a key: a count-min sketch that forgets.

Four rows of counters, each key has one in each row, and its count is the lowest of the four, because
others can only have added to it. Only the lowest are raised: what stands higher already counts others
as well. After ten uses for each key all counters are halved: what was popular once has to stay so.

By then so many keys have come once that a row with one place for each key that is counted would be
full of them, and say of everybody that he was used often. So a row has PLACES times as many.

Source: Cormode and Muthukrishnan, An Improved Data Stream Summary: The Count-Min Sketch, 2005; raising
only the lowest: Estan and Varghese, New Directions in Traffic Measurement and Accounting, SIGCOMM 2002; the
halving: Einziger, Friedman and Manes, TinyLFU: A Highly Efficient Cache Admission Policy, ACM
Transactions on Storage 2017, arXiv:1512.00727. Its doorkeeper is left out: it saves counters that
are bytes here.
"""

COUNT_MAX = 15
KEYS_MIN = 1024
PLACES = 4  # in a row for each key
SAMPLE = 10  # uses for each key until all are halved
_FACTORS = (
    0x9E3779B97F4A7C15,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x27D4EB2F165667C5,
)
_HALVES = bytes(number // 2 for number in range(256))


class Sketch:
    """Counts of up to COUNT_MAX by the hash of a key."""

    def __init__(self) -> None:
        self.num_keys = 0  # that it has room for
        self.width = 0  # a power of two, once something was counted
        self.num_added = 0
        self._rows: list[bytearray] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the counters."""
        return len(self._rows) * self.width

    def grow(self, num_keys: int) -> None:
        """Make room for counting so many keys. Counts stay: both halves of a row are alike then."""
        if num_keys <= self.num_keys:
            return
        self.num_keys = max(num_keys, KEYS_MIN)
        if not self.width:
            self.width = PLACES * KEYS_MIN
            self._rows = [bytearray(self.width) for _ in _FACTORS]
        while self.width < PLACES * self.num_keys:
            self.width *= 2
            self._rows = [row + row for row in self._rows]

    def add(self, name: int, count: int) -> None:
        """Count a key ``count`` times more."""
        mask = self.width - 1
        places = [(name * factor >> 24) & mask for factor in _FACTORS]
        lowest = min([row[place] for row, place in zip(self._rows, places, strict=True)])
        raised = min(lowest + count, COUNT_MAX)
        for row, place in zip(self._rows, places, strict=True):
            if row[place] < raised:
                row[place] = raised
        self.num_added += count
        if self.num_added >= SAMPLE * self.num_keys:
            self._rows = [row.translate(_HALVES) for row in self._rows]
            self.num_added //= 2

    def count(self, name: int) -> int:
        """Return how often a key was counted, or more."""
        if not self.width:
            return 0
        mask = self.width - 1
        return min(
            [
                row[(name * factor >> 24) & mask]
                for row, factor in zip(self._rows, _FACTORS, strict=True)
            ]
        )
