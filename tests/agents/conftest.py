"""Working memories over a real server and over an engine in this process."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from respkv.agents import WorkingMemory
from respkv.client import Client
from respkv.embedded import open_sync
from tests.server_process import ServerProcess

OpenMemory = Callable[..., WorkingMemory]

_numbers = itertools.count()


@pytest.fixture(scope="module")
def engine() -> Iterator[Client]:
    with open_sync(maxmemory="64mb", prefault=False) as cache:
        yield cache


@pytest.fixture(params=["server", "engine"])
def open_memory(request: pytest.FixtureRequest, session: str) -> Iterator[OpenMemory]:
    """Open memories of the test's own session; they are closed afterwards."""
    with ExitStack() as stack:
        cache: Any
        if request.param == "server":
            server: ServerProcess = request.getfixturevalue("server")
            cache = server.url
        else:
            cache = request.getfixturevalue("engine")

        def open_it(
            agent: str = "planner", session: str = session, **options: Any
        ) -> WorkingMemory:
            return stack.enter_context(WorkingMemory(cache, agent, session, **options))

        yield open_it


@pytest.fixture
def session() -> str:
    return f"session-{next(_numbers)}"
