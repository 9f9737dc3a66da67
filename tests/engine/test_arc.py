"""ARC against the paper's algorithm with lists, in the order of an engine: evict, then store."""

from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.engine.arc import LOOKS_AHEAD
from tests.engine.test_eviction import Shelf


class NaiveArc:
    """Figure 4 of the paper, oldest first; room is made before the newcomer is known."""

    def __init__(self) -> None:
        self.once: list[str] = []
        self.again: list[str] = []
        self.ghost_once: list[str] = []
        self.ghost_again: list[str] = []
        self.target = 0.0

    def put(self, key: str) -> None:
        size = len(self.once) + len(self.again) + 1
        b1, b2 = self.ghost_once, self.ghost_again
        if key in b1:
            self.target = min(self.target + max(1.0, len(b2) / len(b1)), size)
            b1.remove(key)
            self.again.append(key)
        elif key in b2:
            self.target = max(self.target - max(1.0, len(b1) / len(b2)), 0.0)
            b2.remove(key)
            self.again.append(key)
        else:
            while b1 and len(self.once) + len(b1) >= size:
                del b1[0]
            while b2 and len(b1) + len(b2) > size:
                del b2[0]
            self.once.append(key)

    def use(self, key: str) -> None:
        (self.once if key in self.once else self.again).remove(key)
        self.again.append(key)

    def evict(self) -> str:
        if self.once and (len(self.once) > self.target or not self.again):
            key = self.once.pop(0)
            self.ghost_once.append(key)
        else:
            key = self.again.pop(0)
            self.ghost_again.append(key)
        return key


@settings(max_examples=300, deadline=None)
@given(
    accesses=st.lists(st.integers(0, 20).map(str), max_size=150),
    capacity=st.integers(1, 15),
)
def test_random_traces_go_as_in_the_paper(accesses: list[str], capacity: int) -> None:
    shelf, naive = Shelf("arc"), NaiveArc()
    assert capacity <= LOOKS_AHEAD
    for key in accesses:
        if key in shelf.entries:
            shelf.use(shelf.entries[key])
            naive.use(key)
            continue
        if len(shelf.entries) == capacity:
            assert shelf.evict() == naive.evict()
        shelf.put(key)
        naive.put(key)
    shelf.check()
    left = shelf.drain()
    assert left == [naive.evict() for _ in left]


def test_a_scan_does_not_drive_out_what_is_used_again() -> None:
    shelf = Shelf("arc")
    for key in "abcd":
        shelf.put(key)
    for key in "abcd":
        shelf.use(shelf.entries[key])
    for number in range(50):
        if len(shelf.entries) == 8:
            shelf.evict()
        shelf.put(f"scan{number}")
    assert set("abcd") <= shelf.entries.keys()


def test_ghosts_are_at_most_as_many_as_entries() -> None:
    shelf = Shelf("arc")
    for number in range(300):
        if len(shelf.entries) == 10:
            shelf.evict()
        shelf.put(str(number))
        shelf.use(shelf.entries[str(number)])
        if number % 3 == 0 and str(number - 15) not in shelf.entries:
            shelf.evict()
            shelf.put(str(number - 15))
    assert shelf.policy.ghost_bytes < 100 * 40 + 1000
