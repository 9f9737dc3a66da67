"""A bounded queue of work that a thread does in the background, for stores that nobody waits for."""

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

Work: TypeAlias = Callable[[], None]

EXIT_S: Final = 5.0  # an interpreter that ends waits so long for what is queued
_IDLE_S: Final = 10.0  # a thread with nothing to do ends after this


class StoreQueue:
    """Work in order, one at a time, in a thread that lives while there is some.

    work_max: how much may wait; what comes then is refused.
    A thread may add work while it is in here already: a collection that drops a cache does.
    A forked child begins with none: what is queued is the parent's, which does it.
    """

    def __init__(self, work_max: int) -> None:
        if work_max < 1:
            raise ValueError(f"queue_max must be at least 1, not {work_max}")
        self._work_max = work_max
        self._is_closed = False
        self.begin_anew()
        _queues.add(self)
        atexit.register(_flush_at_exit, weakref.ref(self))

    def begin_anew(self) -> None:
        """Forget what is queued, and the thread, which a forked child has not."""
        self._queue: deque[Work] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._unfinished = 0
        self._thread: threading.Thread | None = None

    def add(self, work: Work) -> bool:
        """Queue work, which must not raise; False: there is no room, or it was closed."""
        with self._changed:
            if self._is_closed or len(self._queue) >= self._work_max:
                return False
            self._queue.append(work)
            self._unfinished += 1
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="respkv-store", daemon=True)
                self._thread.start()
        return True

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all is done that was queued; False: it was not, in this time."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._unfinished:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more work, and wait for what there is, as ``flush`` does."""
        with self._changed:
            self._is_closed = True
        return self.flush(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._queue, _IDLE_S):
                    self._thread = None
                    return
                work = self._queue.popleft()
            try:
                work()
            finally:
                del work  # it holds the tensors that it stored
                with self._changed:
                    self._unfinished -= 1
                    self._changed.notify_all()


def _after_fork() -> None:
    for queue in list(_queues):
        queue.begin_anew()


_queues: Final["weakref.WeakSet[StoreQueue]"] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)


def _flush_at_exit(reference: "weakref.ref[StoreQueue]") -> None:
    waiting = reference()
    if waiting is not None:
        waiting.flush(EXIT_S)
