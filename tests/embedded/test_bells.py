"""Bells: what wakes the one who waits."""

import math
import threading

import anyio
import pytest

from respkv.embedded.bells import TaskBell, ThreadBell


def test_a_bell_that_was_rung_before_is_heard_once() -> None:
    bell = ThreadBell()
    bell.ring()
    bell.ring()
    assert bell.wait(math.inf) is True
    assert bell.wait(0.0) is False


def test_another_thread_rings() -> None:
    bell = ThreadBell()
    thread = threading.Timer(0.01, bell.ring)
    thread.start()
    assert bell.wait(60) is True
    thread.join()


@pytest.mark.anyio
async def test_a_task_hears_what_was_rung_before_and_what_rings_then() -> None:
    bell = TaskBell()
    bell.ring()
    await bell.wait()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bell.wait)
        await anyio.wait_all_tasks_blocked()
        bell.ring()
    with anyio.move_on_after(0.01) as scope:
        await bell.wait()
    assert scope.cancelled_caught
    bell.ring()
    await bell.wait()
