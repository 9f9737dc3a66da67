"""What a sequence has of a paged cache, what is counted, and the error when there is no more."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from respkv.errors import OutOfMemory
from respkv.paged.prefix_tree import Node


class OutOfBlocks(OutOfMemory):
    """There are not enough blocks, even if all that nobody uses are evicted. Nothing was changed."""


@dataclass(slots=True)
class BlockStats:
    """What happened since the start.

    tokens_found:  of the prompts that came, how many the tree had the KV of.
    tokens_missed: and how many not.
    copies:        blocks that were copied because others could read them.
    evictions:     blocks that were taken out of the tree for their room.
    """

    tokens_found: int = 0
    tokens_missed: int = 0
    copies: int = 0
    evictions: int = 0


@dataclass(slots=True)
class BlockTable:
    """A sequence.

    tokens:   their ids; None when only their number is known, and then nothing is shared.
    computed: how many of them have their KV in the blocks.
    reserved: up to which token it may write: nobody else will, in these places, while it has them.
    nodes:    of the prefix tree, for the first blocks: all that are full, once they are computed.
    """

    tokens: list[int] | None
    length: int
    salt: Hashable
    is_sharing: bool
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    reserved: int = 0
