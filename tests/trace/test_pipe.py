"""Sockets of the proxy."""

import os
import socket
from pathlib import Path

import anyio
import pytest

from respkv.client.url import Settings
from respkv.errors import ConfigError
from respkv.trace.pipe import Pipe, accept, connect, listen
from tests.redis_server import free_port

pytestmark = pytest.mark.anyio
GIVE_UP_S = 60.0


async def echo(pipe: Pipe) -> None:
    while data := await pipe.receive(10):
        await pipe.send(data)
    pipe.end()
    pipe.close()


@pytest.fixture(params=["tcp", "unix"])
def at(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "unix":
        return Settings(path=str(tmp_path / "s"))
    return Settings(host="127.0.0.1", port=free_port())


async def test_what_is_sent_is_received_and_the_end_too(at: Settings) -> None:
    payload = bytes(range(256)) * 4000
    async with listen(at) as (listener, _), anyio.create_task_group() as group:
        group.start_soon(accept, listener, echo)
        with anyio.fail_after(GIVE_UP_S):
            pipe = await connect(at)

            async def send() -> None:
                assert await pipe.send(payload)
                pipe.end()

            group.start_soon(send)
            found = b""
            while data := await pipe.receive(65_536):
                found += data
        assert found == payload
        pipe.close()
        group.cancel_scope.cancel()


async def test_a_place_in_the_file_system_is_free_again_afterwards(tmp_path: Path) -> None:
    at = Settings(path=str(tmp_path / "s"))
    for _ in range(2):
        async with listen(at) as (_, where):
            assert where == f"unix://{at.path}"
    assert "s" not in os.listdir(tmp_path)


async def test_where_nobody_listens_is_an_error(at: Settings) -> None:
    with pytest.raises(OSError, match=r"ECONNREFUSED|No such file|ENOENT"):
        await connect(at)


async def test_a_place_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on respkv://127.0.0.1:{port}: "):
            async with listen(Settings(host="127.0.0.1", port=port)):
                raise AssertionError("it listens")


async def test_a_peer_that_has_gone_is_the_end_and_takes_nothing() -> None:
    one, other = socket.socketpair()
    pipe = Pipe(one)
    other.close()
    assert await pipe.receive(10) == b""
    assert not await pipe.send(b"x" * 10)
    pipe.end()
    pipe.close()


async def test_cancelled_while_it_waits_it_can_be_used_again() -> None:
    one, other = socket.socketpair()
    pipe = Pipe(one)
    with anyio.move_on_after(0.01) as scope:
        await pipe.receive(10)
    assert scope.cancelled_caught
    other.send(b"hello")
    assert await pipe.receive(10) == b"hello"
    pipe.close()
    other.close()
