"""A lock of a process that forks is free in the child, whoever held it."""

import os
import threading

from respkv.integrations.huggingface.locks import ForkLock


def test_its_owner_may_take_it_again_and_others_wait() -> None:
    lock, seen, is_held = ForkLock(), [], threading.Event()

    def other() -> None:
        is_held.wait(60)
        with lock:
            seen.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    with lock, lock:
        is_held.set()
        seen.append("owner")
    thread.join(60)
    assert seen == ["owner", "other"]


def test_a_forked_child_finds_it_free() -> None:
    lock, is_held, go_on = ForkLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            is_held.set()
            go_on.wait(120)

    thread = threading.Thread(target=hold)
    thread.start()
    assert is_held.wait(60)
    child = os.fork()
    if child == 0:
        taken = threading.Thread(target=lock.__enter__, daemon=True)
        taken.start()
        taken.join(60)
        os._exit(taken.is_alive())
    assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    thread.join(60)
