"""The index: known cases, and a machine that holds it against dicts and sets."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from respkv.engine.entry import Entry
from respkv.engine.index import Index
from respkv.page import Part

KEYS = [b"k%d" % number for number in range(12)]
WALL_MAX = 40


def add(index: Index, key: bytes, parent: bytes = b"") -> Entry:
    entry = Entry(key, "kvpage", 1, 0.0)
    index.insert(entry)
    if parent:
        index.link(entry, parent)
    return entry


def scan_all(index: Index, count: int = 3) -> list[bytes]:
    cursor, keys = 0, []
    while True:
        cursor, found = index.scan(cursor, count)
        keys += [entry.key for entry in found]
        if not cursor:
            return keys


def test_a_page_put_before_its_parent_is_adopted_when_the_parent_comes() -> None:
    index = Index()
    child = add(index, b"child", b"parent")
    assert child.parent is None
    parent = add(index, b"parent")
    assert child.parent is parent
    assert parent.children == {child}
    index.check()


def test_removing_a_parent_leaves_its_children_waiting_for_it() -> None:
    index = Index()
    parent, child = add(index, b"parent"), add(index, b"child", b"parent")
    assert index.remove(parent) is None
    assert child.parent is None
    again = add(index, b"parent")
    assert child.parent is again
    index.check()


def test_removing_the_last_child_names_the_parent_that_became_a_leaf() -> None:
    index = Index()
    parent = add(index, b"parent")
    children = [add(index, b"a", b"parent"), add(index, b"b", b"parent")]
    assert index.remove(children[0]) is None
    assert index.remove(children[1]) is parent


def test_linking_elsewhere_names_the_old_parent_that_became_a_leaf() -> None:
    index = Index()
    old, new = add(index, b"old"), add(index, b"new")
    child = add(index, b"child", b"old")
    assert index.link(child, b"new") is old
    assert new.children == {child}
    assert index.link(child, b"new") is None  # nothing changes
    assert index.link(child, b"") is new
    assert child.parent_key == b""
    index.check()


def test_parts_hang_on_a_page_beside_its_children() -> None:
    index = Index()
    page, child = add(index, b"page"), add(index, b"child", b"page")
    parts = [Entry(name, "kvpage", 1, 0.0) for name in (b"a", b"b")]
    for part in parts:
        part.part = Part.BOUND
        index.insert(part)
        assert index.link(part, b"page") is None
    assert (page.children, page.parts) == ({child}, set(parts))
    index.check()
    assert index.is_circle(page, b"a")
    assert index.link(page, b"a") is None
    assert page.parent is None
    assert index.remove(parts[0]) is None
    assert index.remove(child) is page
    assert index.remove(parts[1]) is None, "a page without parts has not become a leaf by that"
    assert page.parts is None
    index.check()


def test_a_part_waits_for_its_page_as_a_child_does() -> None:
    index = Index()
    part = Entry(b"part", "kvpage", 1, 0.0)
    part.part = Part.FREE
    index.insert(part)
    index.link(part, b"page")
    page = add(index, b"page")
    assert (page.children, page.parts) == (None, {part})
    index.remove(page)
    assert part.parent is None
    assert add(index, b"page").parts == {part}
    index.check()
    index.clear()
    index.check()


def test_a_page_that_is_unlinked_is_behind_nobody_though_a_key_is_empty() -> None:
    index = Index()
    nameless, root = add(index, b""), add(index, b"root")
    page = add(index, b"page", b"root")
    assert index.link(page, b"") is root
    assert (page.parent, page.parent_key, nameless.children) == (None, b"", None)
    index.check()


def test_a_link_that_would_close_a_circle_is_not_made() -> None:
    index = Index()
    first = add(index, b"a", b"c")  # the circle closes through pages that waited for each other
    add(index, b"b", b"a")
    last = add(index, b"c", b"b")
    assert first.parent is last
    assert last.parent is None
    assert last.parent_key == b""
    assert index.link(first, b"a") is None
    assert first.parent is last
    index.check()


def test_an_entry_whose_ttl_was_set_twice_to_the_same_time_is_due_once() -> None:
    index = Index()
    entry = add(index, b"k")
    for wall_ms in (5, 9, 5):
        index.expire_at(entry, wall_ms)
    found = []
    for due in index.due(10, 100):
        found.append(due)
        index.remove(due)
    assert found == [entry]


def test_a_ttl_that_was_taken_away_or_moved_is_not_due() -> None:
    index = Index()
    moved, kept = add(index, b"moved"), add(index, b"kept")
    index.expire_at(moved, 5)
    index.expire_at(kept, 5)
    index.expire_at(moved, 50)
    index.expire_at(kept, 0)
    assert list(index.due(10, 100)) == []
    assert index.num_volatile == 1
    index.check()


def test_at_most_so_many_are_due_at_once() -> None:
    index = Index()
    for key in KEYS:
        index.expire_at(add(index, key), 1)
    for entry in index.due(1, 5):
        index.remove(entry)
    assert len(index) == len(KEYS) - 5


def test_ttls_that_change_all_the_time_do_not_pile_up() -> None:
    index = Index()
    entries = [add(index, key) for key in KEYS]
    for wall_ms in range(1, 20_000):
        index.expire_at(entries[wall_ms % len(entries)], wall_ms)
    assert len(index._expiry) < 2 * len(entries) + 1100
    index.check()


def test_ttls_are_still_due_in_order_after_old_tickets_were_swept() -> None:
    rng = random.Random(1)
    index = Index()
    entries = [add(index, b"%d" % number) for number in range(300)]
    for _ in range(5000):
        index.expire_at(rng.choice(entries), rng.randrange(1, 1000))
    for wall_ms in range(0, 1000, 50):
        expected = {each for each in entries if 0 < each.expires_ms <= wall_ms}
        found = []
        for entry in index.due(wall_ms, 1000):
            found.append(entry)
            index.remove(entry)
        assert set(found) == expected
        assert len(found) == len(expected)


def test_a_scan_meets_every_lasting_key_exactly_once_while_others_come_and_go() -> None:
    rng = random.Random(1)
    for _ in range(50):
        index = Index()
        lasting = {b"lasting%d" % number for number in range(20)}
        for key in rng.sample(sorted(lasting) + KEYS, k=20 + len(KEYS)):
            add(index, key)
        cursor, met = 0, []
        while True:
            cursor, found = index.scan(cursor, rng.randint(1, 9))
            met += [entry.key for entry in found]
            if not cursor:
                break
            for key in rng.sample(KEYS, k=4):
                if key in index.entries:
                    index.remove(index.entries[key])
                else:
                    add(index, key)
        assert sorted(key for key in met if key in lasting) == sorted(lasting)


def test_a_scan_of_nothing_and_one_past_the_end_are_done_at_once() -> None:
    index = Index()
    assert index.scan(0, 10) == (0, [])
    add(index, b"k")
    assert index.scan(1 << 70, 10) == (0, [])


def test_any_position_names_an_entry_or_none() -> None:
    index = Index()
    assert index.at(7) is None
    entries = [add(index, key) for key in KEYS]
    index.remove(entries[3])
    assert {index.at(position) for position in range(100, 120)} == {*entries, None} - {entries[3]}


def test_clearing_returns_what_was_there_and_forgets_who_waited() -> None:
    index = Index()
    entries = [add(index, b"a"), add(index, b"b", b"a"), add(index, b"c", b"absent")]
    index.expire_at(entries[0], 5)
    assert index.clear() == entries
    assert (len(index), index.num_volatile, scan_all(index)) == (0, 0, [])
    assert list(index.due(10, 10)) == []
    assert add(index, b"absent").children is None
    index.check()


class IndexMachine(RuleBasedStateMachine):
    """Keys, links and TTLs, in plain dicts; and one scan that is always under way."""

    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.index = Index()
        self.parents: dict[bytes, bytes] = {}  # key: the key it stands behind, or b""
        self.ttls: dict[bytes, int] = {}
        self.cursor = 0
        self.met: list[bytes] = []
        self.lasting: set[bytes] = set()

    @rule(target=keys, key=st.sampled_from(KEYS))
    def name(self, key: bytes) -> bytes:
        return key

    @rule(key=keys, parent=st.sampled_from([b"", *KEYS]))
    def put(self, key: bytes, parent: bytes) -> None:
        if key in self.parents:
            self.link(key, parent)
            return
        add(self.index, key)
        self.parents[key], self.ttls[key] = b"", 0
        self.link(key, parent)

    @rule(key=keys, parent=st.sampled_from([b"", *KEYS]))
    def link(self, key: bytes, parent: bytes) -> None:
        if key not in self.parents:
            return
        entry = self.index.entries[key]
        old = self.parents[key]
        leaf = self.index.link(entry, parent)
        if parent != old and not self._is_behind(parent, key):
            self.parents[key] = parent
            had_only_this = old in self.parents and not self._children(old)
            assert leaf is (self.index.entries[old] if had_only_this else None)
        else:
            assert leaf is None

    def _is_behind(self, key: bytes, ancestor: bytes) -> bool:
        """Whether ``key`` is ``ancestor`` or stands, link by present link, behind it."""
        seen = key
        while seen and seen != ancestor:
            seen = self.parents.get(seen, b"")
        return bool(seen)

    def _children(self, key: bytes) -> set[bytes]:
        return {child for child, parent in self.parents.items() if parent == key}

    @rule(key=keys)
    def remove(self, key: bytes) -> None:
        if key not in self.parents:
            return
        parent = self.parents.pop(key)
        del self.ttls[key]
        self.lasting.discard(key)
        became_leaf = parent in self.parents and not self._children(parent)
        found = self.index.remove(self.index.entries[key])
        assert found is (self.index.entries[parent] if became_leaf else None)

    @rule(key=keys, wall_ms=st.integers(0, WALL_MAX))
    def expire_at(self, key: bytes, wall_ms: int) -> None:
        if key in self.ttls:
            self.ttls[key] = wall_ms
            self.index.expire_at(self.index.entries[key], wall_ms)

    @rule(wall_ms=st.integers(0, WALL_MAX), count=st.integers(1, 4))
    def expire(self, wall_ms: int, count: int) -> None:
        expected = {key for key, when in self.ttls.items() if 0 < when <= wall_ms}
        found = []
        for entry in self.index.due(wall_ms, count):
            found.append(entry.key)
            self.remove(entry.key)
        assert len(found) == len(set(found)) == min(count, len(expected))
        assert expected.issuperset(found)

    @rule(count=st.integers(1, 5))
    def scan(self, count: int) -> None:
        if not self.cursor:
            self.met, self.lasting = [], set(self.parents)
        self.cursor, found = self.index.scan(self.cursor, count)
        self.met += [entry.key for entry in found]
        if not self.cursor:
            assert sorted(key for key in self.met if key in self.lasting) == sorted(self.lasting)

    @precondition(lambda self: len(self.parents) > 6)
    @rule()
    def clear(self) -> None:
        assert {entry.key for entry in self.index.clear()} == set(self.parents)
        self.parents, self.ttls, self.lasting = {}, {}, set()

    @invariant()
    def agrees(self) -> None:
        self.index.check()
        entries = self.index.entries
        assert {key: entry.parent_key for key, entry in entries.items()} == self.parents
        assert {key: entry.expires_ms for key, entry in entries.items()} == self.ttls
        for key, parent in self.parents.items():
            assert entries[key].parent is entries.get(parent)
        assert sorted(scan_all(self.index)) == sorted(self.parents)


def test_the_index_agrees_with_plain_dicts() -> None:
    run_state_machine_as_test(
        IndexMachine, settings=settings(max_examples=120, stateful_step_count=50, deadline=None)
    )
