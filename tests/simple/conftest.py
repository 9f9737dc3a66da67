"""The two ways to have a SimpleKVCache: in this process, and over a server."""

import os
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch

from respkv.embedded import EmbeddedCache, open_sync
from respkv.simple import SimpleKVCache
from tests.server_process import ServerProcess

MakeCache = Callable[..., SimpleKVCache]

_numbers = count()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def engine() -> Iterator[EmbeddedCache]:
    with open_sync(maxmemory="64mb", prefault=False, maxmemory_policy="lru") as cache:
        yield cache


@pytest.fixture(params=["embedded", "server"])
def make_cache(
    request: pytest.FixtureRequest, engine: EmbeddedCache, server: ServerProcess
) -> Iterator[MakeCache]:
    """Return what makes caches of one kind, each in a namespace of its own."""
    made: list[SimpleKVCache] = []

    def make(max_size_gb: float | None = 0.01, **settings: Any) -> SimpleKVCache:
        settings.setdefault("namespace", f"simple[{os.getpid()}]-{next(_numbers)}")
        where: dict[str, Any] = {"cache": engine}
        if request.param == "server":
            where = {"url": f"unix://{server.unixsocket}"}
        made.append(SimpleKVCache(max_size_gb, **where, **settings))
        return made[-1]

    yield make
    for each in made:
        each.clear()
        each.close()
