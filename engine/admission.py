"""What files are to take of what is in memory: not all of it is worth a write.

Most pages are put once and never asked for again. Writing them costs bandwidth, wears the device and
pushes others out of the log. So a setting may ask for a sign that a value is used:

* all:     none. Every value is written before it leaves memory.
* second:  it was used since it was put, or put before: whoever evicted it too early is told so.
* tinylfu: it was used more often than what the files drop lately. While they have room for all they
           drop nothing, and all is written; a log full of what was used once takes only what was
           used twice.

What is not admitted stays in memory as long as its policy keeps it, and is then lost with its key.
That never concerns what a client wants to survive (level ``written`` or ``durable``), what is
pinned, what a client asked to be moved to files, and a page behind which another is in a file or on
its way there: a chain has no holes. A part goes with its page. When the server stops it writes all
that is in memory, admitted or not: what is there has outlived the rest, and a restart is to go on
where it was.

Whether a value is admitted is asked when it is its turn to be written, and once more when it is to
be evicted: what was used in between is written first.
"""

from itertools import islice
from typing import Literal

from respkv.engine.clock import Clock
from respkv.engine.entry import Entry
from respkv.engine.sketch import COUNT_MAX, Sketch

Mode = Literal["all", "second", "tinylfu"]

DROP_WEIGHT = 1 / 64  # of one dropped value in the mean
DROP_COUNT_MAX = 3  # or a few that were popular long ago would keep out what is used twice now
KEYS_MAX = 1 << 17  # that are counted apart, in two MiB
CHILDREN_MAX = 256  # that are looked at; a page with more of them is used in any case


class Admission:
    """Which values files take.

    mode:      may be changed at any time; what was left out before that is asked anew.
    left_out:  entries in memory that no file is to take as they are.
    insisted:  those that are to be written whatever the mode says.
    threshold: the mean count of what files drop.
    """

    def __init__(self, clock: Clock) -> None:
        self.mode: Mode = "all"
        self.left_out: dict[Entry, None] = {}
        self.insisted: set[Entry] = set()
        self.threshold = 0.0
        self.num_refused = self.refused_bytes = 0
        self.num_admitted = self.admitted_bytes = 0
        self.num_lost = 0  # evicted without having been written
        self._clock = clock
        self._sketch = Sketch()

    def put(self, entry: Entry) -> None:
        """Count that a value was put."""
        if self.mode != "all":
            self._add(entry, 1)

    def admits(self, entry: Entry) -> bool:
        """Whether a value is to be written as things are now."""
        if self.mode == "all" or entry.level or entry in self.insisted:
            return True
        if entry.pinned_until > self._clock.now:
            return True
        page = entry
        if entry.part is not None and entry.parent is not None:
            page = entry.parent
            if page.records or page.level or page in self.insisted:
                return True
        if any(child.records for child in islice(page.children or (), CHILDREN_MAX)):
            return True
        if self.mode == "second":
            return page.hits > 0 or self._sketch.count(hash(page.key)) > 1
        return self.count(page) > self.threshold + 0.5

    def count(self, entry: Entry) -> int:
        """Return how often a value was put and used lately, as far as it is known."""
        return min(COUNT_MAX, max(1, self._sketch.count(hash(entry.key))) + entry.hits)

    def dropped(self, entry: Entry) -> None:
        """Learn what files drop, now that they have dropped a copy of an entry."""
        if self.mode != "all":
            count = min(self.count(entry), DROP_COUNT_MAX)
            self.threshold += (count - self.threshold) * DROP_WEIGHT

    def lost(self, entry: Entry) -> None:
        """Remember how often an entry was used that has gone altogether."""
        if self.mode != "all":
            self.num_lost += entry in self.left_out
            if entry.hits:
                self._add(entry, min(entry.hits, COUNT_MAX))

    def note(self, nbytes: int, *, is_admitted: bool) -> None:
        """Count a decision."""
        if is_admitted:
            self.num_admitted += 1
            self.admitted_bytes += nbytes
        else:
            self.num_refused += 1
            self.refused_bytes += nbytes

    def forget(self, entry: Entry) -> None:
        """Forget an entry whose value goes or is written."""
        self.left_out.pop(entry, None)
        self.insisted.discard(entry)

    def _add(self, entry: Entry, count: int) -> None:
        self._sketch.grow(KEYS_MAX)
        before = self._sketch.num_added
        self._sketch.add(hash(entry.key), count)
        if self._sketch.num_added < before:  # all counts were halved
            self.threshold /= 2

    def clear(self) -> None:
        """Forget all entries: everything has gone."""
        self.left_out.clear()
        self.insisted.clear()

    def info_fields(self) -> dict[str, object]:
        """Return what INFO says of it."""
        return {
            "mode": self.mode,
            "threshold": f"{self.threshold:.2f}",
            "left_out": len(self.left_out),
            "admitted": self.num_admitted,
            "admitted_bytes": self.admitted_bytes,
            "refused": self.num_refused,
            "refused_bytes": self.refused_bytes,
            "lost": self.num_lost,
        }
