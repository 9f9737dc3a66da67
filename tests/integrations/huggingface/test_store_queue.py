"""Work in the background: in order, bounded, and done before the end."""

import os
import subprocess
import sys
import threading

import pytest

from respkv.integrations.huggingface.store_queue import StoreQueue


def test_work_is_done_in_order_by_one_thread() -> None:
    queue, done = StoreQueue(100), []
    for number in range(50):
        assert queue.add(lambda number=number: done.append((number, threading.get_ident())))  # type: ignore[misc]
    assert queue.flush(60)
    assert [number for number, _ in done] == list(range(50))
    assert {thread for _, thread in done} - {threading.get_ident()}
    assert len({thread for _, thread in done}) == 1
    assert queue.close(60)
    assert not queue.add(lambda: done.append((99, 0)))
    assert len(done) == 50


def test_what_is_too_much_is_refused() -> None:
    queue, entered, go_on = StoreQueue(2), threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        go_on.wait(60)

    assert queue.add(wait)
    assert entered.wait(60)
    assert queue.add(wait)
    assert queue.add(wait)
    assert not queue.add(wait)
    assert not queue.flush(0.01)
    go_on.set()
    assert queue.flush(60)
    with pytest.raises(ValueError, match="queue_max must be at least 1, not 0"):
        StoreQueue(0)


def test_work_can_be_added_by_whoever_adds_already() -> None:
    queue, done = StoreQueue(4), []
    # A collection may drop a cache, which is then stored, anywhere: also with the queue's lock held.
    with queue._changed:
        assert queue.add(lambda: done.append(1))
    assert queue.flush(60)
    assert done == [1]


def test_an_interpreter_that_ends_waits_for_what_is_queued() -> None:
    code = (
        "import time; from respkv.integrations.huggingface.store_queue import StoreQueue;"
        "queue = StoreQueue(2);"
        "queue.add(lambda: time.sleep(0.2)); queue.add(lambda: print('stored', flush=True))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == ("stored\n", "")


def test_a_forked_child_leaves_to_its_parent_what_is_queued_and_does_its_own_work() -> None:
    queue, entered, go_on = StoreQueue(4), threading.Event(), threading.Event()
    done: list[int] = []

    def wait() -> None:
        entered.set()
        go_on.wait(120)
        done.append(1)

    assert queue.add(wait)
    assert queue.add(lambda: done.append(2))
    assert entered.wait(60)
    child = os.fork()
    if child == 0:
        is_right = queue.flush(60) and queue.add(lambda: done.append(3)) and queue.flush(60)
        os._exit(0 if is_right and done == [3] else 1)
    assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    assert queue.flush(60)
    assert done == [1, 2]
