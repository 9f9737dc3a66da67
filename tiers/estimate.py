"""A running estimate of how long a tier takes to read.

A read costs a fixed time and a time per byte. Small reads tell of the first, large ones of the
second, each as an exponential average: what the device did lately counts, a single slow read does
not.
"""

SMALL_BYTES_MAX = 64 << 10
_SHARE = 1 / 16  # of a new reading


class Estimate:
    """latency_us: of a small read. bytes_per_s: of what one read brings beyond that."""

    def __init__(self, *, latency_us: float, bytes_per_s: float) -> None:
        self.latency_us = latency_us
        self.bytes_per_s = bytes_per_s

    def observe(self, nbytes: int, seconds: float) -> None:
        """Take one read into account."""
        if nbytes <= SMALL_BYTES_MAX:
            self.latency_us += (seconds * 1e6 - self.latency_us) * _SHARE
            return
        # A large read may be faster than the small ones lately were.
        moving_s = max(seconds - self.latency_us / 1e6, seconds / 4, 1e-7)
        self.bytes_per_s += (nbytes / moving_s - self.bytes_per_s) * _SHARE

    def load_us(self, nbytes: int) -> int:
        """Return how long a read of ``nbytes`` should take."""
        return int(self.latency_us + nbytes / self.bytes_per_s * 1e6)
