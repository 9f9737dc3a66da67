"""Made-up traces."""

from dataclasses import replace
from itertools import pairwise

import pytest

from respkv.trace.generate import Plan, generate

PLAN = Plan(seed=5, sessions=300, seconds=1000.0)


def test_the_same_seed_makes_the_same_trace_and_another_one_another() -> None:
    assert generate(PLAN) == generate(PLAN)
    assert generate(PLAN) != generate(replace(PLAN, seed=6))


def test_requests_come_in_order_with_a_block_for_each_512_tokens() -> None:
    trace = generate(PLAN)
    times = [request.at_s for request in trace.requests]
    assert times == sorted(times)
    assert len(times) > PLAN.sessions
    for request in trace.requests:
        assert len(request.blocks) == -(-request.num_tokens // 512)
        assert len(set(request.blocks)) == len(request.blocks)
        assert request.num_output >= 1


def test_a_block_stands_always_behind_the_same_one() -> None:
    before: dict[int, int] = {}
    for request in generate(PLAN).requests:
        for parent, block in zip((-1, *request.blocks), request.blocks, strict=False):
            assert before.setdefault(block, parent) == parent


def test_a_next_turn_repeats_the_whole_blocks_of_the_one_before_it() -> None:
    plan = replace(PLAN, sessions=1, follow_up=0.97, documents=0, system_prompts=0)
    requests = generate(plan).requests
    assert len(requests) > 3
    for before, after in pairwise(requests):
        whole = before.num_tokens // 512
        assert after.num_tokens > before.num_tokens + before.num_output
        assert after.blocks[:whole] == before.blocks[:whole]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_documents_are_what_sessions_share(share: float) -> None:
    plan = replace(PLAN, follow_up=0.0, system_prompts=0, documents=3, document_share=share)
    requests = generate(plan).requests
    assert len(requests) == PLAN.sessions
    first = {request.blocks[0] for request in requests}
    assert len(first) == (PLAN.sessions if share == 0.0 else 3)
