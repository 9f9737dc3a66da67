"""A step over a ragged batch: where each token is, and what it attends to."""

import pytest
import torch
from torch import Tensor

from respkv.kernels.attention import paged_prefill_reference
from respkv.kernels.paged_kv import PLAIN, PagedKV, Scoring
from respkv.paged import Chunk, OutOfBlocks, PagedAttentionCache, PagedCacheConfig, PagedStep

H, D, T = 2, 8, 4


def new_cache(num_blocks: int = 32) -> PagedAttentionCache:
    return PagedAttentionCache(PagedCacheConfig(1, H, D, num_blocks, T))


def numbers(step: PagedStep) -> tuple[Tensor, Tensor, Tensor]:
    """Make query, key and value, each token's from its own id and position."""
    made = []
    for token, position in zip(step.tokens.tolist(), step.positions.tolist(), strict=True):
        generator = torch.Generator().manual_seed(1000 * token + position)
        made.append(torch.randn(4 * H, D, generator=generator))
    query, key, value = torch.split(torch.stack(made), [2 * H, H, H], dim=1)
    return query, key, value


def run(
    cache: PagedAttentionCache,
    *chunks: Chunk,
    scoring: Scoring = PLAIN,
    by_kernels: bool | None = None,
) -> tuple[PagedStep, Tensor]:
    step = PagedStep(cache, chunks, by_kernels=by_kernels)
    out = step.attend(0, *numbers(step), scoring)
    step.commit()
    return step, out


def test_tokens_lie_one_after_the_other_and_single_ones_first() -> None:
    cache = new_cache()
    first, second = cache.allocate_sequence([5, 6, 7]), cache.allocate_sequence([8])
    third = cache.allocate_sequence([1, 2, 3, 4])
    step, _ = run(cache, Chunk(first, 3), Chunk(second), Chunk(third, 2, logits=False))
    assert step.tokens.tolist() == [8, 5, 6, 7, 1, 2]
    assert step.positions.tolist() == [0, 0, 1, 2, 0, 1]
    assert step.last.tolist() == [3, 0]
    cache.extend(first, [9])
    step, _ = run(cache, Chunk(third, 2), Chunk(first))
    assert (step.tokens.tolist(), step.positions.tolist()) == ([9, 3, 4], [3, 2, 3])
    assert step.last.tolist() == [2, 0]


@pytest.mark.parametrize("by_kernels", [None, True])
@pytest.mark.parametrize("scoring", [PLAIN, Scoring(window=6), Scoring(soft_cap=1.0)])
def test_pieces_mixed_with_others_are_what_the_whole_would_be_alone(
    scoring: Scoring, by_kernels: bool | None
) -> None:
    prompts = [[token * 7 % 13 for token in range(start, start + 19)] for start in (0, 3, 5)]
    whole = []
    for prompt in prompts:
        alone = new_cache()
        _, out = run(
            alone,
            Chunk(alone.allocate_sequence(prompt), 19),
            scoring=scoring,
            by_kernels=by_kernels,
        )
        step = PagedStep(new := new_cache(), [Chunk(new.allocate_sequence(prompt), 19)])
        empty = PagedKV(
            alone.keys[0],
            alone.values[0],
            torch.zeros(1, 1, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
        )
        bounds = torch.tensor([0, 19], dtype=torch.int32)
        want = paged_prefill_reference(
            *numbers(step), empty, bounds, out=torch.empty_like(out), scoring=scoring
        )
        torch.testing.assert_close(out, want)
        whole.append(out)
    cache = new_cache()
    first, second, third = (cache.allocate_sequence(prompt) for prompt in prompts)
    _, out = run(cache, Chunk(first, 11), Chunk(second, 1), scoring=scoring, by_kernels=by_kernels)
    torch.testing.assert_close(out, torch.cat([whole[1][:1], whole[0][:11]]))
    chunks = (Chunk(third, 19), Chunk(first, 1), Chunk(second, 5))
    _, out = run(cache, *chunks, scoring=scoring, by_kernels=by_kernels)
    # Pieces in the order in which they came, single tokens in front of them.
    torch.testing.assert_close(out, torch.cat([whole[0][11:12], whole[2], whole[1][1:6]]))


def test_a_step_that_is_not_committed_never_was() -> None:
    cache = new_cache()
    sequence = cache.allocate_sequence([1, 2, 3, 4, 5])
    PagedStep(cache, [Chunk(sequence, 5)])
    assert (cache.computed(sequence), cache.match([1, 2, 3, 4])) == (0, 0)
    run(cache, Chunk(sequence, 5))
    assert cache.computed(sequence) == 5


def test_there_is_room_for_all_or_for_none() -> None:
    cache = new_cache(num_blocks=4)
    first, second = cache.allocate_sequence([1] * 9), cache.allocate_sequence([2] * 9)
    with pytest.raises(OutOfBlocks):
        PagedStep(cache, [Chunk(first, 9), Chunk(second, 9)])
    assert cache.num_free_blocks == 4
    run(cache, Chunk(first, 9))
    with pytest.raises(OutOfBlocks):
        PagedStep(cache, [Chunk(second, 9)])
    cache.free_sequence(first)
    run(cache, Chunk(second, 9))


def test_mistakes_are_told() -> None:
    cache = new_cache()
    sequence = cache.allocate_sequence([1, 2])
    with pytest.raises(ValueError, match="one chunk of each"):
        PagedStep(cache, [Chunk(sequence), Chunk(sequence)])
    with pytest.raises(ValueError, match="one chunk of each"):
        PagedStep(cache, [])
    with pytest.raises(ValueError, match="2 tokens are to be computed, not 3"):
        PagedStep(cache, [Chunk(sequence, 3)])
    with pytest.raises(ValueError, match="no ids tokens are to be computed"):
        PagedStep(cache, [Chunk(cache.allocate_sequence(3), 3)])
