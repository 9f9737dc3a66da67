"""Which blocks are free, as intervals: sequences get blocks that lie side by side where that can be had.

Any block is as good as any other for a kernel that follows a table. For the rest neighbours are
worth having: keys of a run of blocks are one strided view, which a CPU attends to and a cache loads
into without a copy. So a sequence goes on right behind its last block while it can. When it cannot,
it moves to the middle of the longest gap, where it has room to go on and so has the one before it.
"""


class FreeBlocks:
    """The free ones of blocks 0 to ``num_blocks`` - 1; all of them at first."""

    def __init__(self, num_blocks: int) -> None:
        self.count = num_blocks
        self._stops = {0: num_blocks} if num_blocks else {}  # of the interval that starts there
        self._starts = {num_blocks: 0} if num_blocks else {}  # of the interval that stops there

    def intervals(self) -> list[tuple[int, int]]:
        """Return where the intervals of free blocks start and stop, in order."""
        return sorted(self._stops.items())

    def take(self, count: int, *, after: int | None = None) -> list[int]:
        """Take blocks, as far as possible in one run, behind block ``after`` if there is one.

        The caller has seen that there are so many.
        """
        assert count <= self.count, f"{count} blocks taken of {self.count} free ones"
        taken: list[int] = []
        if count and after is not None and after + 1 in self._stops:
            taken += self._cut(after + 1, after + 1, count)
        while len(taken) < count:
            rest = count - len(taken)
            start, stop = self._place(rest)
            first = start
            if after is not None and stop - start >= 2 * rest:
                first = (start + stop) // 2
            taken += self._cut(start, first, rest)
        return taken

    def give_back(self, block: int) -> None:
        """Make a block free, which was not."""
        start, stop = block, block + 1
        assert start not in self._stops, f"block {block} was free already"
        if stop in self._stops:
            stop = self._stops.pop(stop)
        if start in self._starts:
            start = self._starts.pop(start)
        self._stops[start], self._starts[stop] = stop, start
        self.count += 1

    def _place(self, count: int) -> tuple[int, int]:
        """Return the shortest interval of so many blocks, or else the longest."""
        fitting = [each for each in self._stops.items() if each[1] - each[0] >= count]
        if fitting:
            return min(fitting, key=lambda each: each[1] - each[0])
        return max(self._stops.items(), key=lambda each: each[1] - each[0])

    def _cut(self, start: int, first: int, count: int) -> list[int]:
        """Take at most ``count`` blocks from ``first`` on out of the interval at ``start``."""
        stop = self._stops.pop(start)
        del self._starts[stop]
        last = min(first + count, stop)
        for low, high in ((start, first), (last, stop)):
            if low < high:
                self._stops[low], self._starts[high] = high, low
        self.count -= last - first
        return list(range(first, last))
