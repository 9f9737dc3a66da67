"""The simulated cache against a model that knows only what least recently used means."""

import pytest

from respkv.engine.eviction import POLICIES
from respkv.trace.format import Request, Trace
from respkv.trace.generate import Plan, generate
from respkv.trace.shelf import Shelf


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate(Plan(seed=3, sessions=60, seconds=600.0))


class NaiveLru:
    """Blocks by last use; of those used at once the one deepest in its prompt goes first.

    It knows no leaves: a block in front is used whenever one behind it is, so it never goes first.
    """

    def __init__(self, blocks_max: int) -> None:
        self.blocks_max = blocks_max
        self.used: dict[int, tuple[int, int]] = {}  # when, and minus the depth

    def serve(self, number: int, request: Request) -> int:
        blocks = request.blocks
        prefix = 0
        while prefix < len(blocks) and blocks[prefix] in self.used:
            prefix += 1
        for depth in range(prefix):
            self.used[blocks[depth]] = (number, -depth)
        for depth in range(prefix, len(blocks)):
            if len(self.used) == self.blocks_max:
                victim = min(self.used, key=lambda block: self.used[block])
                if self.used[victim][0] == number:
                    break  # only this request's own blocks are left
                del self.used[victim]
            self.used[blocks[depth]] = (number, -depth)
        return prefix


@pytest.mark.parametrize("blocks_max", [7, 50, 200, 1000])
def test_lru_hits_what_a_naive_model_hits(trace: Trace, blocks_max: int) -> None:
    shelf, naive = Shelf("lru", blocks_max, trace.block_tokens), NaiveLru(blocks_max)
    for number, request in enumerate(trace.requests):
        assert shelf.serve(request) == naive.serve(number, request)
        assert shelf.entries.keys() == naive.used.keys()
    shelf.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_leaves_a_hole_in_a_chain_or_holds_more_than_it_may(
    trace: Trace, policy: str
) -> None:
    shelf = Shelf(policy, 100, trace.block_tokens)
    for number, request in enumerate(trace.requests):
        shelf.serve(request, is_last=number % 3 == 0)
        assert len(shelf.entries) <= 100
        resident = [block in shelf.entries for block in request.blocks]
        assert resident == sorted(resident, reverse=True)
    for entry in shelf.entries.values():
        assert entry.parent is None or int(entry.parent.key, 16) in shelf.entries
        assert (entry.depth == 0) == (entry.parent is None)
    shelf.check()
    assert shelf.num_evicted == shelf.num_stored - len(shelf.entries)


def test_a_prompt_larger_than_the_cache_is_stored_as_far_as_it_fits() -> None:
    shelf = Shelf("lru", 3, 10)
    request = Request(0.0, 50, (1, 2, 3, 4, 5))
    assert shelf.serve(request) == 0
    assert shelf.serve(request) == 3
    assert list(shelf.entries) == [1, 2, 3]


def test_an_entry_knows_its_tokens_and_those_in_front_of_it() -> None:
    shelf = Shelf("lru", 10, 10)
    shelf.serve(Request(0.0, 25, (1, 2, 3), answer=(4,)))
    found = [(entry.depth, entry.tokens) for entry in shelf.entries.values()]
    assert found == [(0, 10), (10, 10), (20, 5), (30, 10)]


def test_told_that_a_session_ended_survival_lets_it_go_first() -> None:
    shelf = Shelf("survival", 4, 10)
    shelf.serve(Request(0.0, 20, (1, 2)))
    shelf.serve(Request(10.0, 20, (3, 4)), is_last=True)
    shelf.serve(Request(20.0, 10, (5,)))
    assert 4 not in shelf.entries
    assert {1, 2} <= shelf.entries.keys()


def test_decisions_are_timed_when_there_are_any() -> None:
    shelf = Shelf("lru", 2, 10)
    shelf.serve(Request(0.0, 20, (1, 2)))
    assert shelf.decision_us == 0.0
    shelf.serve(Request(1.0, 20, (3, 4)))
    assert shelf.num_evicted == 2
    assert shelf.decision_us >= 0.0
