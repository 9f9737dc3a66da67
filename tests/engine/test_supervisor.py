"""Supervision: a crash is survived a few times, then it is for the operator to see."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from respkv.engine.actor import Actor, Ask
from respkv.engine.supervisor import contain, supervise
from respkv.errors import ActorDown

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class Work(Ask[int]):
    is_crashing: bool = False


def make_actor() -> Actor:
    async def handle(message: Any) -> int:
        if message.is_crashing:
            raise ZeroDivisionError
        return 1

    return Actor("worker", handle, mailbox_max=8, jobs_max=1)


class Recovery:
    def __init__(self) -> None:
        self.num = 0

    async def __call__(self) -> None:
        self.num += 1


quick = partial(supervise, backoff_s=0.0)


async def crash(actor: Actor) -> None:
    with pytest.raises(ActorDown, match="worker"):
        await actor.ask(Work(is_crashing=True))


async def test_a_crashed_actor_recovers_and_serves_again() -> None:
    actor, recover = make_actor(), Recovery()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(quick, actor, recover)
        await crash(actor)
        assert await actor.ask(Work()) == 1
        assert recover.num == 1
        actor.stop()


async def test_recovery_comes_before_the_next_message() -> None:
    actor = make_actor()
    order = []

    async def recover() -> None:
        await anyio.lowlevel.checkpoint()
        order.append("recovered")

    async def work() -> None:
        await actor.ask(Work())
        order.append("served")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(quick, actor, recover)
        async with anyio.create_task_group() as askers:
            askers.start_soon(crash, actor)
            await anyio.lowlevel.checkpoint()
            askers.start_soon(work)
        actor.stop()
    assert order == ["recovered", "served"]


async def test_one_crash_too_many_leaves_and_everybody_who_waits_is_told() -> None:
    actor, recover = make_actor(), Recovery()

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(quick, restarts_max=2), actor, recover)
            for _ in range(3):
                await crash(actor)
            await anyio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        await run()
    assert caught.value.split(ZeroDivisionError)[1] is None
    assert recover.num == 2
    with pytest.raises(ActorDown):
        await actor.ask(Work())


async def test_crashes_that_are_far_apart_are_forgiven() -> None:
    actor, recover = make_actor(), Recovery()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(quick, restarts_max=1, window_s=0.0), actor, recover)
        for _ in range(4):
            await crash(actor)
            await anyio.sleep(0.002)
        assert await actor.ask(Work()) == 1
        actor.stop()
    assert recover.num == 4


async def test_an_actor_that_is_stopped_ends_its_supervision() -> None:
    actor, recover = make_actor(), Recovery()
    actor.stop()
    await supervise(actor, recover)
    assert recover.num == 0


async def test_a_crash_of_contained_work_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    let_go = []

    async def work() -> None:
        raise ZeroDivisionError

    with caplog.at_level(logging.ERROR):
        await contain(work, lambda: let_go.append(True))
    assert let_go == [True]
    assert "a command crashed" in caplog.text


async def test_a_cancellation_of_contained_work_is_no_crash() -> None:
    let_go = []
    with anyio.move_on_after(0) as scope:
        await contain(anyio.sleep_forever, lambda: let_go.append(True))
    assert scope.cancelled_caught
    assert let_go == []
