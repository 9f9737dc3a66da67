"""The real redis-server, one for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.redis_server import RedisServer, why_not


@pytest.fixture(scope="session")
def started_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if reason := why_not("7.0."):
        pytest.skip(reason)
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def redis(started_redis: RedisServer) -> RedisServer:
    """Return the server, empty and speaking RESP2."""
    started_redis.ask("HELLO", 2)
    started_redis.ask("FLUSHALL")
    return started_redis
