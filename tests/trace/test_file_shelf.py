"""Files behind a simulated memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.engine.admission import Mode
from respkv.trace.file_shelf import FileShelf
from respkv.trace.format import Request, Trace
from respkv.trace.generate import Plan, generate
from respkv.trace.shelf import Shelf
from respkv.trace.simulate import MODES
from tests.trace.test_belady import prompts, requests_of


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate(Plan(seed=7, sessions=60, seconds=600.0))


@settings(max_examples=200, deadline=None)
@given(
    paths=st.lists(prompts, min_size=1, max_size=25),
    policy=st.sampled_from(["lru", "s3fifo", "survival"]),
    mode=st.sampled_from(MODES),
    memory=st.integers(1, 5),
    files=st.integers(0, 6),
)
def test_nothing_is_ever_behind_a_hole(
    paths: list[list[int]], policy: str, mode: Mode, memory: int, files: int
) -> None:
    shelf = FileShelf(policy, memory, 10, files_max=files, admission=mode)
    for request in requests_of(paths):
        shelf.serve(request)
        resident = [block in shelf.entries for block in request.blocks]
        assert resident == sorted(resident, reverse=True)
        for entry in shelf.entries.values():
            assert (entry.depth == 0) == (entry.parent is None)
    shelf.check()


def test_with_files_for_all_nothing_that_was_stored_is_missed(trace: Trace) -> None:
    shelf = FileShelf("lru", 40, trace.block_tokens, files_max=10**6, admission="all")
    seen: set[int] = set()
    for request in trace.requests:
        known = [block in seen for block in request.blocks]
        prefix = known.index(False) if False in known else len(known)
        assert shelf.serve(request) >= min(prefix, 40)
        seen.update(list(shelf.entries))
    shelf.check()
    assert shelf.num_raised > 0


@pytest.mark.parametrize("mode", MODES)
def test_without_files_it_is_memory_alone(trace: Trace, mode: Mode) -> None:
    files = FileShelf("lru", 100, trace.block_tokens, files_max=0, admission=mode)
    memory = Shelf("lru", 100, trace.block_tokens)
    for request in trace.requests:
        assert files.serve(request) == memory.serve(request)
    files.check()
    assert files.num_written == files.num_raised == 0


def test_second_writes_what_was_used_since_it_was_put() -> None:
    shelf = FileShelf("lru", 2, 10, files_max=10, admission="second")
    shelf.serve(Request(0.0, 10, (1,)))
    shelf.serve(Request(1.0, 10, (1,)))
    for number in range(2, 6):
        shelf.serve(Request(float(number), 10, (number,)))
    assert shelf.num_written == 1
    assert shelf.serve(Request(10.0, 10, (1,))) == 1
    assert shelf.serve(Request(11.0, 10, (2,))) == 0
    assert shelf.num_raised == 1
    shelf.check()
