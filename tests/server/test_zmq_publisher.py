"""The publisher inside a loop of its own: what one asker can do to the server and to others."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest
import zmq

from respkv.engine.events import Event
from respkv.server import zmq_events
from respkv.server.zmq_events import Publisher
from tests.server.test_session import running
from tests.server.vllm import Sockets, context

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def publishing(host: str = "127.0.0.1") -> AsyncIterator[Publisher]:
    """Yield a publisher whose ``run`` is still to be called."""
    ends = {f"events_{name}endpoint": f"tcp://{host}:*" for name in ("", "replay_")}
    async with running(**ends) as server:
        publisher = Publisher(server, server.config)
        try:
            yield publisher
        finally:
            publisher.close()


def publish(publisher: Publisher, count: int, tokens: int = 4) -> None:
    """Publish so many batches of one page each."""
    for number in range(count):
        key = b"ns:%064x" % number
        ids = number.to_bytes(4, "little") * tokens
        publisher._publish([Event("stored", b"ns", 0, key, tokens, tokens, token_ids=ids)])


def asker(opened: Sockets, publisher: Publisher) -> "zmq.Socket[bytes]":
    asking = opened.open(zmq.DEALER)
    asking.connect(publisher.replay_endpoint)
    return asking


async def answers(asking: "zmq.Socket[bytes]") -> list[int]:
    """Return the numbers of the batches that come before the end."""
    found: list[int] = []
    with anyio.fail_after(60):
        while True:
            try:
                _, number, batch = asking.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                await anyio.sleep(0.005)
                continue
            if not batch:
                return found
            found.append(int.from_bytes(number, "big"))


async def test_a_flood_of_what_is_no_request_leaves_turns_to_others() -> None:
    count, most = 500, 0
    async with publishing() as publisher, anyio.create_task_group() as tasks:
        with context() as opened:
            asking = asker(opened, publisher)
            for _ in range(count):
                asking.send(b"not a number")
            await anyio.sleep(0.5)  # all of them are there before the first is read
            tasks.start_soon(publisher.run)
            before = 0
            with anyio.fail_after(60):
                while before < count:
                    await anyio.lowlevel.checkpoint()
                    most = max(most, publisher.num_bad_requests - before)
                    before = publisher.num_bad_requests
        tasks.cancel_scope.cancel()
    assert most <= 2


async def test_a_frame_that_is_too_large_to_be_a_request_is_not_taken_in() -> None:
    async with publishing() as publisher, anyio.create_task_group() as tasks:
        with context() as opened:
            tasks.start_soon(publisher.run)
            wrong, right = asker(opened, publisher), asker(opened, publisher)
            wrong.send_multipart([b"", b"x" * 1_000_000])
            await anyio.sleep(0.3)
            right.send_multipart([b"", bytes(8)])
            assert await answers(right) == []
            assert publisher.num_bad_requests == 0
        tasks.cancel_scope.cancel()


async def test_a_replay_ends_though_more_is_published_all_the_time() -> None:
    async with publishing() as publisher, anyio.create_task_group() as tasks:
        with context() as opened:
            publish(publisher, 100)
            tasks.start_soon(publisher.run)

            async def go_on() -> None:
                while not publisher.num_replays:
                    await anyio.lowlevel.checkpoint()
                for _ in range(20):
                    publish(publisher, 50)
                    await anyio.lowlevel.checkpoint()

            tasks.start_soon(go_on)
            asking = asker(opened, publisher)
            asking.send_multipart([b"", bytes(8)])
            assert await answers(asking) == list(range(100))
        tasks.cancel_scope.cancel()


async def test_batches_are_kept_while_they_are_not_too_many_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zmq_events, "KEPT_BYTES_MAX", 50_000)
    numbers: list[int] = []
    async with publishing() as publisher, anyio.create_task_group() as tasks:
        with context() as opened:
            publish(publisher, 100, tokens=1024)
            tasks.start_soon(publisher.run)
            asking = asker(opened, publisher)
            asking.send_multipart([b"", bytes(8)])
            numbers = await answers(asking)
        tasks.cancel_scope.cancel()
    assert 10 < len(numbers) < 50
    assert numbers == list(range(100 - len(numbers), 100))


async def test_an_asker_that_takes_nothing_holds_few_batches() -> None:
    sent = 0
    async with publishing() as publisher, anyio.create_task_group() as tasks:
        with context() as opened:
            publish(publisher, 2000, tokens=20_000)

            async def counting(socket: "zmq.Socket[bytes]", frames: list[bytes]) -> bool:
                nonlocal sent
                is_taken = await push(socket, frames)
                sent += is_taken
                return is_taken

            push = zmq_events._push
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(zmq_events, "_push", counting)
                patched.setattr(zmq_events, "STALL_S", 0.5)
                tasks.start_soon(publisher.run)
                asking = opened.open(zmq.DEALER)
                asking.set_hwm(1)
                asking.setsockopt(zmq.RCVBUF, 4096)
                asking.connect(publisher.replay_endpoint)
                asking.send_multipart([b"", bytes(8)])
                with anyio.fail_after(60):
                    while not sent:  # noqa: ASYNC110
                        await anyio.sleep(0.01)
                await anyio.sleep(2)  # by then it is left alone
        tasks.cancel_scope.cancel()
    assert 0 < sent < 1000


@pytest.mark.skipif(not zmq.has("ipc"), reason="this libzmq is not that of a Unix")
async def test_an_address_of_ipv6_can_be_bound() -> None:
    async with publishing("[::1]") as publisher:
        assert publisher.endpoint.startswith("tcp://[::1]:")
