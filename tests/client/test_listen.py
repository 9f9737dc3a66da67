"""Listening to channels and following events, with every face, of respkv and of redis-server."""

import threading
import time
from typing import Any

import anyio
import pytest

from respkv.client import AsyncClient, Client, Message, PageEvent
from respkv.client.listen import EventReader
from respkv.errors import ConnectionLost, ProtocolError, ServerError
from respkv.page import page_key
from tests.client.conftest import Connect
from tests.conftest import StartServer
from tests.redis_server import RedisServer
from tests.server_process import ServerProcess

TIMEOUT_S = 60.0


@pytest.fixture(params=["respkv", "redis"])
def url(request: pytest.FixtureRequest, server: ServerProcess, redis: RedisServer) -> str:
    return server.url if request.param == "respkv" else redis.url


def test_messages_come_in_order_with_their_channel(connect: Connect, url: str) -> None:
    client = connect(url)
    with client.listen("news", b"\xff", patterns=["n*"]) as messages:
        assert client.command("PUBLISH", "news", "one") == 2
        assert client.command("PUBLISH", b"\xff", b"\x00\r\n") == 1
        assert client.command("PUBLISH", "nothing", b"x" * 200_000) == 1
        got = [messages.next(TIMEOUT_S) for _ in range(4)]
        assert got == [
            Message(b"news", b"one", None),
            Message(b"news", b"one", b"n*"),
            Message(b"\xff", b"\x00\r\n", None),
            Message(b"nothing", b"x" * 200_000, b"n*"),
        ]
        assert messages.next(0.05) is None
        client.command("PUBLISH", "news", "two")
        assert messages.next(TIMEOUT_S).data == b"two"
    while client.command("PUBLISH", "news", "nobody"):
        pass


def test_thousands_of_messages_at_once_are_all_read(
    connect: Connect, url: str, namespace: str
) -> None:
    client = connect(url)
    with client.listen(namespace) as messages:
        pipeline = client.pipeline()
        for number in range(5000):
            pipeline.command("PUBLISH", namespace, number)
        assert pipeline.execute() == [1] * 5000
        got = [int(messages.next(TIMEOUT_S).data) for _ in range(5000)]
    assert got == list(range(5000))


def test_a_password_is_sent_first(connect: Connect, start_server: StartServer) -> None:
    locked = start_server(requirepass="open sesame")
    with connect(locked.url, password="open sesame").listen("a") as messages:
        assert messages.next(0.01) is None
    with pytest.raises(ServerError, match="Authentication required"):
        with connect(locked.url).listen("a"):
            pass


def test_the_end_of_the_server_is_told(connect: Connect, start_server: StartServer) -> None:
    server = start_server()
    with connect(server.url).listen("a") as messages:
        server.stop()
        with pytest.raises(ConnectionLost):
            messages.next(TIMEOUT_S)


def test_nothing_to_listen_to_is_refused(connect: Connect, server: ServerProcess) -> None:
    with pytest.raises(ValueError, match="at least one"):
        connect(server.url).listen()


def test_events_of_a_namespace_are_followed(
    connect: Connect, server: ServerProcess, namespace: str
) -> None:
    client = connect(server.url)
    first, second = (page_key(namespace, bytes([number]) * 32) for number in (1, 2))
    with client.events(namespace) as events:
        client.put(first, b"x" * 100, tokens=16)
        client.put(second, b"y" * 50, tokens=8, parent=first)
        client.put(page_key("another", b"\1" * 32), b"z")
        client.delete(second)
        got = [events.next(TIMEOUT_S) for _ in range(3)]
        assert events.next(0.02) is None
    name = namespace.encode()
    assert got == [
        PageEvent(
            *(name, "stored", got[0].sequence, False, first, "page"),
            *(16, 0, None, "cpu", "new", 100),
        ),
        PageEvent(
            *(name, "stored", got[0].sequence + 1, False, second, "page"),
            *(8, 16, first, "cpu", "new", 50),
        ),
        PageEvent(
            *(name, "removed", got[0].sequence + 2, False, second, "page"),
            *(8, 16, first, "cpu", "deleted", 50),
        ),
    ]


def test_events_of_all_namespaces_are_followed(
    connect: Connect, server: ServerProcess, namespace: str
) -> None:
    client = connect(server.url)
    with client.events() as events:
        for name in (namespace, f"{namespace}-b"):
            client.put(page_key(name, b"\1" * 32), b"x")
        got: list[str] = []
        while len(got) < 2:  # what other tests have left there ends in its own time
            name = events.next(TIMEOUT_S).namespace.decode()
            got += [name] if name.startswith(namespace) else []
    assert got == [namespace, f"{namespace}-b"]


def test_a_gap_in_the_numbers_is_said() -> None:
    reader = EventReader()

    def missed(channel: bytes, number: int) -> bool:
        data = b'{"event":"cleared","seq":%d}' % number
        return reader.read(Message(b"kv:events:" + channel, data, None)).missed

    numbers = [(b"a", 5), (b"a", 6), (b"b", 1), (b"a", 8), (b"a", 9), (b"b", 2), (b"a", 1)]
    assert [missed(*each) for each in numbers] == [False, False, False, True, False, False, True]


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"event":"x"}', b'{"event":1,"seq":"a"}'])
def test_what_is_no_event_is_an_error(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="no event"):
        EventReader().read(Message(b"kv:events:a", data, None))


def test_iterating_waits_for_what_comes(server: ServerProcess) -> None:
    with Client(server.url) as client, client.listen("slow") as messages:

        def talk() -> None:
            for number in range(3):
                time.sleep(0.05)
                client.command("PUBLISH", "slow", number)

        thread = threading.Thread(target=talk)
        thread.start()
        got = []
        for message in messages:
            got.append(int(message.data))
            if len(got) == 3:
                break
        thread.join()
    assert got == [0, 1, 2]


@pytest.mark.anyio
async def test_a_cancelled_wait_loses_no_message(server: ServerProcess) -> None:
    got: list[Any] = []
    cancelled = 0

    async def talk(client: AsyncClient) -> None:
        for number in range(50):
            await client.command("PUBLISH", "cut", str(number) * 1000)
            await anyio.sleep(0.001)

    async with AsyncClient(server.url) as client, client.listen("cut") as messages:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(talk, client)
            while len(got) < 50:
                with anyio.move_on_after(0.0005) as scope:
                    got.append(await messages.next())
                cancelled += scope.cancelled_caught
        await client.command("PUBLISH", "cut", "last")
        async for message in messages:
            got.append(message)
            break
    assert [message.data for message in got] == [
        *[str(each).encode() * 1000 for each in range(50)],
        b"last",
    ]
    assert cancelled
