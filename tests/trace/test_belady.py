"""The ceiling against every possible choice, on traces small enough to try them all."""

from collections.abc import Iterable
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.trace.belady import NEVER, Belady, last_requests, next_uses
from respkv.trace.format import Request

# A prompt is a path in a tree: a block is named by the choices that lead to it.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=4)


def requests_of(paths: Iterable[list[int]]) -> list[Request]:
    ids: dict[tuple[int, ...], int] = {}
    found = []
    for number, path in enumerate(paths):
        blocks = [
            ids.setdefault(tuple(path[: length + 1]), len(ids)) for length in range(len(path))
        ]
        found.append(Request(float(number), 10 * len(path), tuple(blocks)))
    return found


def hits_of_belady(requests: list[Request], blocks_max: int) -> int:
    belady = Belady(blocks_max)
    uses = next_uses(requests)
    return sum(belady.serve(request, use) for request, use in zip(requests, uses, strict=True))


def best_hits(requests: list[Request], blocks_max: int) -> int:
    """Try all contents that a cache could have after each request, holes in chains included."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for request in requests:
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            prefix = 0
            while prefix < len(request.blocks) and request.blocks[prefix] in held:
                prefix += 1
            there = sorted(held.union(request.blocks))
            for size in range(min(blocks_max, len(there)) + 1):
                for kept in combinations(there, size):
                    kept_set = frozenset(kept)
                    after[kept_set] = max(after.get(kept_set, 0), hits + prefix)
        best = after
    return max(best.values())


@settings(max_examples=60, deadline=None)
@given(paths=st.lists(prompts, min_size=1, max_size=6), blocks_max=st.integers(1, 3))
def test_nothing_hits_more_than_belady_and_belady_hits_as_much(
    paths: list[list[int]], blocks_max: int
) -> None:
    requests = requests_of(paths)
    assert hits_of_belady(requests, blocks_max) == best_hits(requests, blocks_max)


def test_what_is_not_used_again_is_never_stored() -> None:
    requests = requests_of([[0, 0], [1, 1], [0, 0]])
    belady = Belady(2)
    uses = next_uses(requests)
    assert [belady.serve(*each) for each in zip(requests, uses, strict=True)] == [0, 0, 2]
    assert belady.num_stored == 2


def test_a_block_that_finds_no_room_was_never_written() -> None:
    requests = requests_of([[0, 0, 0], [0, 0, 0]])
    belady = Belady(2)
    uses = next_uses(requests)
    assert [belady.serve(*each) for each in zip(requests, uses, strict=True)] == [0, 2]
    assert belady.num_stored == 2


def test_next_uses_are_numbers_of_requests() -> None:
    requests = requests_of([[0, 0], [0], [0, 0]])
    assert next_uses(requests) == [[1, 2], [2], [NEVER, NEVER]]


def test_blocks_of_an_answer_are_used_by_the_request_that_has_them_in_its_prompt() -> None:
    requests = [Request(0.0, 10, (1,), answer=(2,)), Request(1.0, 20, (1, 2))]
    assert next_uses(requests) == [[1, 1], [NEVER, NEVER]]
    assert hits_of_belady(requests, 2) == 2


@pytest.mark.parametrize(
    ("num_tokens", "blocks", "is_last"),
    [
        (20, (1, 2), False),  # its last whole block is in the next turn
        (15, (1, 3), False),  # the second is partly full, and the next turn fills it
        (20, (1, 4), True),  # another prompt goes on from its first block, not from its end
        (5, (5,), True),
        (0, (), True),
    ],
)
def test_a_last_request_is_one_from_whose_end_nothing_goes_on(
    num_tokens: int, blocks: tuple[int, ...], is_last: bool
) -> None:
    requests = [Request(0.0, num_tokens, blocks), Request(1.0, 30, (1, 2, 6))]
    assert last_requests(requests, 10) == [is_last, True]
