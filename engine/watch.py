"""Who wants to know what becomes of pages: the seam between the cache and what is built on it.

Chains of prompts, quotas, events and the prefetcher all follow the pages, and the cache knows none
of them: each is a ``Watcher`` in ``Residents.watchers`` and is told in the turn in which it happens.
Ordinary values are told of to nobody, so SET and GET pay nothing for it.
"""

from respkv.engine.entry import Entry
from respkv.engine.history import Reason


class Watcher:
    """What can be learned of a page. None of these may change the cache during the call.

    Each is called when the page is as the call says: a page that was ``stored`` or ``raised`` can be
    fetched, one that was ``demoted`` can be found and has to be loaded.
    """

    def stored(self, entry: Entry, *, is_new: bool) -> None:
        """A page has a value. is_new: its key had none, or had one that was no page."""

    def restored(self, entry: Entry) -> None:
        """A page was found in a file at start; it is cold."""

    def demoted(self, entry: Entry) -> None:
        """A page left memory, and is in a file."""

    def raised(self, entry: Entry) -> None:
        """A cold page is in memory again."""

    def removed(self, entry: Entry, reason: Reason) -> None:
        """A page is about to go with its key; its links and its bytes are still there."""

    def cleared(self) -> None:
        """Everything has gone at once; ``removed`` is not called for each."""


class Watchers(Watcher):
    """All watchers of a cache, told in the order in which they came."""

    def __init__(self) -> None:
        self._all: tuple[Watcher, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, watcher: Watcher) -> None:
        """Tell one more from now on."""
        self._all = (*self._all, watcher)

    def stored(self, entry: Entry, *, is_new: bool) -> None:
        for watcher in self._all:
            watcher.stored(entry, is_new=is_new)

    def restored(self, entry: Entry) -> None:
        for watcher in self._all:
            watcher.restored(entry)

    def demoted(self, entry: Entry) -> None:
        for watcher in self._all:
            watcher.demoted(entry)

    def raised(self, entry: Entry) -> None:
        for watcher in self._all:
            watcher.raised(entry)

    def removed(self, entry: Entry, reason: Reason) -> None:
        for watcher in self._all:
            watcher.removed(entry, reason)

    def cleared(self) -> None:
        for watcher in self._all:
            watcher.cleared()
