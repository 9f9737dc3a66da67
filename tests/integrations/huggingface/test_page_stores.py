"""Pages are cut from tensors, and only those are sent that are not there."""

import itertools
from typing import Any

import pytest
import torch

from respkv.client import Client
from respkv.client.sequences import token_bytes
from respkv.errors import SequenceGap
from respkv.integrations.huggingface import page_stores
from respkv.integrations.huggingface.buffers import BufferPool
from respkv.integrations.huggingface.page_copies import KVPair
from respkv.integrations.huggingface.page_stores import PageStores
from respkv.page import Geometry
from tests.integrations.huggingface.models import prompt

SHAPE = Geometry(layers=2, heads=2, dim=4, tokens=16, dtype="float32")
TEXT = prompt(40)
DATA = token_bytes(TEXT)
_numbers = itertools.count()


class Space:
    """A namespace of its own, and the stores to it."""

    def __init__(self, engine: Client) -> None:
        self.name = f"stores-{next(_numbers)}"
        self.engine = engine
        engine.schema_set(
            self.name, layers=2, heads=2, dim=4, tokens=16, dtype="float32", seed=b"f"
        )
        self.stores = PageStores(engine, self.name, SHAPE, b"f", BufferPool(1 << 20))

    def store(self, tokens: list[int], kv: Any, first: int = 0, logits: bytes | None = None) -> int:
        return self.stores.store(token_bytes(tokens), kv, first, logits, {})

    def layers(self, tokens: list[int]) -> torch.Tensor:
        """Return what is stored, [L, 2, n, H, D]."""
        with self.engine.seq.get(self.name, token_bytes(tokens)) as layers:
            found = [torch.frombuffer(bytearray(each), dtype=torch.float32) for each in layers]
        return torch.stack(found).view(2, 2, -1, 2, 4)


@pytest.fixture
def space(engine: Client) -> Space:
    return Space(engine)


def grid(count: int, first: int = 0) -> torch.Tensor:
    """Return keys and values that say of which token they are, [L, 2, n, H, D]."""
    made = torch.arange(2 * 2 * 2 * 4.0).view(2, 2, 1, 2, 4) / 64
    return made + torch.arange(first, first + count).view(1, 1, -1, 1, 1)


def pairs(count: int, first: int = 0) -> list[KVPair]:
    return [(layer[0], layer[1]) for layer in grid(count, first)]


def apart(count: int) -> list[KVPair]:
    """Return the same, with no two tensors in one piece."""
    return [(keys.clone(), values.clone()) for keys, values in pairs(count)]


@pytest.mark.parametrize("kv", [pairs(40), apart(40)])
def test_pages_and_the_tail_behind_them_hold_the_rows(kv: list[KVPair], space: Space) -> None:
    assert space.store(TEXT, kv) == 3
    assert space.layers(TEXT).equal(grid(40))
    assert space.store(TEXT, kv) == 0, "all of it is there"


def test_what_is_there_is_not_gathered(space: Space) -> None:
    asked: list[tuple[int, int]] = []

    def gather(first: int, stop: int) -> list[KVPair]:
        asked.append((first, stop))
        return pairs(stop - first, first)

    assert space.store(TEXT[:20], gather) == 2
    assert space.store(TEXT, gather) == 2
    assert asked == [(0, 20), (16, 40)], "a tail is cut anew with what follows it"
    assert space.layers(TEXT).equal(grid(40))


def test_long_prompts_are_cut_a_part_at_a_time(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_stores, "STAGED_BYTES", SHAPE.page_bytes)
    asked: list[tuple[int, int]] = []

    def gather(first: int, stop: int) -> list[KVPair]:
        asked.append((first, stop))
        return pairs(stop - first, first)

    assert space.store(TEXT, gather, logits=b"numbers") == 3
    assert asked == [(0, 16), (16, 32), (32, 40)]
    assert space.layers(TEXT).equal(grid(40))
    found = space.engine.seq.match(space.name, DATA)
    assert (found.tokens, found.has_logits) == (40, True)


def test_pages_behind_others_that_are_not_there_are_refused(space: Space) -> None:
    with pytest.raises(SequenceGap, match="only 0 of the 16 tokens"):
        space.store(TEXT, pairs(24, 16), first=16)
    assert space.engine.seq.match(space.name, DATA).tokens == 0
    assert space.store(TEXT[:16], pairs(16)) == 1
    assert space.store(TEXT, pairs(24, 16), first=16) == 2
    assert space.layers(TEXT).equal(grid(40))


def test_logits_alone_are_stored_once_and_only_behind_what_is_there(space: Space) -> None:
    assert space.store(TEXT, pairs(40)) == 3
    assert not space.engine.seq.match(space.name, DATA).has_logits
    for _ in range(2):
        assert space.store(TEXT, None, logits=b"numbers") == 0
        assert space.engine.seq.match(space.name, DATA).has_logits
