"""The server under test, and the real redis-server to hold it against."""

import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.client.redis_server import RedisServer
from tests.server.raw import Raw
from tests.server_process import ServerProcess

Connect = Callable[..., Raw]


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Return a redis-server that the tests of this folder share."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def connect(server: ServerProcess) -> Iterator[Connect]:
    """Return what opens raw connections, to the shared server unless told another one."""
    opened: list[Raw] = []

    def open_raw(to: ServerProcess | None = None) -> Raw:
        opened.append(Raw((to or server).connect()))
        return opened[-1]

    yield open_raw
    for each in opened:
        each.close()


@pytest.fixture
def raw(server: ServerProcess, connect: Connect) -> Raw:
    """Return a connection to the shared server, which is empty then."""
    connection = connect()
    assert connection.ask("FLUSHALL") == b"OK"
    return connection
