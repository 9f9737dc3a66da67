"""GDSF: what computing a page again costs, for each byte."""

import pytest

from respkv.engine.entry import Entry
from respkv.engine.gdsf import DEPTH_FLOPS, LINEAR_FLOPS, TOKEN_BYTES, flops_per_byte
from tests.engine.test_eviction import Shelf


def page(tokens: int, depth: int, nbytes: int) -> Entry:
    entry = Entry(b"k", "kvpage", nbytes, 0.0)
    entry.tokens, entry.depth = tokens, depth
    return entry


def test_the_cost_grows_with_depth_and_is_twice_as_high_where_attention_costs_as_much() -> None:
    first, deep = page(256, 0, 1 << 25), page(256, 30_633, 1 << 25)
    assert flops_per_byte(deep) == pytest.approx(2 * flops_per_byte(first), rel=0.01)
    exact = sum(LINEAR_FLOPS + DEPTH_FLOPS * (token + 0.5) for token in range(256)) / (1 << 25)
    assert flops_per_byte(first) == pytest.approx(exact)


def test_a_smaller_copy_of_the_same_tokens_is_worth_more() -> None:
    assert flops_per_byte(page(256, 0, 100)) == 2 * flops_per_byte(page(256, 0, 200))


def test_a_plain_value_is_worth_what_a_first_page_is() -> None:
    plain = Entry(b"k", "string", 1000, 0.0)
    assert flops_per_byte(plain) == pytest.approx(
        flops_per_byte(page(256, 0, 256 * TOKEN_BYTES)), rel=0.01
    )


def test_of_pages_used_alike_the_cheap_go_first() -> None:
    shelf = Shelf("gdsf")
    for number, depth in enumerate([50_000, 0, 100_000, 20_000]):
        entry = Entry(b"%d" % number, "kvpage", 1 << 20, float(number))
        entry.tokens, entry.depth = 16, depth
        shelf.entries[str(number)] = entry
        shelf.policy.insert(entry)
    shelf.use(shelf.entries["1"])
    shelf.use(shelf.entries["1"])
    assert shelf.drain() == ["3", "0", "1", "2"]
