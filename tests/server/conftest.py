"""The server under test, and the real redis-server to hold it against."""

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import StartServer
from tests.redis_server import RedisServer, why_not
from tests.server.raw import Raw
from tests.server_process import ServerProcess

Connect = Callable[..., Raw]


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Return a redis-server that the tests of this folder share."""
    if reason := why_not():
        pytest.skip(reason)
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(autouse=True)
def no_crash_in_the_shared_server(server: ServerProcess) -> Iterator[None]:
    """Fail the test that made the shared server log an exception."""
    before = len(server.log)
    yield
    check_log(server.log[before:])


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Start servers with settings of one's own; each is stopped afterwards, and its log read."""
    started: list[ServerProcess] = []

    def start(**settings: object) -> ServerProcess:
        started.append(ServerProcess(**settings))
        return started[-1]

    yield start
    logs = [each.log for each in started if each.process.poll() is None]
    statuses = [each.stop() for each in started]
    for log in logs:
        check_log(log)
    assert not any(statuses), statuses


def check_log(log: str) -> None:
    """Assert that no exception has got into a server's log."""
    assert "Traceback" not in log, log
    assert " ERROR " not in log, log


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
