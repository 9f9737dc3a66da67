"""One embedded engine that most tests share; opening one takes longer than most of them."""

import itertools
from collections.abc import Iterator

import pytest

import respkv
from respkv.embedded import EmbeddedCache

_numbers = itertools.count()


@pytest.fixture(scope="session")
def shared() -> Iterator[EmbeddedCache]:
    with respkv.open_sync(maxmemory="128mb", prefault=False) as cache:
        yield cache


@pytest.fixture
def cache(shared: EmbeddedCache) -> EmbeddedCache:
    """Return the engine, empty."""
    shared.command("FLUSHALL")
    return shared
