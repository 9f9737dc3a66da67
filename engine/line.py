"""A line of entries in the order in which they came, and a hand that looks for those used since.

Policies that treat a used entry differently the moment it is used (arc, wtinylfu) are lazy here: the
hand walks the line from oldest to newest, a few entries for each victim, and takes out those whose
hits went up. All others keep their order. A line shorter than what the hand does in one go is known
exactly; in a longer one a use is noticed one round late at most.
"""

from collections import OrderedDict
from collections.abc import Iterator

from respkv.engine.entry import Entry


class Line:
    """Entries that were not used since they came. ``mark``: hits when they did.

    Cut at the hand: ``_behind`` is what it has passed, ``_ahead`` what it still has to see, and all
    behind it are older than all ahead of it.
    """

    def __init__(self) -> None:
        self._ahead: OrderedDict[Entry, None] = OrderedDict()
        self._behind: OrderedDict[Entry, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ahead) + len(self._behind)

    def __iter__(self) -> Iterator[Entry]:
        yield from self._behind
        yield from self._ahead

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._ahead or entry in self._behind

    def append(self, entry: Entry) -> None:
        """Put an entry at the end."""
        entry.mark = entry.hits
        self._ahead[entry] = None

    def prepend(self, entry: Entry) -> None:
        """Put an entry at the front, as it was before it was taken out."""
        line = self._behind or self._ahead
        line[entry] = None
        line.move_to_end(entry, last=False)

    def remove(self, entry: Entry) -> None:
        """Take an entry out."""
        if entry in self._behind:
            del self._behind[entry]
        else:
            del self._ahead[entry]

    def first(self) -> Entry | None:
        """Return the oldest entry."""
        return next(iter(self._behind or self._ahead), None)

    def take_used(self, looks_max: int) -> list[Entry]:
        """Look at the next entries, from the oldest again after the newest; take out the used."""
        used: list[Entry] = []
        for _ in range(min(looks_max, len(self))):
            if not self._ahead:
                self._ahead, self._behind = self._behind, self._ahead
            entry, _ = self._ahead.popitem(last=False)
            if entry.hits != entry.mark:
                used.append(entry)
            else:
                self._behind[entry] = None
        return used

    def check(self) -> None:
        """Assert that no entry is in both halves."""
        assert self._ahead.keys().isdisjoint(self._behind)
