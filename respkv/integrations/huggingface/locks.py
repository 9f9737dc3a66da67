"""Locks that nobody holds in a forked child, and objects that no other process can be sent.

Whoever held a lock in the parent does not live in the child.

A process that has generated may fork: workers of a data loader, of a server that loads its model
first. A lock that the thread of the stores held at that moment would be held in the child for ever.
What these locks guard may be forgotten, or is right after each step of Python, so the child can go
on with what it finds.
"""

import os
import threading
import weakref
from typing import Final, Never


class ForkLock:
    """A lock that its owner may take again; free in a forked child. To be used with ``with``."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def begin_anew(self) -> None:
        """Have a lock that nobody holds."""
        self._lock = threading.RLock()


class OneProcess:
    """Something with threads, connections and locks: ``pickle`` and ``copy`` say so."""

    def __reduce__(self) -> Never:
        raise TypeError(
            f"a {type(self).__name__} is neither pickled nor copied, as it has threads and"
            " connections; make another one where it is wanted, of the same model and URL"
        )


def _after_fork() -> None:
    for lock in list(_locks):
        lock.begin_anew()


_locks: Final["weakref.WeakSet[ForkLock]"] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)
