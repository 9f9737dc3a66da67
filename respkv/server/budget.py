"""Memory that commands hold for values which have still to come from files.

Two kinds, bounded apart: what is brought for later (``take``, which may be refused), and what
commands hold that need several values at once (a ``Place`` in line). Without the line, many such
commands would each hold a part of what they need and wait for the rest, until all give up.
"""

from collections import deque

import anyio


class Budget:
    """Bytes of memory that are held for what is needed later.

    total_max: by all connections together, of each kind. each_max: by one of them.
    """

    def __init__(self, move_bytes_max: int, arena_bytes: int) -> None:
        self.used = 0  # of what was taken
        self.held = 0  # by the commands that have come in
        self._line: deque[Place] = deque()
        self.set_limits(move_bytes_max, arena_bytes)

    def set_limits(self, move_bytes_max: int, arena_bytes: int) -> None:
        """Change how much there is; what is held stays."""
        self.total_max = min(move_bytes_max, arena_bytes // 4)
        self.each_max = min(move_bytes_max // 4, arena_bytes // 8)

    def take(self, nbytes: int) -> bool:
        """Take a share if there is one."""
        if self.used + nbytes > self.total_max:
            return False
        self.used += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """End a share."""
        self.used -= nbytes
        assert self.used >= 0

    def line_up(self, nbytes: int) -> "Place":
        """Get in line for memory that a command needs at once; ``leave`` ends that.

        First come, first served; when nobody else holds any, the first may have whatever it needs.
        """
        place = Place(self, nbytes)
        self._line.append(place)
        self._let_in()
        return place

    def leave(self, place: "Place") -> None:
        """End what ``line_up`` began, wherever it is."""
        if place.is_in:
            place.is_in = False
            self.held -= place.nbytes
            assert self.held >= 0
        elif place in self._line:
            self._line.remove(place)
        self._let_in()

    def _let_in(self) -> None:
        while self._line and (not self.held or self.held + self._line[0].nbytes <= self.total_max):
            place = self._line.popleft()
            self.held += place.nbytes
            place.come_in()


class Place:
    """A command's place in line. Whoever got it has to ``leave`` it, once or more often."""

    __slots__ = ("_budget", "_event", "is_in", "nbytes")

    def __init__(self, budget: Budget, nbytes: int) -> None:
        self.nbytes = nbytes
        self.is_in = False
        self._budget = budget
        self._event = anyio.Event()

    def come_in(self) -> None:
        """Let it go on."""
        self.is_in = True
        self._event.set()

    async def wait(self) -> None:
        """Wait until it has what it needs."""
        if not self.is_in:
            await self._event.wait()

    def leave(self) -> None:
        """Give all back, or wait no more."""
        self._budget.leave(self)
