"""Who has which blocks of a paged cache: sequences, and the prefixes that they leave behind.

A block holds the KV of ``block_tokens`` tokens of all layers. Blocks are counted: each sequence that
has one in its table counts once. Full blocks go into a radix tree when their KV has been computed,
and the last one when a sequence ends, so a prompt takes what another has computed, at once and to
the token. A block that no sequence has stays in the tree until its room is needed; the one that was
used longest ago goes first.

A sequence writes only behind what others may read: in a block of its own, or behind the tokens that
the tree has of it. Anything else is copied first. When there is no room for a copy, the tree forgets
the block instead.

One invariant makes eviction one step: who has a block of the tree has all blocks in front of it. A
sequence that computed what another published before takes the other's block and gives its own back.
So a block without users has nothing in use behind it, and as blocks are given back from the last to
the first, the one that was given back longest ago is a leaf.

There is no tensor and no I/O here: copies to be made are returned.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from operator import index

from respkv.paged.block_table import BlockStats, BlockTable, OutOfBlocks
from respkv.paged.free_blocks import FreeBlocks
from respkv.paged.prefix_tree import Node, PrefixTree


class BlockManager:
    """Blocks 0 to ``num_blocks`` - 1 of ``block_tokens`` tokens each."""

    def __init__(self, num_blocks: int, block_tokens: int, *, prefix_sharing: bool = True) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"{num_blocks} blocks of {block_tokens} tokens are no cache")
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.prefix_sharing = prefix_sharing
        self.stats = BlockStats()
        self._free, self._uses = FreeBlocks(num_blocks), [0] * num_blocks
        self._nodes: list[Node | None] = [None] * num_blocks
        # In the tree, of no sequence; used longest ago first. A dict's front is slow to find.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._tree = PrefixTree(block_tokens)
        self._sequences: dict[int, BlockTable] = {}
        self._next_id = 0

    # What is asked

    @property
    def num_free_blocks(self) -> int:
        """Return how many blocks a sequence can have now, cached ones included."""
        return self._free.count + len(self._idle)

    @property
    def num_cached_blocks(self) -> int:
        """Return how many blocks no sequence has and the tree keeps."""
        return len(self._idle)

    @property
    def num_shared_blocks(self) -> int:
        """Return how many blocks more than one sequence has."""
        return self.num_blocks - self._uses.count(0) - self._uses.count(1)

    def sequences(self) -> tuple[int, ...]:
        """Return the sequences that there are."""
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Return how many tokens are known, computed or not."""
        return self._get(sequence).length

    def computed(self, sequence: int) -> int:
        """Return how many tokens have their KV in the blocks."""
        return self._get(sequence).computed

    def tokens(self, sequence: int) -> tuple[int, ...] | None:
        """Return the tokens that are known; None when only their number is."""
        tokens = self._get(sequence).tokens
        return None if tokens is None else tuple(tokens)

    def has_ids(self, sequence: int) -> bool:
        """Whether the ids of the tokens are known, not just their number."""
        return self._get(sequence).tokens is not None

    def next_tokens(self, sequence: int, count: int) -> list[int]:
        """Return the first tokens that are not computed. Raises ValueError when they are fewer."""
        state = self._get(sequence)
        if state.tokens is None or not 1 <= count <= state.length - state.computed:
            known = "no ids" if state.tokens is None else f"{state.length - state.computed}"
            raise ValueError(
                f"of sequence {sequence} {known} tokens are to be computed, not {count}"
            )
        return state.tokens[state.computed : state.computed + count]

    def blocks(self, sequence: int) -> list[int]:
        """Return the block table; a list of the caller's own."""
        return list(self._get(sequence).blocks)

    def match(self, tokens: Sequence[int], salt: Hashable = "") -> int:
        """Return how many tokens the tree has the KV of."""
        return sum(common for _, common in self._find(tokens, salt))

    def blocks_needed(self, sequence: int, count: int) -> int:
        """Return how many blocks ``reserve`` would take for so many tokens.

        A copy counts as one, unless the tree can forget the block and there is no other room.
        """
        state = self._get(sequence)
        grown = self._grown(state, count)
        if not count or not self._must_copy(state):
            return grown
        is_own = self._uses[state.blocks[state.computed // self.block_tokens]] == 1
        return grown if is_own and grown == self.num_free_blocks else grown + 1

    def check_room(self, sequence: int, count: int) -> int:
        """Return ``blocks_needed``. Raises OutOfBlocks when these cannot be had."""
        needed = self.blocks_needed(sequence, count)
        if needed > self.num_free_blocks:
            raise OutOfBlocks(
                f"sequence {sequence} needs {needed} blocks for {count} tokens and"
                f" {self.num_free_blocks} of {self.num_blocks} can be had; free a sequence"
            )
        return needed

    # What is done

    def allocate(
        self,
        tokens: Sequence[int] | int,
        *,
        salt: Hashable = "",
        limit: int | None = None,
        share: bool = True,
    ) -> int:
        """Begin a sequence with the longest prefix of it that is there; return its id.

        tokens: of the prompt; or their number, and nothing is shared.
        limit:  the most tokens to take; all but the last when not given, as that one's logits
                take a forward pass.
        share:  whether to take from the tree, and leave anything there.
        Raises ValueError for a sequence of no tokens, TypeError for ids that are no integers.
        """
        ids = None if isinstance(tokens, int) else list(map(index, tokens))
        length = tokens if isinstance(tokens, int) else len(tokens)
        if length < 1:
            raise ValueError(f"a sequence of {length} tokens cannot be; it needs one at least")
        is_sharing = share and self.prefix_sharing and ids is not None
        state = BlockTable(ids, length, salt, is_sharing)
        if ids is not None and is_sharing:
            most = length - 1 if limit is None else min(limit, length)
            self._take_prefix(state, ids[: max(0, most)])
        self._next_id += 1
        self._sequences[self._next_id] = state
        return self._next_id

    def extend(self, sequence: int, tokens: Iterable[int] | int) -> None:
        """Say which tokens come next, or how many when their ids are not told.

        Raises ValueError for the other of the two, and for a number below 0.
        """
        state = self._get(sequence)
        if isinstance(tokens, int) != (state.tokens is None):
            raise ValueError(f"sequence {sequence} was begun with tokens of another kind")
        if isinstance(tokens, int):
            if tokens < 0:
                raise ValueError(f"{tokens} tokens cannot come next; truncate takes some back")
            state.length += tokens
        elif state.tokens is not None:
            state.tokens += list(map(index, tokens))
            state.length = len(state.tokens)

    def reserve(self, sequence: int, count: int) -> list[tuple[int, int]]:
        """Give a sequence room for its next ``count`` tokens; a second time it has it.

        Returns: the copies to make before anything else is asked of the manager.
        Raises OutOfBlocks when there is no room, and ValueError for more tokens than are known.
        """
        state = self._get(sequence)
        if not 0 <= count <= state.length - state.computed:
            left = state.length - state.computed
            raise ValueError(f"sequence {sequence} has {left} tokens to compute, not {count}")
        needed = self.check_room(sequence, count)
        at, copies = state.computed // self.block_tokens, list[tuple[int, int]]()
        must_copy = count > 0 and self._must_copy(state)
        if must_copy and needed == self._grown(state, count):
            self._forget(state.blocks[at])
            must_copy = False
        self._make_room(needed)
        if must_copy:
            old = state.blocks[at]
            [state.blocks[at]] = new = self._take(1, state.blocks[:at])
            copies = [(old, new[0])]
            self._release(old)
            self.stats.copies += 1
        state.blocks += self._take(self._grown(state, count), state.blocks)
        state.reserved = max(state.reserved, state.computed + count)
        return copies

    def unreserve(self, sequence: int) -> None:
        """Give back the blocks that nothing was computed into."""
        self._give_back(self._get(sequence))

    def commit(self, sequence: int, count: int) -> None:
        """Say that the KV of the next ``count`` tokens is there: full blocks can be shared now.

        Raises ValueError when they were not reserved.
        """
        state = self._get(sequence)
        if count < 0 or (count and state.computed + count > state.reserved):
            raise ValueError(f"{count} tokens of sequence {sequence} were not reserved")
        state.computed += count
        if state.is_sharing:
            while len(state.nodes) < state.computed // self.block_tokens:
                state.nodes.append(self._publish(state, self.block_tokens))

    def fork(self, sequence: int) -> int:
        """Begin a sequence that has what this one has computed, in the same blocks."""
        state = self._get(sequence)
        tokens = None if state.tokens is None else list(state.tokens)
        blocks = state.blocks[: -(-state.computed // self.block_tokens)]
        for block in blocks:
            self._uses[block] += 1
        self._next_id += 1
        self._sequences[self._next_id] = replace(
            state, tokens=tokens, blocks=blocks, nodes=list(state.nodes), reserved=state.computed
        )
        return self._next_id

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens from ``length`` on, and give back blocks that are not needed now."""
        state = self._get(sequence)
        if not 1 <= length <= state.length:
            raise ValueError(f"sequence {sequence} has {state.length} tokens, not {length} or more")
        state.length, state.computed = length, min(length, state.computed)
        if state.tokens is not None:
            del state.tokens[length:]
        del state.nodes[state.computed // self.block_tokens :]
        self._give_back(state)

    def free(self, sequence: int, *, keep: bool = True) -> None:
        """End a sequence.

        keep: whether the tree takes its last block as well, which is not full.
        """
        state = self._get(sequence)
        tail = state.computed % self.block_tokens
        if keep and tail and state.is_sharing:
            self._publish(state, tail)
        self._release_from(state, 0)
        del self._sequences[sequence]

    def clear(self) -> int:
        """Drop all blocks that no sequence has; return how many these were."""
        dropped = len(self._idle)
        while self._idle:
            self._evict()
        return dropped

    def check(self) -> None:
        """Assert that every block is counted right. For tests, and when something looks wrong."""
        uses = [0] * self.num_blocks
        for state in self._sequences.values():
            for block in state.blocks:
                uses[block] += 1
            assert len(set(state.blocks)) == len(state.blocks)
            assert state.reserved <= len(state.blocks) * self.block_tokens
            at, used = divmod(state.computed, self.block_tokens)
            if used and state.reserved > state.computed and (node := self._nodes[state.blocks[at]]):
                assert len(node.tokens) <= used
            assert [node.block for node in state.nodes] == state.blocks[: len(state.nodes)]
        assert uses == self._uses
        in_tree = {node.block: node for node in self._tree}
        for node in in_tree.values():
            above = node.parent.block if node.parent is not None else -1
            assert above == -1 or uses[above] >= min(1, uses[node.block])
            assert not node.children or len(node.tokens) == self.block_tokens
        assert {b: n for b, n in enumerate(self._nodes) if n is not None} == in_tree
        assert set(self._idle) == {block for block in in_tree if not uses[block]}
        free = {b for low, high in self._free.intervals() for b in range(low, high)}
        assert len(free) == self._free.count
        assert free == {b for b in range(self.num_blocks) if not uses[b] and b not in in_tree}

    # How

    def _get(self, sequence: int) -> BlockTable:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise ValueError(
                f"there is no sequence {sequence}; it was freed or never was"
            ) from None

    def _find(self, tokens: Sequence[int], salt: Hashable) -> list[tuple[Node, int]]:
        """Find a prefix; the token that all prompts begin with is none, and not worth a copy."""
        path = self._tree.find(tokens, salt)
        if len(path) == 1 and path[0][1] < self.block_tokens // 4:
            return []
        return path

    def _grown(self, state: BlockTable, count: int) -> int:
        """Return how many blocks are missing at the end."""
        return max(0, -(-(state.computed + count) // self.block_tokens) - len(state.blocks))

    def _must_copy(self, state: BlockTable) -> bool:
        """Whether others may read where the next token would be written.

        Who has reserved the place keeps it: others that take the block afterwards read in front of it.
        """
        at, used = divmod(state.computed, self.block_tokens)
        if not used or state.reserved > state.computed:
            return False
        node = self._nodes[state.blocks[at]]
        return self._uses[state.blocks[at]] > 1 or (node is not None and used < len(node.tokens))

    def _take_prefix(self, state: BlockTable, wanted: list[int]) -> None:
        for node, common in self._find(wanted, state.salt):
            self._idle.pop(node.block, None)
            self._uses[node.block] += 1
            state.blocks.append(node.block)
            state.computed += common
            if common == self.block_tokens:
                state.nodes.append(node)
        self.stats.tokens_found += state.computed
        self.stats.tokens_missed += state.length - state.computed

    def _publish(self, state: BlockTable, count: int) -> Node:
        """Put the first block that is not in the tree there, or take the one that is."""
        assert state.tokens is not None
        at = len(state.nodes)
        first, block = at * self.block_tokens, state.blocks[at]
        parent = state.nodes[-1] if at else self._tree.root(state.salt)
        tokens = tuple(state.tokens[first : first + count])
        node, tail = self._tree.insert(parent, tokens, block)
        if tail is not None:
            self._nodes[tail.block] = None
            if tail.block in self._idle:
                del self._idle[tail.block]
                self._free.give_back(tail.block)
        if node.block == block:
            self._nodes[block] = node
        else:
            self._idle.pop(node.block, None)
            self._uses[node.block] += 1
            state.blocks[at] = node.block
            self._release(block)
        return node

    def _take(self, count: int, behind: list[int]) -> list[int]:
        taken = self._free.take(count, after=behind[-1] if behind else None)
        for block in taken:
            self._uses[block] = 1
        return taken

    def _give_back(self, state: BlockTable) -> None:
        """Give back what was reserved and not computed."""
        state.reserved = state.computed
        self._release_from(state, -(-state.computed // self.block_tokens))

    def _release_from(self, state: BlockTable, at: int) -> None:
        """Give back blocks, the last one first, so that it is the first to be evicted."""
        while len(state.blocks) > at:
            self._release(state.blocks.pop())

    def _release(self, block: int) -> None:
        self._uses[block] -= 1
        if not self._uses[block]:
            if self._nodes[block] is None:
                self._free.give_back(block)
            else:
                self._idle[block] = None

    def _make_room(self, count: int) -> None:
        while self._free.count < count:
            self._evict()
            self.stats.evictions += 1

    def _evict(self) -> None:
        """Drop the block that was used longest ago; nothing is behind it."""
        node = self._nodes[next(iter(self._idle))]
        assert node is not None
        self._drop(node)

    def _drop(self, node: Node) -> None:
        self._tree.remove(node)
        self._nodes[node.block] = None
        if node.block in self._idle:
            del self._idle[node.block]
            self._free.give_back(node.block)

    def _forget(self, block: int) -> None:
        """Take a block that a sequence has, and all behind it, out of the tree."""
        node = self._nodes[block]
        assert node is not None
        stack, found = [node], list[Node]()
        while stack:
            found.append(stack.pop())
            stack += found[-1].children.values()
        for each in reversed(found):
            self._drop(each)
