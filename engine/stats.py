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
        "evicted",
        "evicted_bytes",
        "expired",
        "hits",
        "lapsed",
        "matched_pages",
        "matches",
        "misses",
        "oom",
        "page_hits",
        "page_misses",
        "pages_put",
        "pages_skipped",
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
        self.expired = 0
        self.hits = 0
        self.misses = 0
        self.lapsed = 0
        self.matches = 0
        self.matched_pages = 0
        self.oom = 0
        self.page_hits = 0
        self.page_misses = 0
        self.pages_put = 0
        self.pages_skipped = 0

    def snapshot(self) -> dict[str, int]:
        """Return every counter by name."""
        return {name: getattr(self, name) for name in self.__slots__}
