"""The real servers, and every client in one blocking form: sync, asyncio, uvloop and trio."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.client.faces import FACES, Face, open_face
from tests.redis_server import RedisServer, why_not
from tests.server_process import ServerProcess

Connect = Callable[..., Face]

_numbers = itertools.count()


@pytest.fixture(scope="session")
def started_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if reason := why_not():
        pytest.skip(reason)
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(started_redis: RedisServer) -> RedisServer:
    """Return the server, empty."""
    started_redis.cli("FLUSHALL")
    return started_redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Return a server that the test may stop, start and configure."""
    if reason := why_not():
        pytest.skip(reason)
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture(params=FACES)
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Return what opens clients of one face; they are closed when the test ends."""
    with ExitStack() as stack:

        def open_client(url: str, **options: Any) -> Face:
            return stack.enter_context(open_face(request.param, url, options))

        yield open_client


@pytest.fixture
def namespace() -> str:
    """Return a name that no other test of the shared server uses."""
    return f"client-{os.getpid()}-{next(_numbers)}"


@pytest.fixture(params=["unix", "tcp"])
def client(request: pytest.FixtureRequest, connect: Connect, server: ServerProcess) -> Face:
    """Return a client of the respkv server, of each face over each kind of socket."""
    return connect(server.url if request.param == "tcp" else f"unix://{server.unixsocket}")
