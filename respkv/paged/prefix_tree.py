"""Which blocks hold which prefixes: a radix tree over tokens, an edge for each block.

A node is a block and the tokens in it; the path from the root is the prefix that the block's KV was
computed after, so two prompts share a block exactly if they begin alike. Inner nodes are full
blocks. Leaves may be tails, of fewer tokens. Among the children of a node the one with the longest
common beginning stands next to where the wanted tokens would stand in sorted order, so prompts match
to the token, not to the block, at the cost of one bisection.

No child begins with all tokens of a sibling: the longer one serves whom the shorter one did.
Source: Zheng et al., SGLang, arXiv:2312.07104 (radix attention); nodes of one block are vLLM's.
"""

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Node:
    """A block of tokens after those of ``parent``; roots have neither."""

    tokens: Tokens
    block: int
    parent: "Node | None"
    children: dict[Tokens, "Node"] = field(default_factory=dict)
    order: list[Tokens] = field(default_factory=list)  # of the children's tokens


class PrefixTree:
    """Prefixes in blocks of ``block_tokens``; those of different salts never meet."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._roots: dict[Hashable, Node] = {}
        self._salts: dict[Node, Hashable] = {}

    def root(self, salt: Hashable) -> Node:
        """Return where prefixes with this salt begin; it stays while something hangs on it."""
        if salt not in self._roots:
            self._roots[salt] = root = Node((), -1, None)
            self._salts[root] = salt
        return self._roots[salt]

    def find(self, tokens: Sequence[int], salt: Hashable) -> list[tuple[Node, int]]:
        """Return the nodes of the longest prefix, and how many tokens of each are of it.

        All but the last are full blocks and count as a whole.
        """
        node, path, done = self._roots.get(salt), list[tuple[Node, int]](), 0
        while node is not None and done < len(tokens):
            want = tuple(tokens[done : done + self._block_tokens])
            node, common = _nearest(node, want)
            if node is None:
                break
            path.append((node, common))
            done += common
            if common < self._block_tokens:
                break
        return path

    def insert(self, parent: Node, tokens: Tokens, block: int) -> tuple[Node, Node | None]:
        """Add a block after ``parent``, unless a node there begins with its tokens already.

        Returns: the node that holds the tokens now, and the tail that it took the place of.
        """
        at = bisect_left(parent.order, tokens)
        if at < len(parent.order) and parent.order[at][: len(tokens)] == tokens:
            return parent.children[parent.order[at]], None
        tail = None
        if at and tokens[: len(parent.order[at - 1])] == parent.order[at - 1]:
            at -= 1
            tail = parent.children.pop(parent.order.pop(at))
        node = parent.children[tokens] = Node(tokens, block, parent)
        parent.order.insert(at, tokens)
        return node, tail

    def remove(self, node: Node) -> None:
        """Take out a leaf."""
        assert not node.children, f"block {node.block} has others after it"
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens], parent.order[bisect_left(parent.order, node.tokens)]
        if parent in self._salts and not parent.children:
            del self._roots[self._salts.pop(parent)]

    def __iter__(self) -> Iterator[Node]:
        """Go over all nodes but the roots, parents first."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack += node.children.values()


def _nearest(node: Node, want: Tokens) -> tuple[Node | None, int]:
    """Return the child that begins with most of the tokens, and how many these are."""
    exact = node.children.get(want)
    if exact is not None:
        return exact, len(want)
    at = bisect_left(node.order, want)
    best, most = None, 0
    for tokens in node.order[max(0, at - 1) : at + 1]:
        common = common_tokens(tokens, want)
        if common > most:
            best, most = node.children[tokens], common
    return best, most


def common_tokens(one: Tokens, other: Tokens) -> int:
    """Return how many tokens two tuples begin with alike."""
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return min(len(one), len(other))
