"""Pages are brought by the shortest way there is, and to the token."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from respkv.chain import NO_EXTRAS, Extras
from respkv.client import Client
from respkv.client.sequences import token_bytes
from respkv.integrations.huggingface import page_loads
from respkv.integrations.huggingface.buffers import BufferPool
from respkv.integrations.huggingface.page_copies import Target
from respkv.integrations.huggingface.page_loads import PageLoads, extras_of
from respkv.integrations.huggingface.page_stores import PageStores
from tests.integrations.huggingface.models import prompt
from tests.integrations.huggingface.test_page_stores import SHAPE, grid, pairs
from tests.server_process import ServerProcess

TEXT = prompt(40)
DATA = token_bytes(TEXT)
_numbers = itertools.count()


@pytest.fixture(scope="module")
def socket_client() -> Iterator[Client]:
    """A client of a server that shares no memory."""
    running = ServerProcess(maxmemory="16mb")
    with Client(running.url) as client:
        yield client
    running.stop()


def loads_of(client: Client) -> PageLoads:
    """Return the loads of a new namespace that holds TEXT."""
    name = f"loads-{next(_numbers)}"
    client.schema_set(name, layers=2, heads=2, dim=4, tokens=16, dtype="float32", seed=b"f")
    where: Any = (client, name, SHAPE, b"f", BufferPool(1 << 20))
    assert PageStores(*where).store(DATA, pairs(40), 0, b"numbers", {}) == 3
    return PageLoads(*where)


def room(first: int, stop: int) -> tuple[torch.Tensor, Target]:
    whole = torch.full((2, 2, stop - first, 2, 4), torch.nan)
    return whole, Target([(layer[0], layer[1]) for layer in whole], SHAPE, first)


@pytest.mark.parametrize(
    ("first", "stop"), [(0, 40), (0, 7), (5, 16), (17, 33), (32, 40), (39, 40)]
)
def test_any_part_of_a_prompt_is_brought(
    first: int, stop: int, engine: Client, socket_client: Client
) -> None:
    for client, is_leased in ((engine, True), (socket_client, False)):
        whole, target = room(first, stop)
        found = loads_of(client).load(DATA, target, stop, 40, {})
        assert found == (stop, (stop - first) * is_leased, 0)
        assert whole.equal(grid(stop - first, first))


def test_what_lies_in_another_prompts_page_comes_from_the_server(engine: Client) -> None:
    loads = loads_of(engine)
    other = token_bytes([*TEXT[:20], 9, 9, 9])
    whole, target = room(0, 20)
    found = loads.load(other, target, 20, 20, {})
    assert (found.end, found.leased_tokens) == (20, 16)
    assert whole.equal(grid(20))


def test_many_pages_are_leased_some_at_a_time(
    engine: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_loads, "LEASE_BYTES", SHAPE.page_bytes)
    whole, target = room(3, 40)
    assert loads_of(engine).load(DATA, target, 40, 40, {}) == (40, 37, 0)
    assert whole.equal(grid(37, 3))


def test_of_what_has_gone_only_the_beginning_is_brought(engine: Client) -> None:
    loads = loads_of(engine)
    (second,) = loads.prompt(DATA, {}).keys(1, 2)
    assert engine.delete(second)
    whole, target = room(0, 40)
    assert loads.load(DATA, target, 40, 40, {}).end == 16
    assert whole[:, :, :16].equal(grid(16))
    assert whole[:, :, 16:].isnan().all()


def test_logits_hang_on_the_last_token_of_a_prompt(engine: Client) -> None:
    loads = loads_of(engine)
    assert bytes(loads.logits(DATA, {}) or b"") == b"numbers"
    assert loads.logits(DATA[:-4], {}) is None
    assert loads.logits(DATA, {"salt": "other"}) is None
    assert loads.logits(b"", {}) is None


def test_what_is_mixed_into_a_chain_may_be_text_or_bytes() -> None:
    assert extras_of({}) == NO_EXTRAS
    assert extras_of({"session": "talk"}) == NO_EXTRAS, "a session shares with the others"
    assert extras_of({"salt": "s", "lora": b"l"}) == Extras(salt=b"s", lora=b"l")
    assert extras_of({"tenant": "7", "lora_path": ""}) == Extras(tenant=b"7")
