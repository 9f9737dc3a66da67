"""What the engine counts. Plain integers: the hot path adds to them directly."""


class Stats:
    """Counters since start or since the last ``reset``; all but the ``_bytes`` ones are events."""

    __slots__ = (
        "bytes_in",
        "bytes_landed",
        "bytes_out",
        "bytes_sent_in_place",
        "bytes_staged",
        "checks",
        "commits",
        "deleted",
        "demoted",
        "evicted",
        "evicted_bytes",
        "evicted_dirty",
        "expired",
        "hits",
        "lapsed",
        "load_bytes",
        "loads",
        "loads_failed",
        "loads_joined",
        "matched_pages",
        "matches",
        "misses",
        "moved_down",
        "oom",
        "page_hits",
        "page_misses",
        "pages_put",
        "pages_skipped",
        "prefetch_dropped",
        "prefetched",
        "promoted",
        "written_behind_bytes",
    )

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set every counter to zero."""
        self.bytes_in = 0  # payload bytes stored
        self.bytes_landed = 0  # of them, those the socket wrote straight into their slot
        self.bytes_staged = 0  # of them, those that were copied once more on their way
        self.bytes_out = 0  # payload bytes served
        self.bytes_sent_in_place = 0  # of them, those the socket read straight from their slot
        self.checks = 0
        self.commits = 0
        self.deleted = 0
        self.evicted = 0
        self.evicted_bytes = 0
        self.demoted = 0  # left memory, and are in a file tier
        self.evicted_dirty = 0  # of the evicted, those that a file tier would have taken
        self.expired = 0
        self.hits = 0
        self.misses = 0
        self.lapsed = 0
        self.load_bytes = 0  # payload bytes that were read from file tiers for somebody
        self.loads = 0  # values read from file tiers
        self.loads_failed = 0
        self.loads_joined = 0  # askers who waited for a load that another had begun
        self.matches = 0
        self.matched_pages = 0
        self.moved_down = 0  # copies that left a file tier for a slower one
        self.oom = 0
        self.page_hits = 0
        self.page_misses = 0
        self.pages_put = 0
        self.prefetch_dropped = 0  # advice that came while too much was on its way
        self.prefetched = 0
        self.promoted = 0  # loaded values that stay in memory
        self.written_behind_bytes = 0  # payload bytes that file tiers took
        self.pages_skipped = 0

    def snapshot(self) -> dict[str, int]:
        """Return every counter by name."""
        return {name: getattr(self, name) for name in self.__slots__}
