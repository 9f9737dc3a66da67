"""The real servers, and every client in one blocking form: sync, asyncio, uvloop and trio.

Embedded engines are clients, too: what a client of a server does they do as well.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.client.faces import FACES, Face, open_embedded_face, open_face
from tests.redis_server import RedisServer, why_not
from tests.server_process import ServerProcess

Connect = Callable[..., Face]

CLIENTS = [(where, face) for where in ("unix", "tcp") for face in FACES]
CLIENTS += [("embedded", face) for face in ("sync", "asyncio", "trio")]
EMBEDDED = {"maxmemory": "256mb", "prefault": False}

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


@pytest.fixture(scope="session")
def embedded() -> Iterator[Callable[[str], Face]]:
    """Return what gives the embedded engine of a face, one for all tests."""
    with ExitStack() as stack:
        opened: dict[str, Face] = {}

        def find(face: str) -> Face:
            if face not in opened:
                opened[face] = stack.enter_context(open_embedded_face(face, EMBEDDED))
            return opened[face]

        yield find


@pytest.fixture(params=CLIENTS, ids="-".join)
def client(
    request: pytest.FixtureRequest, server: ServerProcess, embedded: Callable[[str], Face]
) -> Iterator[Face]:
    """Return a client of the respkv server, of each face over each kind of socket and over none."""
    where, face = request.param
    if where == "embedded":
        yield embedded(face)
        return
    url = server.url if where == "tcp" else f"unix://{server.unixsocket}"
    with open_face(face, url, {}) as opened:
        yield opened
