"""Blocks: whoever reads one finds the KV of the very tokens it asked for, and none is ever lost."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from respkv.paged import BlockManager, OutOfBlocks

T = 4


def compute(blocks: BlockManager, sequence: int, count: int | None = None) -> None:
    """Do what a model does with the next tokens, as far as blocks are concerned."""
    count = blocks.length(sequence) - blocks.computed(sequence) if count is None else count
    blocks.reserve(sequence, count)
    blocks.commit(sequence, count)


def prompt(blocks: BlockManager, tokens: list[int], **options: object) -> int:
    """Begin a sequence and compute all of it."""
    sequence = blocks.allocate(tokens, **options)  # type: ignore[arg-type]
    compute(blocks, sequence)
    return sequence


def test_a_prompt_takes_the_full_blocks_that_a_running_one_has_computed() -> None:
    blocks = BlockManager(16, T)
    first = prompt(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = blocks.allocate([1, 2, 3, 4, 5, 6, 7, 8, 8, 8])
    assert blocks.computed(second) == 8
    assert blocks.blocks(second) == blocks.blocks(first)[:2]
    assert blocks.num_shared_blocks == 2


def test_nothing_is_shared_before_it_is_computed() -> None:
    blocks = BlockManager(16, T)
    first = blocks.allocate(list(range(9)))
    blocks.reserve(first, 8)
    assert blocks.match(list(range(9))) == 0
    blocks.commit(first, 8)
    assert blocks.match(list(range(9))) == 8


def test_the_tail_of_an_ended_sequence_is_found_to_the_token() -> None:
    blocks = BlockManager(16, T)
    blocks.free(prompt(blocks, [1, 2, 3, 4, 5, 6, 7]))
    assert blocks.match([1, 2, 3, 4, 5, 6, 7, 8]) == 7
    assert blocks.match([1, 2, 3, 4, 5, 6]) == 6
    assert blocks.match([1, 2, 3, 9]) == 3
    assert blocks.match([2]) == 0


def test_the_token_that_all_prompts_begin_with_is_no_prefix() -> None:
    blocks = BlockManager(16, 16)
    blocks.free(prompt(blocks, [0, 1, 2, 3, 4, 5]))
    assert blocks.match([0, 9, 9, 9, 9]) == blocks.match([0, 1, 2, 9]) == 0
    assert blocks.computed(blocks.allocate([0, 9, 9])) == 0
    assert blocks.match([0, 1, 2, 3, 9]) == 4


def test_all_but_the_last_token_are_taken_unless_its_logits_are_known() -> None:
    blocks = BlockManager(16, T)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    blocks.free(prompt(blocks, tokens))
    assert blocks.computed(blocks.allocate(tokens)) == 7
    assert blocks.computed(blocks.allocate(tokens, limit=8)) == 8
    assert blocks.computed(blocks.allocate(tokens, limit=0)) == 0


def test_who_diverges_inside_a_block_gets_a_copy_and_the_other_keeps_its_own() -> None:
    blocks = BlockManager(16, T)
    first = prompt(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
    second = blocks.allocate([1, 2, 3, 4, 5, 6, 9])
    assert blocks.computed(second) == 6
    old = blocks.blocks(first)[1]
    [(source, target)] = blocks.reserve(second, 1)
    assert (source, target) == (old, blocks.blocks(second)[1])
    assert blocks.blocks(first)[1] == old
    assert blocks.reserve(second, 1) == []


def test_a_conversation_goes_on_in_its_own_last_block_without_a_copy() -> None:
    blocks = BlockManager(16, T)
    blocks.free(prompt(blocks, [1, 2, 3, 4, 5, 6]))
    second = blocks.allocate([1, 2, 3, 4, 5, 6, 7, 8])
    assert blocks.computed(second) == 6
    assert blocks.reserve(second, 2) == []
    blocks.commit(second, 2)
    assert blocks.match([1, 2, 3, 4, 5, 6, 7, 8]) == 8
    blocks.check()


def test_forks_share_all_and_copy_the_last_block_when_one_writes() -> None:
    blocks = BlockManager(16, T)
    first = prompt(blocks, [1, 2, 3, 4, 5])
    second = blocks.fork(first)
    assert blocks.blocks(second) == blocks.blocks(first)
    blocks.extend(first, [6])
    blocks.extend(second, [7])
    assert len(blocks.reserve(first, 1)) == 1
    assert blocks.reserve(second, 1) == []  # by now it has the block for itself
    assert blocks.blocks(second)[0] == blocks.blocks(first)[0]
    assert blocks.blocks(second)[1] != blocks.blocks(first)[1]


def test_two_that_computed_the_same_at_once_end_up_with_one_block() -> None:
    blocks = BlockManager(16, T)
    first, second = (blocks.allocate([1, 2, 3, 4, 5]) for _ in range(2))
    compute(blocks, first)
    compute(blocks, second)
    assert blocks.blocks(first)[0] == blocks.blocks(second)[0]
    assert 16 - blocks.num_free_blocks == 3
    blocks.check()


def test_what_was_used_longest_ago_is_evicted_first_and_from_its_end() -> None:
    blocks = BlockManager(4, T)
    blocks.free(prompt(blocks, [1] * 8))
    blocks.free(prompt(blocks, [2] * 8))
    assert blocks.match([1] * 8) == 8  # looking does not count
    blocks.free(blocks.allocate([1] * 8))
    prompt(blocks, [3] * 4)
    assert (blocks.match([1] * 8), blocks.match([2] * 8)) == (8, 4)
    assert blocks.stats.evictions == 1


def test_a_longer_tail_takes_the_place_of_a_shorter_one() -> None:
    blocks = BlockManager(16, T)
    longer, shorter = blocks.allocate([1, 2, 3]), blocks.allocate([1, 2])
    compute(blocks, shorter)
    compute(blocks, longer)
    blocks.free(shorter)
    assert blocks.num_cached_blocks == 1
    blocks.free(longer)
    assert (blocks.num_cached_blocks, blocks.match([1, 2, 3])) == (1, 3)
    blocks.check()


def test_salts_and_those_that_do_not_share_stay_among_themselves() -> None:
    blocks = BlockManager(16, T)
    blocks.free(prompt(blocks, [1] * 8, salt="a"))
    blocks.free(prompt(blocks, [1] * 8, share=False))
    assert blocks.match([1] * 8) == 0
    assert blocks.match([1] * 8, "a") == 8
    assert blocks.computed(blocks.allocate([1] * 8, salt="b")) == 0
    assert blocks.computed(blocks.allocate([1] * 8, salt="a", share=False)) == 0
    assert BlockManager(4, T, prefix_sharing=False).allocate([1]) == 1


def test_without_room_nothing_changes() -> None:
    blocks = BlockManager(3, T)
    prompt(blocks, [1] * 8)
    second = blocks.allocate([1] * 4 + [2] * 8)
    with pytest.raises(OutOfBlocks, match=r"needs 2 blocks for 8 tokens and 1 of 3 can be had"):
        blocks.reserve(second, 8)
    assert blocks.computed(second) == 4
    assert blocks.reserve(second, 4) == []
    blocks.check()


def test_a_sequence_as_large_as_the_cache_fits_though_a_copy_would_not() -> None:
    blocks = BlockManager(4, T)
    tokens = list(range(15))
    blocks.free(prompt(blocks, tokens))
    second = blocks.allocate([*tokens[:14], 99, 98])
    assert blocks.computed(second) == 14
    assert blocks.blocks_needed(second, 2) == 0
    assert blocks.reserve(second, 2) == []
    blocks.commit(second, 2)
    assert blocks.match(tokens) == 14
    assert blocks.match([*tokens[:14], 99, 98]) == 16
    blocks.check()


def test_what_is_reserved_stays_writable_when_others_take_the_block_meanwhile() -> None:
    blocks = BlockManager(8, T)
    blocks.free(prompt(blocks, [1, 2, 3, 4, 5, 6]))
    loading = blocks.allocate([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert blocks.computed(loading) == 6
    blocks.reserve(loading, 3)
    places = blocks.blocks(loading)
    other = blocks.allocate([1, 2, 3, 4, 5, 6, 99])
    fork = blocks.fork(loading)
    assert blocks.computed(other) == blocks.computed(fork) == 6
    assert blocks.reserve(loading, 3) == []
    assert blocks.blocks(loading) == places
    blocks.commit(loading, 3)
    for each in (other, fork):
        assert blocks.reserve(each, 1) == [(places[1], blocks.blocks(each)[1])]
    blocks.check()
    blocks.truncate(loading, 6)
    blocks.extend(loading, [7])
    with pytest.raises(ValueError, match="were not reserved"):
        blocks.commit(loading, 1)


def test_mistakes_are_told() -> None:
    blocks = BlockManager(4, T)
    with pytest.raises(ValueError, match="a sequence of 0 tokens"):
        blocks.allocate([])
    with pytest.raises(ValueError, match="there is no sequence 7"):
        blocks.computed(7)
    with pytest.raises(ValueError, match="0 blocks of 4 tokens"):
        BlockManager(0, T)
    sequence = blocks.allocate([1, 2])
    with pytest.raises(ValueError, match="has 2 tokens to compute, not 3"):
        blocks.reserve(sequence, 3)
    with pytest.raises(ValueError, match="were not reserved"):
        blocks.commit(sequence, 2)
    with pytest.raises(ValueError, match="tokens of another kind"):
        blocks.extend(sequence, 2)
    with pytest.raises(ValueError, match="2 tokens are to be computed, not 3"):
        blocks.next_tokens(sequence, 3)
    with pytest.raises(ValueError, match="has 2 tokens, not 3 or more"):
        blocks.truncate(sequence, 3)
    counted = blocks.allocate(5)
    with pytest.raises(ValueError, match="-3 tokens cannot come next"):
        blocks.extend(counted, -3)

    def broken() -> Iterator[int]:
        yield 1
        raise OSError("a reader that fails")

    with pytest.raises(OSError, match="a reader that fails"):
        blocks.extend(sequence, broken())
    assert (blocks.length(counted), blocks.length(sequence)) == (5, 2)
    assert blocks.tokens(sequence) == (1, 2)


def test_ids_are_the_same_whatever_holds_them() -> None:
    blocks = BlockManager(8, T)
    ids = [1, 2, 3, 4, 5]
    blocks.free(prompt(blocks, torch.tensor(ids)))  # type: ignore[arg-type]
    assert blocks.match(ids) == 5
    assert blocks.computed(blocks.allocate(np.array(ids))) == 4  # type: ignore[arg-type]
    for wrong in ([1.5], ["1"], torch.tensor([1.5])):
        with pytest.raises(TypeError, match=r"int|index"):
            blocks.allocate(wrong)  # type: ignore[arg-type]


class BlockMachine(RuleBasedStateMachine):
    """Sequences with few different tokens, so that they share and diverge; memory as a dict.

    In memory stands, for each slot, the salt and the tokens up to this one: what KV depends on.
    """

    @initialize(num_blocks=st.integers(3, 9))
    def begin(self, num_blocks: int) -> None:
        self.blocks = BlockManager(num_blocks, T)
        self.memory: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.salts: dict[int, str] = {}
        self.writing: dict[int, list[tuple[int, int]]] = {}  # places that it was given

    def pick(self, index: int) -> int:
        return sorted(self.salts)[index % len(self.salts)]

    def unfinished(self) -> list[int]:
        return [
            each for each in self.salts if self.blocks.computed(each) < self.blocks.length(each)
        ]

    def writers(self) -> list[int]:
        return [each for each, places in self.writing.items() if places]

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        salt=st.sampled_from(["", "x"]),
        share=st.sampled_from([True, True, True, False]),
        all_of_it=st.booleans(),
    )
    def allocate(self, tokens: list[int], salt: str, share: bool, all_of_it: bool) -> None:
        limit = len(tokens) if all_of_it else None
        sequence = self.blocks.allocate(tokens, salt=salt, share=share, limit=limit)
        # Only those who share may ever be found in others' blocks.
        self.salts[sequence] = salt if share else f"own {sequence}"
        assert self.blocks.computed(sequence) <= len(tokens) - (not all_of_it)

    @precondition(lambda self: self.salts)
    @rule(index=st.integers(0, 20), tokens=st.lists(st.integers(0, 1), max_size=6))
    def extend(self, index: int, tokens: list[int]) -> None:
        self.blocks.extend(self.pick(index), tokens)

    @precondition(lambda self: self.unfinished())
    @rule(index=st.integers(0, 20), count=st.integers(0, 9), is_done=st.booleans())
    def step(self, index: int, count: int, is_done: bool) -> None:
        sequence = self.unfinished()[index % len(self.unfinished())]
        blocks, computed = self.blocks, self.blocks.computed(sequence)
        count = min(count, blocks.length(sequence) - computed)
        needed, free = blocks.blocks_needed(sequence, count), blocks.num_free_blocks
        try:
            copies = blocks.reserve(sequence, count)
        except OutOfBlocks:
            assert needed > free
            return
        assert needed <= free
        for source, target in copies:
            for offset in range(T):
                self.memory.pop((target, offset), None)
                if (source, offset) in self.memory:
                    self.memory[target, offset] = self.memory[source, offset]
        assert blocks.reserve(sequence, count) == []
        table = blocks.blocks(sequence)
        places = [(table[at // T], at % T) for at in range(computed, computed + count)]
        before = self.writing.get(sequence, [])
        assert places[: len(before)] == before[: len(places)]  # somebody may be writing there
        self.writing[sequence] = max(before, places, key=len)
        if is_done:
            self.write(sequence, count)

    @precondition(lambda self: self.writers())
    @rule(index=st.integers(0, 20), count=st.integers(1, 9))
    def written(self, index: int, count: int) -> None:
        self.write(self.writers()[index % len(self.writers())], count)

    def write(self, sequence: int, count: int) -> None:
        tokens, places = self.blocks.tokens(sequence), self.writing[sequence]
        assert tokens is not None
        for at, place in enumerate(places[:count], self.blocks.computed(sequence)):
            self.memory[place] = (self.salts[sequence], tokens[: at + 1])
        self.blocks.commit(sequence, min(count, len(places)))
        self.writing[sequence] = places[count:]

    @precondition(lambda self: self.writers())
    @rule(index=st.integers(0, 20))
    def unreserve(self, index: int) -> None:
        sequence = self.writers()[index % len(self.writers())]
        self.blocks.unreserve(sequence)
        del self.writing[sequence]

    @precondition(lambda self: self.salts)
    @rule(index=st.integers(0, 20))
    def fork(self, index: int) -> None:
        sequence = self.pick(index)
        if not self.salts[sequence].startswith("own"):
            self.salts[self.blocks.fork(sequence)] = self.salts[sequence]

    @precondition(lambda self: self.salts)
    @rule(index=st.integers(0, 20), length=st.integers(1, 14))
    def truncate(self, index: int, length: int) -> None:
        sequence = self.pick(index)
        self.blocks.truncate(sequence, min(length, self.blocks.length(sequence)))
        self.writing.pop(sequence, None)

    @precondition(lambda self: self.salts)
    @rule(index=st.integers(0, 20), keep=st.booleans())
    def free(self, index: int, keep: bool) -> None:
        sequence = self.pick(index)
        tokens, computed = self.blocks.tokens(sequence), self.blocks.computed(sequence)
        salt = self.salts.pop(sequence)
        self.writing.pop(sequence, None)
        self.blocks.free(sequence, keep=keep)
        if keep and not salt.startswith("own"):
            assert tokens is not None
            assert self.blocks.match(tokens, salt) >= computed

    @precondition(lambda self: self.blocks.num_cached_blocks)
    @rule()
    def clear(self) -> None:
        self.blocks.clear()
        assert self.blocks.num_cached_blocks == 0

    @invariant()
    def everyone_reads_its_own_tokens(self) -> None:
        self.blocks.check()
        for sequence, salt in self.salts.items():
            tokens, table = self.blocks.tokens(sequence), self.blocks.blocks(sequence)
            assert tokens is not None
            for at in range(self.blocks.computed(sequence)):
                found = self.memory[table[at // T], at % T]
                assert found == (salt, tokens[: at + 1])

    def teardown(self) -> None:
        for sequence in self.salts:
            self.blocks.free(sequence)
        self.blocks.clear()
        assert self.blocks.num_free_blocks == self.blocks.num_blocks == self.blocks._free.count
        assert not self.blocks._tree._roots


BlockMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestBlocks = BlockMachine.TestCase
