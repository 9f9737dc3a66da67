"""Semantic caches over a real server and over an engine in this process."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from respkv.client import Client
from respkv.embedded import open_sync
from respkv.semantic import SemanticCache
from tests.server_process import ServerProcess

OpenCache = Callable[..., SemanticCache]

_numbers = itertools.count()


@pytest.fixture(scope="module")
def engine() -> Iterator[Client]:
    with open_sync(maxmemory="64mb", prefault=False) as cache:
        yield cache


@pytest.fixture(params=["server", "engine"])
def open_cache(request: pytest.FixtureRequest, namespace: str) -> Iterator[OpenCache]:
    """Open caches of 4 numbers in a namespace of the test's own; they are closed afterwards."""
    with ExitStack() as stack:
        cache: Any
        if request.param == "server":
            server: ServerProcess = request.getfixturevalue("server")
            cache = server.url
        else:
            cache = request.getfixturevalue("engine")

        def open_it(**options: Any) -> SemanticCache:
            settings: Any = {"namespace": namespace, "dim": 4} | options
            return stack.enter_context(SemanticCache(cache, **settings))

        yield open_it


@pytest.fixture
def namespace() -> str:
    return f"test-{next(_numbers)}"
