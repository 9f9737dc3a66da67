"""W-TinyLFU against its definition with lists, and its sketch against exact counts."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.engine.eviction import RECHECKS
from respkv.engine.sketch import COUNT_MAX, KEYS_MIN, PLACES, SAMPLE, Sketch
from respkv.engine.tinylfu import LOOKS_AHEAD, PROTECTED_SHARE
from tests.engine.test_eviction import Shelf, Writable, filled


class NaiveTinyLfu:
    """A window of one, a segmented lru, and exact counts; lists, coldest first.

    Uses move entries when somebody has to go, in the order in which they were used last.
    """

    def __init__(self) -> None:
        self.window: list[str] = []
        self.probation: list[str] = []
        self.protected: list[str] = []
        self.counts: Counter[str] = Counter()
        self.used: list[str] = []

    def put(self, key: str) -> None:
        self.counts[key] += 1
        self.window.append(key)
        while len(self.window) > 1:
            self.probation.append(self.window.pop(0))

    def use(self, key: str) -> None:
        self.counts[key] += 1
        if key in self.window:
            self.window.remove(key)
            self.window.append(key)
        else:
            self.used = [*(each for each in self.used if each != key), key]

    def settle(self) -> None:
        for key in self.used:
            (self.probation if key in self.probation else self.protected).remove(key)
            self.protected.append(key)
        self.used.clear()
        protected_max = int((len(self.probation) + len(self.protected)) * PROTECTED_SHARE)
        while len(self.protected) > protected_max:
            self.probation.append(self.protected.pop(0))

    def evict(self) -> str:
        self.settle()
        main = self.probation or self.protected
        if not main:
            return self.window.pop(0)
        if not self.window:
            return main.pop(0)
        if min(self.counts[self.window[0]], COUNT_MAX) <= min(self.counts[main[0]], COUNT_MAX):
            return self.window.pop(0)
        key = main.pop(0)
        self.probation.append(self.window.pop(0))
        return key


@settings(max_examples=300, deadline=None)
@given(
    accesses=st.lists(st.integers(0, 20).map(str), max_size=150),
    capacity=st.integers(1, 15),
)
def test_random_traces_go_as_defined(accesses: list[str], capacity: int) -> None:
    shelf, naive = Shelf("wtinylfu"), NaiveTinyLfu()
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


def test_a_newcomer_has_to_be_used_more_than_what_it_would_replace() -> None:
    shelf = Shelf("wtinylfu")
    for key in "abcd":
        shelf.put(key)
        shelf.use(shelf.entries[key])
    for number in range(10):
        shelf.evict()
        shelf.put(f"once{number}")
    assert set("abc") <= shelf.entries.keys()
    for number in range(6):  # what comes again and again is let in
        for key in ("e", f"other{number}"):
            if key not in shelf.entries:
                shelf.evict()
                shelf.put(key)
    assert "e" in shelf.entries


def test_what_is_set_aside_from_the_window_costs_the_main_part_nothing() -> None:
    shelf = filled("wtinylfu", (f"main{number}" for number in range(400)))
    for entry in shelf.entries.values():
        shelf.use(entry)
    for number in range(2):  # two prompts fill the window, and their first pages may not go yet
        first = shelf.put(f"{number}:1")
        shelf.put(f"{number}:2", behind=first)
    assert [shelf.evict() for _ in range(4)] == ["0:2", "0:1", "1:2", "1:1"]
    shelf.check()


@settings(max_examples=100, deadline=None)
@given(names=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=300))
def test_a_sketch_never_counts_too_little(names: list[int]) -> None:
    sketch, exact = Sketch(), Counter(names)
    sketch.grow(10)
    for name in names:
        sketch.add(name, 1)
    assert all(sketch.count(name) >= min(exact[name], COUNT_MAX) for name in exact)


def test_a_sketch_keeps_its_counts_when_it_grows_and_halves_them_in_time() -> None:
    sketch = Sketch()
    assert (sketch.count(5), sketch.nbytes) == (0, 0)
    sketch.grow(10)
    sketch.add(5, 8)
    sketch.grow(3 * KEYS_MIN)
    assert sketch.width == 4 * KEYS_MIN * PLACES
    assert sketch.count(5) == 8
    sketch.add(6, SAMPLE * sketch.num_keys - 8)
    assert sketch.count(5) == 4
    assert sketch.count(6) == COUNT_MAX // 2


# What every policy promises of whom it sets aside (test_eviction.py), in this one's order: the newest,
# which is alone in the window, goes before what was never used either, and then the oldest.


def test_a_priority_counts_before_the_window() -> None:
    shelf = filled("wtinylfu", "abcd")
    shelf.entries["d"].priority = 2
    shelf.entries["b"].priority = 1
    assert [shelf.evict(), shelf.evict()] == ["a", "c"]
    shelf.put("e", priority=3)
    shelf.entries["e"].priority = 0
    shelf.policy.insert(shelf.entries["e"])
    shelf.check()
    assert shelf.drain() == ["e", "b", "d"]


def test_an_overwritten_entry_is_the_newest() -> None:
    shelf = filled("wtinylfu", "abc")
    entry = shelf.entries["a"]
    shelf.policy.remove(entry)
    entry.touched = shelf.now + 1
    shelf.policy.insert(entry)
    assert shelf.drain() == ["b", "c", "a"], "it was counted twice"


def test_the_end_of_a_hold_is_noticed_while_newer_ones_can_go() -> None:
    shelf = filled("wtinylfu", (f"held{number}" for number in range(10 * RECHECKS)))
    shelf.held.update(shelf.entries.values())
    for number in range(100):
        shelf.put(f"free{number}")
    first = shelf.evict()
    assert first is not None
    assert first.startswith("free")
    shelf.held.clear()
    victims = [shelf.evict() for _ in range(20)]
    assert any(key is not None and key.startswith("held") for key in victims)


def test_what_is_not_written_is_passed_over_in_the_window_too() -> None:
    shelf = Writable("wtinylfu")
    for key in "abcd":
        shelf.put(key)
    shelf.unwritten = {"d", "a"}
    assert [shelf.evict(), shelf.evict()] == ["b", "c"]
    shelf.check()
    assert shelf.evict() is None
    shelf.unwritten = {"a"}
    shelf.policy.insert(shelf.entries["d"])
    assert shelf.evict() == "d"
    assert shelf.evict_last() == "a"
    for key in "efg":
        shelf.put(key)
    shelf.unwritten = set("efg")
    assert shelf.evict() is None
    shelf.unwritten.clear()
    shelf.policy.release()
    shelf.check()
    assert sorted(shelf.drain()) == ["e", "f", "g"]
