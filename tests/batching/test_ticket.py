"""Tickets: events cross from the model's thread into threads and event loops, each read once."""

import threading

import anyio
import pytest

from respkv.batching.request import GenerationFailed, Timings, TokenEvent
from respkv.batching.ticket import Ticket

TIMINGS = Timings(0, 0, 0, 0, 0, 0, 0, 0)


def make() -> tuple[Ticket, list[Ticket]]:
    cancelled: list[Ticket] = []
    return Ticket(cancelled.append), cancelled


def tell(ticket: Ticket, *, gap_s: float = 0.0) -> threading.Thread:
    """Tell 5, 6 and 7 from another thread."""

    def run() -> None:
        for token in (5, 6):
            threading.Event().wait(gap_s)
            ticket.push(token)
        threading.Event().wait(gap_s)
        ticket.finish(7, "length", TIMINGS)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


EVENTS = [TokenEvent(0, 5), TokenEvent(1, 6), TokenEvent(2, 7, "length", TIMINGS)]


def test_a_thread_reads_every_event_once() -> None:
    ticket, _ = make()
    thread = tell(ticket)
    assert list(ticket) == EVENTS
    assert list(ticket) == []
    assert ticket.result().tokens == (5, 6, 7)
    thread.join()


@pytest.mark.parametrize("gap_s", [0.0, 0.01])
@pytest.mark.anyio
async def test_an_event_loop_reads_every_event_once(gap_s: float) -> None:
    ticket, _ = make()
    thread = tell(ticket, gap_s=gap_s)
    assert [event async for event in ticket] == EVENTS
    assert (await ticket.wait()).finish_reason == "length"
    thread.join()


@pytest.mark.anyio
async def test_the_end_can_be_waited_for_in_an_event_loop() -> None:
    ticket, _ = make()
    thread = tell(ticket, gap_s=0.01)
    assert (await ticket.wait()).tokens == (5, 6, 7)
    thread.join()


@pytest.mark.anyio
async def test_a_reader_that_is_cancelled_can_read_on_later() -> None:
    ticket, cancelled = make()
    with anyio.move_on_after(0.01):
        await anext(ticket)
    ticket.push(5)
    assert await anext(ticket) == TokenEvent(0, 5)
    assert cancelled == []


@pytest.mark.anyio
async def test_a_second_reader_is_told_that_there_is_one() -> None:
    ticket, _ = make()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ticket.wait)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="has a reader already"):
            await anext(ticket)
        ticket.finish(1, "stop", TIMINGS)


def test_a_wait_that_takes_too_long_ends_and_can_be_repeated() -> None:
    ticket, _ = make()
    with pytest.raises(TimeoutError, match=r"has not finished in 0\.001 s"):
        ticket.result(0.001)
    ticket.finish(3, "stop", TIMINGS)
    assert ticket.result(0.001).tokens == (3,)


@pytest.mark.anyio
async def test_a_failure_comes_after_the_tokens_before_it() -> None:
    ticket, _ = make()
    cause = RuntimeError("broken")
    ticket.push(5)
    ticket.fail("no more", cause)
    assert await anext(ticket) == TokenEvent(0, 5)
    for _ in range(2):
        with pytest.raises(GenerationFailed, match="no more") as raised:
            await anext(ticket)
        assert raised.value.__cause__ is cause
    with pytest.raises(GenerationFailed):
        next(ticket)
    with pytest.raises(GenerationFailed):
        ticket.result()
    with pytest.raises(GenerationFailed):
        await ticket.wait()


@pytest.mark.anyio
async def test_leaving_a_block_cancels_what_has_not_finished() -> None:
    ticket, cancelled = make()
    with ticket:
        pass
    async with ticket:
        pass
    assert cancelled == [ticket, ticket]
    ticket.finish(None, "cancelled", TIMINGS)
    with ticket:
        pass
    assert cancelled == [ticket, ticket]
    assert list(ticket) == [TokenEvent(0, None, "cancelled", TIMINGS)]
