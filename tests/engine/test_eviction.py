"""Eviction policies: known victims, the papers' rules spelled out naively, and random engines."""

import random
from collections.abc import Iterable
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from respkv.engine.entry import Entry
from respkv.engine.eviction import POLICIES, RECHECKS, Verdict, make_policy
from respkv.engine.queues import HEAP_SLACK, LOOKS_MAX

every_policy = pytest.mark.parametrize("name", POLICIES)
# Of what was never used the oldest goes first; wtinylfu lets go of the newest.
every_policy_in_order = pytest.mark.parametrize(
    "name", [name for name in POLICIES if name != "wtinylfu"]
)


class Shelf:
    """An engine without bytes: it keeps a policy's contract and nothing else.

    Every call takes a second. A use of a page uses the pages it stands behind, too.
    """

    def __init__(self, name: str) -> None:
        self.policy = make_policy(name)
        self.entries: dict[str, Entry] = {}
        self.held: set[Entry] = set()
        self.now = 0.0
        self.num_verdicts = 0

    def put(self, key: str, *, behind: Entry | None = None, priority: int = 0) -> Entry:
        self.now += 1.0
        entry = self.entries[key] = Entry(key.encode(), "kvpage", 1, self.now)
        entry.priority = priority
        if behind is not None:
            entry.parent = behind
            behind.children = behind.children or set()
            behind.children.add(entry)
        self.policy.insert(entry)
        return entry

    def use(self, entry: Entry) -> None:
        self.now += 1.0
        page: Entry | None = entry
        while page is not None:
            page.touched = self.now
            page.hits += 1
            page = page.parent

    def delete(self, entry: Entry) -> None:
        self.policy.remove(entry)
        del self.entries[entry.key.decode()]
        self.held.discard(entry)
        for child in entry.children or ():
            child.parent = None
        entry.children = None
        parent, entry.parent = entry.parent, None
        if parent is not None:
            assert parent.children is not None
            parent.children.remove(entry)
            if not parent.children:
                self.policy.insert(parent)

    def verdict(self, entry: Entry) -> Verdict:
        self.num_verdicts += 1
        if entry.children:
            return Verdict.PARENT
        return Verdict.HELD if entry in self.held else Verdict.EVICT

    def evict(self) -> str | None:
        self.now += 1.0
        victim = self.policy.victim(self.verdict, self.now)
        if victim is None:
            return None
        assert not victim.children
        assert victim not in self.held
        self.delete(victim)
        return victim.key.decode()

    def drain(self) -> list[str]:
        victims: list[str] = []
        while (victim := self.evict()) is not None:
            victims.append(victim)
        return victims

    def check(self) -> None:
        self.policy.check(list(self.entries.values()))


def filled(name: str, keys: Iterable[str]) -> Shelf:
    shelf = Shelf(name)
    for key in keys:
        shelf.put(key)
    return shelf


# "+a" stores a, "a" uses it, "-" evicts one.
KNOWN = [
    ("lru", "+a +b +c a - - -", "b c a"),
    ("lru", "+a +b +c - +a b - - -", "a c a b"),
    ("fifo", "+a +b +c a a - +a - - -", "a b c a"),
    ("lfu", "+a +b +c a a b - - -", "c b a"),
    ("lfu", "+a +b +c b a c - - -", "b a c"),
    # a's rank is 4. Each victim's rank is what the next newcomer starts from.
    ("lfu", "+a a a a +n - +o - +p - +q -", "n o p a"),
    ("sieve", "+a +b +c - - -", "a b c"),
    # The hand passes a, takes b, passes c, takes d, meets e, and starts over at a.
    ("sieve", "+a +b +c +d a c - +e - - - -", "b d e a c"),
    ("sieve", "+a +b +c a b c - - -", "a b c"),
    # A use behind the hand counts in the next round.
    ("sieve", "+a +b +c +d a b - a - - -", "c d b a"),
    # One use in the small queue is not enough, two move to the main queue.
    ("s3fifo", "+a +b +c a b b - - -", "a c b"),
    # a comes back while the ghost knows it, so it is in the main queue at once.
    ("s3fifo", "+a +b +c - +a - - -", "a b c a"),
    # The main queue counts to three: six uses of a are worth no more than three of c.
    (
        "s3fifo",
        "+a +b +c +d a a b b c c d d +e - a a a a a a b b c c c - - - -",
        "e d b a c",
    ),
]


@pytest.mark.parametrize(("name", "steps", "victims"), KNOWN)
def test_victims_of_short_traces(name: str, steps: str, victims: str) -> None:
    shelf = Shelf(name)
    found: list[str | None] = []
    for step in steps.split():
        if step == "-":
            found.append(shelf.evict())
        elif step.startswith("+"):
            shelf.put(step[1:])
        else:
            shelf.use(shelf.entries[step])
        shelf.check()
    assert found == victims.split()


class NaiveSieve:
    """SIEVE as the paper draws it: one line, newest first, a visited bit each, and a hand."""

    def __init__(self) -> None:
        self.line: list[str] = []
        self.visited: set[str] = set()
        self.hand: str | None = None

    def put(self, key: str) -> None:
        self.line.insert(0, key)

    def use(self, key: str) -> None:
        self.visited.add(key)

    def evict(self) -> str:
        key = self.line[-1] if self.hand is None else self.hand
        while key in self.visited:
            self.visited.remove(key)
            key = self.line[self.line.index(key) - 1]
        place = self.line.index(key)
        self.hand = self.line[place - 1] if place else None
        del self.line[place]
        return key


class NaiveS3Fifo:
    """S3-FIFO's algorithm 1 with lists, oldest first, and counters written at each use."""

    def __init__(self) -> None:
        self.small: list[str] = []
        self.main: list[str] = []
        self.ghost: list[str] = []
        self.frequency: dict[str, int] = {}

    def put(self, key: str) -> None:
        self.frequency[key] = 0
        if key in self.ghost:
            self.ghost.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)

    def use(self, key: str) -> None:
        self.frequency[key] = min(self.frequency[key] + 1, 3)

    def evict(self) -> str:
        while True:
            if len(self.small) / len(self.small + self.main) >= 0.1:
                key = self.small.pop(0)
                if self.frequency[key] <= 1:
                    self.ghost.append(key)
                    break
                self.frequency[key] = 0
            else:
                key = self.main.pop(0)
                if not self.frequency[key]:
                    break
                self.frequency[key] -= 1
            self.main.append(key)
        num_resident = len(self.small + self.main)
        del self.ghost[: max(len(self.ghost) - num_resident, 0)]
        return key


class NaiveLru:
    def __init__(self) -> None:
        self.line: list[str] = []

    def put(self, key: str) -> None:
        self.line.append(key)

    def use(self, key: str) -> None:
        self.line.remove(key)
        self.line.append(key)

    def evict(self) -> str:
        return self.line.pop(0)


class NaiveFifo(NaiveLru):
    def use(self, key: str) -> None:
        pass


NAIVE: dict[str, type[NaiveLru | NaiveSieve | NaiveS3Fifo]] = {
    "lru": NaiveLru,
    "fifo": NaiveFifo,
    "sieve": NaiveSieve,
    "s3fifo": NaiveS3Fifo,
}


@pytest.mark.parametrize("name", NAIVE)
@settings(max_examples=150, deadline=None)
@given(
    accesses=st.lists(st.integers(0, 20).map(str), max_size=150),
    capacity=st.integers(1, 15),
)
def test_random_traces_go_as_in_the_paper(name: str, accesses: list[str], capacity: int) -> None:
    shelf, naive = Shelf(name), NAIVE[name]()
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


@st.composite
def forests(draw: st.DrawFn) -> list[int]:
    """Draw for each page the number of the page it stands behind, or -1."""
    size = draw(st.integers(1, 40))
    return [draw(st.integers(-1, number - 1)) for number in range(size)]


@every_policy
@settings(max_examples=100, deadline=None)
@given(
    behind=forests(), touches=st.lists(st.integers(0, 39)), order=st.randoms(use_true_random=False)
)
def test_pages_go_before_the_page_they_stand_behind(
    name: str, behind: list[int], touches: list[int], order: random.Random
) -> None:
    """Whatever was touched when: single pages here, not the prefix with them."""
    shelf = Shelf(name)
    pages: list[Entry] = []
    for number, parent in enumerate(behind):
        pages.append(shelf.put(str(number), behind=pages[parent] if parent >= 0 else None))
    for number in touches:
        page = pages[number % len(pages)]
        page.touched, page.hits = float(order.randrange(100)), page.hits + 1
    victims = [int(key) for key in shelf.drain()]
    assert sorted(victims) == list(range(len(pages)))
    for number, parent in enumerate(behind):
        assert parent < 0 or victims.index(number) < victims.index(parent)


@every_policy
def test_lower_priorities_go_first(name: str) -> None:
    shelf = Shelf(name)
    for number, priority in enumerate([2, 0, 1, 0, -1, 2, 1]):
        shelf.put(str(number), priority=priority)
    for key in "134":
        shelf.use(shelf.entries[key])
        shelf.use(shelf.entries[key])
    assert [shelf.entries[key].priority for key in "0123456"] == [2, 0, 1, 0, -1, 2, 1]
    assert shelf.policy.age(shelf.now)[0] == 1
    victims = shelf.drain()
    assert victims[0] == "4"
    assert set(victims[1:3]) == {"1", "3"}
    assert set(victims[3:5]) == {"2", "6"}


@every_policy_in_order
def test_a_priority_that_rises_counts_at_once_and_one_that_falls_when_told(name: str) -> None:
    shelf = filled(name, "abcd")
    shelf.entries["a"].priority = 2
    shelf.entries["b"].priority = 1
    assert shelf.evict() == "c"
    assert shelf.evict() == "d"
    shelf.put("e", priority=3)
    shelf.entries["e"].priority = 0
    shelf.policy.insert(shelf.entries["e"])
    shelf.check()
    assert shelf.drain() == ["e", "b", "a"]


@every_policy
def test_inserting_again_changes_nothing(name: str) -> None:
    once, often = filled(name, "abcdef"), filled(name, "abcdef")
    for shelf in (once, often):
        for key in "bdbd":
            shelf.use(shelf.entries[key])
        assert shelf.evict() is not None
        if shelf is often:
            for entry in shelf.entries.values():
                shelf.policy.insert(entry)
        shelf.check()
    assert once.drain() == often.drain()


@every_policy_in_order
def test_an_overwritten_entry_is_new(name: str) -> None:
    shelf = filled(name, "abc")
    entry = shelf.entries["a"]
    shelf.policy.remove(entry)
    entry.touched = shelf.now + 1
    shelf.policy.insert(entry)
    assert shelf.drain() == ["b", "c", "a"]


def test_the_ghost_knows_what_was_evicted_not_what_was_deleted() -> None:
    shelf = filled("s3fifo", "abcd")
    shelf.delete(shelf.entries["a"])
    assert shelf.evict() == "b"
    shelf.put("b")
    shelf.put("a")
    # b went to the main queue, a to the small one, from which more is taken.
    assert shelf.drain() == ["c", "d", "a", "b"]


@every_policy
def test_what_was_held_is_found_when_nothing_else_is_left(name: str) -> None:
    keys = [str(number) for number in range(20 * RECHECKS)]
    shelf = filled(name, keys)
    shelf.held.update(shelf.entries.values())
    assert shelf.evict() is None
    assert shelf.evict() is None
    free = shelf.entries["77"]
    shelf.held.remove(free)
    assert shelf.evict() == "77"
    shelf.held.clear()
    shelf.check()
    assert len(shelf.drain()) == len(keys) - 1


@every_policy_in_order
def test_the_end_of_a_hold_is_noticed_while_others_can_go(name: str) -> None:
    shelf = filled(name, (f"held{number}" for number in range(10 * RECHECKS)))
    shelf.held.update(shelf.entries.values())
    for number in range(100):
        shelf.put(f"free{number}")
    assert shelf.evict() == "free0"
    shelf.held.clear()
    victims = [shelf.evict() for _ in range(10)]
    assert any(key is not None and key.startswith("held") for key in victims)


@pytest.mark.parametrize("name", ["lru", "lfu", "sieve", "s3fifo"])
def test_after_a_long_time_without_evictions_the_first_looks_at_a_part(name: str) -> None:
    shelf = filled(name, (str(number) for number in range(4 * LOOKS_MAX)))
    entries = list(shelf.entries.values())
    first = entries[:LOOKS_MAX]
    for entry in [*entries[LOOKS_MAX:], first.pop(100), *first]:
        shelf.use(entry)
        shelf.use(entry)
    # It looks in the order in which they came, and takes the one used longest ago of those.
    assert shelf.evict() == "100"
    shelf.check()
    assert len(shelf.drain()) == 4 * LOOKS_MAX - 1


@every_policy
def test_age_compares_the_candidates_of_two_classes(name: str) -> None:
    shelf = Shelf(name)
    nothing = shelf.policy.age(5.0)
    shelf.put("a")
    shelf.put("b", priority=1)
    assert shelf.policy.age(5.0) == (0, 4.0)
    assert shelf.evict() == "a"
    assert shelf.policy.age(5.0) == (-1, 3.0)
    assert shelf.policy.age(5.0) > nothing


@every_policy
def test_verdicts_asked_for_stay_in_proportion(name: str) -> None:
    """2000 entries are held all along and 100,000 are stored: nobody asks them all each time."""
    shelf = Shelf(name)
    rng = random.Random(name)
    entries = [shelf.put(str(number)) for number in range(4000)]
    shelf.held.update(rng.sample(entries, 2000))
    num_operations = 100_000
    for number in range(4000, 4000 + num_operations // 2):
        assert shelf.evict() is not None
        last = shelf.entries.get(str(number - 1))
        newcomer = shelf.put(str(number), behind=last if number % 3 else None)
        entries.append(newcomer)
        if number % 7:
            shelf.use(entries[rng.randrange(number - 500, number)])
        if number % 100 == 0:
            shelf.held.add(newcomer)
            shelf.held.discard(next(iter(shelf.held)))
        if number % 20_000 == 0:
            shelf.check()
    assert shelf.num_verdicts <= (RECHECKS + 4) * num_operations


@every_policy
def test_churn_leaves_nothing_behind(name: str) -> None:
    shelf = filled(name, map(str, range(100)))
    shelf.held.update(list(shelf.entries.values())[:50])
    for number in range(100, 5000):
        shelf.put(str(number))
        shelf.delete(shelf.entries[str(number - 20)])
        if number % 50 == 0:
            shelf.evict()
            shelf.check()  # bounds what a heap and a ghost keep of entries that left
        if str(number - 19) not in shelf.entries:
            shelf.put(str(number - 19))
    assert len(shelf.policy) == len(shelf.entries) < 100 + HEAP_SLACK
    for entry in list(shelf.entries.values()):
        shelf.delete(entry)
    shelf.check()


def test_check_finds_an_entry_that_was_forgotten_and_a_leaf_left_parked() -> None:
    shelf = filled("lru", "ab")
    with pytest.raises(AssertionError):
        shelf.policy.check([shelf.entries["a"]])
    shelf.put("c", behind=shelf.entries["a"])
    assert shelf.evict() == "b"
    assert shelf.policy.victim(shelf.verdict, shelf.now) is shelf.entries["c"]
    shelf.check()
    shelf.entries["a"].children = None
    with pytest.raises(AssertionError, match="was not inserted again"):
        shelf.check()


def test_unknown_policies_are_refused() -> None:
    assert POLICIES[:5] == ("lru", "lfu", "fifo", "sieve", "s3fifo")
    assert POLICIES[5:] == ("arc", "wtinylfu", "gdsf", "survival")
    with pytest.raises(KeyError):
        make_policy("random")


class EngineMachine(RuleBasedStateMachine):
    """A random engine; lru and fifo are compared with their definition, all with the rules."""

    name: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf(self.name)
        self.num_stored = 0
        self.stored: dict[Entry, int] = {}

    def pick(self, number: int) -> Entry:
        entries = list(self.shelf.entries.values())
        return entries[number % len(entries)]

    def order(self, entry: Entry) -> tuple[float, float]:
        last = self.stored[entry] if self.name == "fifo" else entry.touched
        return entry.priority, last

    @rule(priority=st.integers(0, 2), number=st.integers(0, 99), is_chained=st.booleans())
    def put(self, priority: int, number: int, is_chained: bool) -> None:
        behind = self.pick(number) if is_chained and self.shelf.entries else None
        entry = self.shelf.put(str(self.num_stored), behind=behind, priority=priority)
        self.stored[entry] = self.num_stored
        self.num_stored += 1

    @precondition(lambda self: self.shelf.entries)
    @rule(number=st.integers(0, 99))
    def use(self, number: int) -> None:
        self.shelf.use(self.pick(number))

    @precondition(lambda self: self.shelf.entries)
    @rule(number=st.integers(0, 99))
    def delete(self, number: int) -> None:
        self.shelf.delete(self.pick(number))

    @precondition(lambda self: self.shelf.entries)
    @rule(number=st.integers(0, 99), priority=st.integers(0, 3), is_told=st.booleans())
    def change_priority(self, number: int, priority: int, is_told: bool) -> None:
        entry = self.pick(number)
        is_told = is_told or priority < entry.priority
        entry.priority = priority
        if is_told:
            self.shelf.policy.insert(entry)

    @precondition(lambda self: self.shelf.entries)
    @rule(number=st.integers(0, 99))
    def hold(self, number: int) -> None:
        if len(self.shelf.held) < RECHECKS:
            self.shelf.held.add(self.pick(number))

    @precondition(lambda self: self.shelf.held)
    @rule()
    def let_go(self) -> None:
        self.shelf.held.clear()

    @rule()
    def ask_age(self) -> None:
        age = self.shelf.policy.age(self.shelf.now)
        assert age == self.shelf.policy.age(self.shelf.now)

    @rule()
    def evict(self) -> None:
        entries = dict(self.shelf.entries)
        free = [
            entry
            for entry in entries.values()
            if not entry.children and entry not in self.shelf.held
        ]
        key = self.shelf.evict()
        assert (key is None) == (not free)
        if key is not None:
            victim = entries[key]
            assert victim in free
            assert victim.priority == min(entry.priority for entry in free)
            if self.name in ("lru", "fifo"):
                assert victim is min(free, key=self.order)

    @invariant()
    def everything_is_tracked_once(self) -> None:
        self.shelf.check()


@every_policy
def test_random_engines(name: str) -> None:
    run_state_machine_as_test(
        type(f"{name}_engine", (EngineMachine,), {"name": name}),
        settings=settings(max_examples=120, stateful_step_count=60, deadline=None),
    )


class Writable(Shelf):
    """A shelf whose entries are set aside while they are ``unwritten``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.unwritten: set[str] = set()

    def verdict(self, entry: Entry) -> Verdict:
        answer = super().verdict(entry)
        if answer is Verdict.EVICT and entry.key.decode() in self.unwritten:
            return Verdict.UNWRITTEN
        return answer

    def evict_last(self) -> str | None:
        victim = self.policy.last_resort(super().verdict)
        if victim is None:
            return None
        self.delete(victim)
        return victim.key.decode()


@every_policy_in_order
def test_what_is_not_written_is_passed_over_and_comes_back_when_it_is(name: str) -> None:
    shelf = Writable(name)
    for key in "abcd":
        shelf.put(key)
    shelf.unwritten = {"a", "b"}
    assert shelf.evict() == "c"
    shelf.check()
    shelf.unwritten = {"b"}
    shelf.policy.insert(shelf.entries["a"])
    assert shelf.evict() == "a"
    assert shelf.evict() == "d"
    assert shelf.evict() is None
    assert shelf.evict_last() == "b"
    shelf.check()


@every_policy_in_order
def test_the_last_resort_is_the_one_passed_over_first_that_may_go(name: str) -> None:
    shelf = Writable(name)
    for key in "abcd":
        shelf.put(key)
    shelf.unwritten = set("abcd")
    assert shelf.evict() is None
    shelf.held.add(shelf.entries["a"])
    assert shelf.evict_last() == "b"
    shelf.delete(shelf.entries["c"])
    assert shelf.evict_last() == "d"
    assert shelf.evict_last() is None
    shelf.check()
    shelf.held.clear()
    shelf.unwritten.clear()
    assert shelf.evict() == "a"


@every_policy_in_order
def test_when_nobody_writes_any_more_all_stand_in_line_again(name: str) -> None:
    shelf = Writable(name)
    for key in "abc":
        shelf.put(key)
    shelf.unwritten = set("abc")
    assert shelf.evict() is None
    shelf.unwritten.clear()
    assert shelf.evict() is None
    shelf.policy.release()
    shelf.check()
    assert shelf.drain() == ["a", "b", "c"]
