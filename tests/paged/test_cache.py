"""The paged cache: tensors in blocks, as sequences wrote them, whoever shares them."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from respkv.errors import OutOfMemory
from respkv.kernels.paged_kv import Scoring
from respkv.paged import OutOfBlocks, PagedAttentionCache, PagedCacheConfig
from respkv.paged.cache import table_tensor

L, H, D, T = 2, 2, 4, 4


def new_cache(num_blocks: int = 16, dtype: torch.dtype = torch.float32) -> PagedAttentionCache:
    return PagedAttentionCache(PagedCacheConfig(L, H, D, num_blocks, T, dtype))


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, count, H, D, generator=generator)
    return key, value


def write(cache: PagedAttentionCache, sequence: int, count: int, seed: int) -> None:
    """Append random keys and values to all layers."""
    for layer in range(L):
        cache.append(sequence, layer, *rows(count, seed + layer))


def read(cache: PagedAttentionCache, sequence: int, layer: int) -> Tensor:
    """Return keys and values [2, computed, H, D], piece by piece."""
    runs = cache.runs(sequence, 0, cache.computed(sequence))
    return torch.stack(
        [
            torch.cat([run.keys[layer] for run in runs]),
            torch.cat([run.values[layer] for run in runs]),
        ]
    )


def test_what_is_appended_is_there_in_every_layer() -> None:
    cache = new_cache()
    sequence = cache.allocate_sequence(3)
    write(cache, sequence, 3, 0)
    write(cache, sequence, 6, 10)  # more than was said at first
    for layer in range(L):
        want = torch.cat([torch.stack(rows(3, layer)), torch.stack(rows(6, 10 + layer))], dim=1)
        assert torch.equal(read(cache, sequence, layer), want)
    assert (cache.length(sequence), cache.computed(sequence)) == (9, 9)


def test_tokens_count_once_the_last_layer_has_them() -> None:
    cache = new_cache()
    sequence = cache.allocate_sequence([1, 2, 3, 4, 5])
    cache.append(sequence, 1, *rows(4, 1))
    assert (cache.computed(sequence), cache.match([1, 2, 3, 4])) == (0, 0)
    cache.append(sequence, 0, *rows(3, 0))
    assert (cache.computed(sequence), cache.match([1, 2, 3, 4])) == (3, 0)
    cache.append(sequence, 0, *rows(1, 5))
    assert (cache.computed(sequence), cache.match([1, 2, 3, 4])) == (4, 4)


def test_a_fork_goes_its_own_way() -> None:
    cache = new_cache()
    first = cache.allocate_sequence(6)
    write(cache, first, 6, 0)
    second = cache.fork(first)
    assert cache.stats().blocks_used == 2
    write(cache, second, 3, 20)
    write(cache, first, 1, 30)
    both = torch.stack(rows(6, 0))
    assert torch.equal(read(cache, first, 0), torch.cat([both, torch.stack(rows(1, 30))], 1))
    assert torch.equal(read(cache, second, 0), torch.cat([both, torch.stack(rows(3, 20))], 1))
    assert (cache.stats().copies, cache.stats().blocks_shared) == (1, 1)
    cache.free_sequence(first)
    cache.free_sequence(second)
    assert cache.num_free_blocks == 16


def test_a_prompt_finds_the_numbers_of_another() -> None:
    cache = new_cache()
    tokens = list(range(10))
    first = cache.allocate_sequence(tokens)
    write(cache, first, 10, 0)
    cache.free_sequence(first)
    second = cache.allocate_sequence([*tokens[:7], 99])
    assert cache.computed(second) == 7
    write(cache, second, 1, 50)
    want = torch.cat([torch.stack(rows(10, 0))[:, :7], torch.stack(rows(1, 50))], 1)
    assert torch.equal(read(cache, second, 0), want)
    third = cache.allocate_sequence(tokens, limit=10)
    assert torch.equal(read(cache, third, 1), torch.stack(rows(10, 1)))


def test_pages_are_loaded_into_the_runs_of_a_sequence() -> None:
    cache = new_cache()
    pages = torch.randn(3, L, 2, T, H, D)  # as respkv stores them
    tokens = list(range(13))
    sequence = cache.allocate_sequence(tokens)
    cache.reserve(sequence, 12)
    [run] = cache.runs(sequence, 0, 12)  # of a new sequence blocks lie side by side
    for layer in range(L):
        assert run.keys[layer].shape == (12, H, D)
        run.keys[layer].view(3, T, H, D).copy_(pages[:, layer, 0])
        run.values[layer].view(3, T, H, D).copy_(pages[:, layer, 1])
    cache.commit(sequence, 12)
    assert cache.match(tokens) == 12
    assert torch.equal(read(cache, sequence, 1), pages[:, 1].transpose(0, 1).flatten(1, 2))


def test_runs_are_pieces_where_blocks_are_apart() -> None:
    cache = new_cache(num_blocks=4)
    first, second = cache.allocate_sequence(4), cache.allocate_sequence(4)
    write(cache, first, 4, 0)
    write(cache, second, 4, 1)
    write(cache, first, 4, 2)
    runs = cache.runs(first, 1, 7)
    assert [(run.first, run.stop) for run in runs] == [(1, 4), (4, 7)]
    assert torch.equal(runs[1].keys[0], rows(4, 2)[0][:3])
    with pytest.raises(ValueError, match="not within the 8 that it has room for; reserve"):
        cache.runs(first, 0, 9)


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(window=5, soft_cap=2.0)])
def test_attention_over_blocks_is_attention_over_tensors(scoring: Scoring) -> None:
    cache = new_cache()
    lengths = (3, 11, 6)
    sequences = [cache.allocate_sequence(length) for length in lengths]
    for seed, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        write(cache, sequence, length, seed)
    query = torch.randn(3, 2 * H, D, generator=torch.Generator().manual_seed(9))
    tables, contexts = cache.block_tables(sequences), cache.context_lens(sequences)
    assert (tables.dtype, tables.shape, contexts.tolist()) == (torch.int32, (3, 3), [3, 11, 6])
    ours = cache.paged_attention(query, tables, contexts, layer=1, scoring=scoring)
    for row, sequence in enumerate(sequences):
        key, value = read(cache, sequence, 1)[:, -(scoring.window or 99) :]
        scores = torch.einsum("hgd,mhd->hgm", query[row].view(H, 2, D), key) * D**-0.5
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
        want = torch.einsum("hgm,mhd->hgd", scores.softmax(-1), value).flatten(0, 1)
        torch.testing.assert_close(ours[row], want)


def test_numbers_that_are_none_stay_with_their_sequence() -> None:
    cache = new_cache()
    bad, good = cache.allocate_sequence(3), cache.allocate_sequence(9)
    for layer in range(L):
        nothing = torch.full((3, H, D), float("nan"))
        cache.append(bad, layer, nothing, nothing)
    write(cache, good, 9, 0)
    cache.free_sequence(bad)
    third = cache.allocate_sequence(2)
    write(cache, third, 2, 5)  # where the bad numbers were
    tables, contexts = cache.block_tables([third, good]), cache.context_lens([third, good])
    out = cache.paged_attention(torch.ones(2, H, D), tables, contexts, layer=0)
    assert out.isfinite().all()


def test_memory_is_taken_as_it_is_written() -> None:
    before = resident_bytes()
    large = PagedAttentionCache(PagedCacheConfig(32, 8, 128, 512, dtype=torch.bfloat16))
    sequence = large.allocate_sequence(2)
    key, value = torch.ones(2, 2, 8, 128, dtype=torch.bfloat16)
    large.append(sequence, 31, key, value)
    assert large.config.memory_bytes == 1 << 30
    assert resident_bytes() - before < 64 << 20
    assert large.stats().bytes_used == large.config.block_bytes
    with pytest.raises(OutOfMemory, match="bytes for blocks cannot be had"):
        PagedAttentionCache(large.config.with_blocks(1 << 30))


def resident_bytes() -> int:
    """Return the memory that this process has of the machine."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_mistakes_are_told_and_cost_nothing() -> None:
    cache = new_cache(num_blocks=2)
    sequence = cache.allocate_sequence(8)
    with pytest.raises(ValueError, match="layer 2 is not one of 2"):
        cache.append(sequence, 2, *rows(1, 0))
    for shape in ((1, 1, D), (H, D), (), (1, 1, H, D)):
        with pytest.raises(ValueError, match=re.escape(f"key {list(shape)}")):
            cache.append(sequence, 0, torch.ones(shape), torch.ones(shape))
    for _ in range(2):
        with pytest.raises(OutOfBlocks, match="needs 3 blocks for 9 tokens and 2 of 2"):
            cache.append(sequence, 0, *rows(9, 0))
        assert cache.length(sequence) == 8
    write(cache, sequence, 8, 0)
    with pytest.raises(OutOfBlocks, match="needs 1 blocks for 1 tokens and 0 of 2"):
        cache.append(sequence, 0, *rows(1, 0))
    assert torch.equal(read(cache, sequence, 0), torch.stack(rows(8, 0)))
    named = cache.allocate_sequence([1, 2])
    with pytest.raises(ValueError, match="has 2 tokens to compute, not 3"):
        cache.append(named, 0, *rows(3, 0))
    tables, lengths = cache.block_tables([sequence]), cache.context_lens([sequence])
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"layer {layer} is not one of 2"):
            cache.paged_attention(torch.ones(1, H, D), tables, lengths, layer=layer)


def test_layers_that_come_one_by_one_survive_a_fork_in_between() -> None:
    cache = new_cache(num_blocks=8)
    first = cache.allocate_sequence(2)
    write(cache, first, 2, 0)
    cache.append(first, 0, *rows(4, 10))
    forks = [cache.fork(first) for _ in range(3)]
    cache.append(first, 1, *rows(4, 11))
    for seed, each in enumerate(forks):
        write(cache, each, 3, 20 + 2 * seed)
    cache.free_sequence(forks.pop(0))
    for layer in range(L):
        begun = torch.stack(rows(2, layer))
        want = torch.cat([begun, torch.stack(rows(4, 10 + layer))], 1)
        assert torch.equal(read(cache, first, layer), want)
        for seed, each in enumerate(forks, 1):
            want = torch.cat([begun, torch.stack(rows(3, 20 + 2 * seed + layer))], 1)
            assert torch.equal(read(cache, each, layer), want)
    for each in (first, *forks):
        cache.free_sequence(each)
    assert cache.stats().blocks_free == 8


def test_the_most_that_was_used_counts_what_is_taken_from_the_tree() -> None:
    cache = new_cache()
    sequence = cache.allocate_sequence(list(range(8)))
    write(cache, sequence, 8, 0)
    cache.free_sequence(sequence)
    other = cache.allocate_sequence([50, 51])
    write(cache, other, 2, 0)
    assert cache.stats().peak_used == 2
    cache.allocate_sequence(list(range(9)))
    assert cache.stats().peak_used == 3 == cache.stats().blocks_used


def test_a_truncated_sequence_writes_again() -> None:
    cache = new_cache()
    sequence = cache.allocate_sequence([1, 2, 3, 4, 5, 6])
    write(cache, sequence, 6, 0)
    cache.truncate(sequence, 3)
    cache.extend(sequence, [9])
    write(cache, sequence, 1, 40)
    want = torch.cat([torch.stack(rows(6, 0))[:, :3], torch.stack(rows(1, 40))], 1)
    assert torch.equal(read(cache, sequence, 0), want)
    assert cache.match([1, 2, 3, 4]) == 4  # what was published stays as it was


def test_tables_of_no_sequence_are_empty() -> None:
    assert table_tensor([], torch.device("cpu")).shape == (0, 0)
    assert table_tensor([[], [7]], torch.device("cpu")).tolist() == [[0], [7]]
