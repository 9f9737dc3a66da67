"""Free blocks: each is had by one at a time, and neighbours go together."""

from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.paged.free_blocks import FreeBlocks


def test_blocks_come_in_one_run_where_there_is_one() -> None:
    free = FreeBlocks(10)
    assert free.take(4) == [0, 1, 2, 3]
    assert free.take(2, after=3) == [4, 5]
    for block in (1, 2):
        free.give_back(block)
    assert free.take(2) == [1, 2]  # the gap that fits, not the large one


def test_a_sequence_that_cannot_go_on_moves_to_where_both_can() -> None:
    free = FreeBlocks(100)
    first, second = free.take(2), free.take(2)
    grown = free.take(1, after=first[-1])
    assert grown == [52]
    assert free.take(3, after=52) == [53, 54, 55]
    assert free.take(3, after=second[-1]) == [4, 5, 6]


def test_what_does_not_fit_in_one_run_comes_in_few() -> None:
    free = FreeBlocks(7)
    free.take(7)
    for block in (0, 2, 3, 5, 6):
        free.give_back(block)
    assert free.take(4) == [2, 3, 5, 6]
    assert free.intervals() == [(0, 1)]


@given(st.data())
@settings(deadline=None)
def test_any_order_of_taking_and_giving_back_loses_nothing(data: st.DataObject) -> None:
    free, taken = FreeBlocks(12), list[int]()
    for _ in range(data.draw(st.integers(0, 20))):
        is_given_back: bool = data.draw(st.booleans())
        if taken and is_given_back:
            free.give_back(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        else:
            after = data.draw(st.sampled_from([None, *taken]))
            taken += free.take(data.draw(st.integers(0, free.count)), after=after)
        left = [block for low, high in free.intervals() for block in range(low, high)]
        assert sorted([*left, *taken]) == list(range(12))
        assert free.count == len(left)
        ends = [high for _, high in free.intervals()]
        assert not {low for low, _ in free.intervals()} & set(ends)  # neighbours are one interval
