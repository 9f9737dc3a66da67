"""Pages by their tokens: the longest common beginning, against a look at every page."""

from hypothesis import given
from hypothesis import strategies as st

from respkv.chain import pack_tokens
from respkv.engine.branches import Branches
from respkv.engine.entry import Entry

pages = st.lists(st.sampled_from([0, 1, 256, 65536]), min_size=1, max_size=5).map(tuple)


def page(tokens: tuple[int, ...], branch: bytes = b"branch") -> Entry:
    entry = Entry(b"%b:%r" % (branch, tokens), "kvpage", 1, 0.0)
    entry.branch, entry.token_ids, entry.tokens = branch, pack_tokens(tokens), len(tokens)
    entry.value = b"x"  # in memory
    return entry


def branches_of(all_tokens: set[tuple[int, ...]]) -> Branches:
    branches = Branches()
    for tokens in all_tokens:
        branches.insert(page(tokens))
    return branches


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


@given(st.sets(pages, max_size=12), pages)
def test_the_longest_common_beginning_is_found(
    present: set[tuple[int, ...]], wanted: tuple[int, ...]
) -> None:
    branches = branches_of(present)
    branches.check()
    found, count = branches.find(b"branch", pack_tokens(wanted))
    assert count == max((common(each, wanted) for each in present), default=0)
    assert (found is None) == (count == 0)
    assert branches.find(b"other", pack_tokens(wanted)) == (None, 0)


@given(st.sets(pages, max_size=12), pages, st.integers(1, 12))
def test_the_nearest_are_those_with_the_longest_common_beginnings(
    present: set[tuple[int, ...]], wanted: tuple[int, ...], count_max: int
) -> None:
    branches = branches_of(present)
    near = branches.near(b"branch", pack_tokens(wanted), count_max)
    expected = sorted(filter(None, (common(each, wanted) for each in present)), reverse=True)
    assert [count for _, count in near] == expected[:count_max]
    assert len({entry.token_ids for entry, _ in near}) == len(near)
    assert all(entry.token_ids[: 4 * count] == pack_tokens(wanted[:count]) for entry, count in near)


@given(st.sets(pages, min_size=1, max_size=12))
def test_all_beginnings_and_a_continuation_are_found(present: set[tuple[int, ...]]) -> None:
    branches = branches_of(present)
    for entry in branches.all():
        tokens = entry.token_ids
        beginnings = [each.token_ids for each in branches.beginnings(entry)]
        expected = [
            pack_tokens(each)
            for each in sorted(present, key=len, reverse=True)
            if tokens.startswith(pack_tokens(each)) and pack_tokens(each) != tokens
        ]
        assert beginnings == expected
        longer = branches.continuation(entry)
        goes_on = [
            each for each in map(pack_tokens, present) if each.startswith(tokens) and each != tokens
        ]
        assert (longer is not None) == bool(goes_on)
        assert longer is None or longer.token_ids in goes_on


@given(st.lists(st.tuples(st.booleans(), pages), max_size=30))
def test_pages_come_and_go(steps: list[tuple[bool, tuple[int, ...]]]) -> None:
    branches, present = Branches(), dict[tuple[int, ...], Entry]()
    for comes, tokens in steps:
        if comes:
            branches.insert(present.setdefault(tokens, page(tokens)))
        elif tokens in present:
            branches.remove(present.pop(tokens))
        else:
            branches.remove(page(tokens))
        branches.check()
        assert set(branches.all()) == set(present.values())
        assert len(branches) == len(present)
    branches.clear()
    assert not list(branches.all())


def test_of_two_that_share_as_much_the_one_in_memory_is_taken() -> None:
    branches = Branches()
    cold, warm = page((1, 2, 1)), page((1, 2, 256))
    cold.value = None
    branches.insert(cold)
    branches.insert(warm)
    for wanted in ((1, 2), (1, 2, 0), (1, 2, 2), (1, 2, 257)):
        assert branches.find(b"branch", pack_tokens(wanted))[1] == 2
    between = branches.find(b"branch", pack_tokens((1, 2, 65536)))
    assert between[0] is warm
    assert cold.token_ids > warm.token_ids


def test_pages_with_the_same_tokens_under_two_keys_do_not_disturb_each_other() -> None:
    branches, one, other = Branches(), page((1, 2)), page((1, 2))
    other.key = b"another"
    branches.insert(one)
    branches.insert(other)
    branches.check()
    branches.remove(one)
    assert branches.find(b"branch", pack_tokens((1, 2, 3))) == (other, 2)
