"""The ceiling: what a cache that knows the future would hit.

Belady's MIN with bypass: keep the blocks whose next use comes first, and never store one that is not
used again. A block is used whenever one behind it is, so its next use never comes later; of two that
come at once the deeper one goes first. So what is kept is always whole from the start of its chain,
and leaving blocks out of their chain could not help. For blocks of one size this is the optimum;
that a prompt's last block may be partly full is not looked at.

Source: Belady, A Study of Replacement Algorithms for a Virtual-Storage Computer, 1966; McFarling,
Cache Replacement with Dynamic Exclusion, 1992 (bypass).
"""

import heapq
from collections.abc import Sequence
from math import inf

from respkv.trace.format import Request

NEVER = inf


def next_uses(requests: Sequence[Request]) -> list[list[float]]:
    """Return for each stored block of each request the number of the next one with it, or NEVER."""
    coming: dict[int, int] = {}
    found: list[list[float]] = []
    for number in range(len(requests) - 1, -1, -1):
        blocks = requests[number].stored
        found.append([coming.get(block, NEVER) for block in blocks])
        coming.update(dict.fromkeys(blocks, number))
    found.reverse()
    return found


def last_requests(requests: Sequence[Request], block_tokens: int) -> list[bool]:
    """Say for each request whether it is its session's last: nothing goes on from where it ends.

    That is when its last whole block is in no later request. A block that is partly full is none
    that a next turn could share, because the next turn fills it.
    """
    is_last: list[bool] = []
    for request, uses in zip(requests, next_uses(requests), strict=True):
        whole = min(request.num_tokens // block_tokens, len(request.blocks))
        is_last.append(not uses or uses[max(whole - 1, 0)] == NEVER)
    return is_last


class Belady:
    """A cache of ``blocks_max`` blocks that knows when each block is used next."""

    def __init__(self, blocks_max: int) -> None:
        self.blocks_max = blocks_max
        self.num_stored = 0
        self._next: dict[int, float] = {}  # of what is resident
        self._heap: list[tuple[float, int, int]] = []  # minus next use, minus depth, block

    def serve(self, request: Request, uses: Sequence[float]) -> int:
        """Return how many blocks at the front were resident; then keep what is worth it.

        uses: for each block that it stores, the number of the next request with it.
        """
        resident = self._next
        blocks = request.blocks
        prefix = 0
        while prefix < len(blocks) and blocks[prefix] in resident:
            prefix += 1
        fresh: set[int] = set()
        for depth, (block, use) in enumerate(zip(request.stored, uses, strict=True)):
            if use == NEVER:
                resident.pop(block, None)
            else:
                if block not in resident:
                    fresh.add(block)
                resident[block] = use
                heapq.heappush(self._heap, (-use, -depth, block))
        while len(resident) > self.blocks_max:
            use, _, block = heapq.heappop(self._heap)
            if resident.get(block) == -use:
                del resident[block]
                fresh.discard(block)  # so it was never written
        self.num_stored += len(fresh)
        if len(self._heap) > 4 * len(resident) + 1024:
            self._heap = [item for item in self._heap if resident.get(item[2]) == -item[0]]
            heapq.heapify(self._heap)
        return prefix
