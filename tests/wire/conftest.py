"""The real redis-server, one for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.wire.redis_server import RedisServer, installed


@pytest.fixture(scope="session")
def started_redis() -> Iterator[RedisServer]:
    if not installed():
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def redis(started_redis: RedisServer) -> RedisServer:
    """Return the server, empty and speaking RESP2."""
    started_redis.ask("HELLO", 2)
    started_redis.ask("FLUSHALL")
    return started_redis
