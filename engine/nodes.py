"""What leaves together: a page with its parts, and the pages behind it.

A page of a hybrid model is stored as several values: that of its namespace's own geometry, and one
for each other group of layers. One of them without the others is of no use to anybody, so whoever
would lose a bound part loses its page, and a page takes all its parts along. Moving is another
thing: what is in a file is found there, so each moves alone.
"""

from collections.abc import Iterator

from respkv.engine.entry import Entry
from respkv.page import Part


def page_of(entry: Entry) -> Entry:
    """Return what has to go for an entry to go: the page of a bound part, else the entry."""
    if entry.part is Part.BOUND and entry.parent is not None:
        return entry.parent
    return entry


def touch_parts(page: Entry, now: float) -> None:
    """Note that a page was used: what goes with it counts as used as well.

    Or it would be proposed for eviction as long unused, and its page would go along.
    """
    for part in page.parts or ():
        if part.part is Part.BOUND:
            part.touched = now


def has_bound_parts_of(page: Entry, other: Entry) -> bool:
    """Whether a page has the pages of all groups that another one has."""
    if not other.parts:
        return True
    there = {part.key[len(page.key) :] for part in page.parts or ()}
    bound = (part.key for part in other.parts if part.part is Part.BOUND)
    return all(key[len(other.key) :] in there for key in bound)


def right_behind(entry: Entry) -> Iterator[Entry]:
    """Yield the pages behind a page and its parts."""
    yield from entry.children or ()
    yield from entry.parts or ()


def with_descendants(entry: Entry) -> list[Entry]:
    """Return an entry and all that is behind it, each after what it stands behind."""
    found = [entry]
    for each in found:
        found.extend(each.children or ())
        found.extend(each.parts or ())
    return found


def descendants(entry: Entry) -> Iterator[Entry]:
    """Yield what is behind an entry, pages and parts, nearest first for each."""
    todo = list(right_behind(entry))
    while todo:
        each = todo.pop()
        yield each
        todo += each.children or ()
        todo += each.parts or ()
