"""The radix tree of blocks: the longest common beginning is found, whatever hangs beside it."""

from hypothesis import given
from hypothesis import strategies as st

from respkv.paged.prefix_tree import PrefixTree, common_tokens

T = 3
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=12)


def add(tree: PrefixTree, tokens: list[int], salt: str = "") -> None:
    node = tree.root(salt)
    for first in range(0, len(tokens), T):
        node, _ = tree.insert(node, tuple(tokens[first : first + T]), first)


@given(PROMPTS, st.lists(st.integers(0, 2), max_size=9))
def test_the_longest_common_prefix_of_all_is_found(
    prompts: list[list[int]], want: list[int]
) -> None:
    tree = PrefixTree(T)
    for tokens in prompts:
        add(tree, tokens)
    longest = max((common_tokens(tuple(each), tuple(want)) for each in prompts), default=0)
    path = tree.find(want, "")
    assert sum(common for _, common in path) == longest
    assert [token for node, common in path for token in node.tokens[:common]] == want[:longest]


@given(PROMPTS)
def test_no_child_begins_with_all_of_its_sibling(prompts: list[list[int]]) -> None:
    tree = PrefixTree(T)
    for tokens in prompts:
        add(tree, tokens)
    for node in [*tree, tree.root("")]:
        assert node.order == sorted(node.children)
        for one, other in zip(node.order, node.order[1:], strict=False):
            assert other[: len(one)] != one


def test_nothing_is_left_of_a_salt_whose_blocks_have_gone() -> None:
    tree = PrefixTree(T)
    add(tree, [1, 2, 3, 4], "a")
    add(tree, [1, 2, 3, 4], "b")
    for node, _ in reversed(tree.find([1, 2, 3, 4], "a")):
        tree.remove(node)
    assert (tree.find([1], "a"), len(tree.find([1], "b"))) == ([], 1)
    assert len(list(tree)) == 2
    assert tree._roots.keys() == {"b"}
