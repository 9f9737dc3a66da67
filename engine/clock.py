"""The two clocks of the engine, read once per turn of the event loop and passed in as values.

Leases and idle times follow the monotonic clock, so that a clock set wrong never lapses them all at
once. TTLs follow the wall clock, as Redis's do, because EXPIREAT names a wall-clock time.
"""

from time import monotonic, time_ns


class Clock:
    """``now``: monotonic seconds. ``wall_ms``: milliseconds since the epoch."""

    __slots__ = ("now", "wall_ms")

    def __init__(self) -> None:
        self.now = 0.0
        self.wall_ms = 0
        self.refresh()

    def refresh(self) -> None:
        """Read both clocks."""
        self.now = monotonic()
        self.wall_ms = time_ns() // 1_000_000
