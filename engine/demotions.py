"""Pages that a client wants out of memory now: those without a copy in a file are written first.

Nothing is lost by it: what no tier takes stays where it is. A page that is used meanwhile has
shown that it is wanted, and stays as well.
"""

from collections.abc import Iterable
from itertools import islice

from respkv.engine.cache import Cache
from respkv.engine.entry import Entry

LOOK_MAX = 2048  # pages looked at between two commands


class Demotions:
    """Pages on their way out of memory. The mover looks at them whenever a write has ended."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._asked: dict[Entry, float] = {}  # and when they had been used last

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, entries: Iterable[Entry]) -> int:
        """Take pages out of memory as soon as that loses nothing; return how many are in it."""
        wanted = [entry for entry in entries if entry.position >= 0 and not entry.is_cold]
        self._asked.update((entry, entry.touched) for entry in wanted)
        self._cache.copies.on_work()
        return len(wanted)

    def look(self) -> None:
        """Demote what has a copy by now, and have the rest written."""
        for entry in list(islice(self._asked, LOOK_MAX)):
            touched = self._asked.pop(entry)
            if entry.position < 0 or entry.is_cold or entry.touched > touched:
                continue
            if entry.records and not self._cache.room.is_held(entry):
                self._cache.stats.demoted += 1
                self._cache.demote(entry)
                continue
            if not entry.records:
                self._cache.copies.admission.insisted.add(entry)
                self._cache.copies.hurry(entry)
            self._asked[entry] = touched  # behind the others, which have their turn
