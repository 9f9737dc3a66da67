"""One thread for the models of tests: they are too small for more."""

from collections.abc import Iterator

import pytest
import torch

import respkv
from respkv.client import Client


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine() -> Iterator[Client]:
    """An engine in this process, for all tests of a module."""
    with respkv.open_sync(maxmemory="32mb", prefault=False) as running:
        yield running
