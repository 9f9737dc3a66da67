"""The order in which a quota gives up pages: one at a time, as a plan asks for them."""

from respkv.engine.coldest import (
    HELD_FEW,
    HELD_MAX,
    HELD_REST_EACH_S,
    HELD_REST_S,
    SLACK,
    Coldest,
)
from respkv.engine.entry import Entry


def page(
    name: str, touched: float = 0.0, *, priority: int = 0, parent: Entry | None = None
) -> Entry:
    entry = Entry(name.encode(), "kvpage", 100, touched)
    entry.priority = priority
    if parent is not None:
        entry.parent = parent
        parent.children = {*(parent.children or ()), entry}
    return entry


def order(coldest: Coldest, now: float = 100.0, held: set[Entry] | None = None) -> list[str]:
    """Return the names of all that may go, in order; nothing changes."""
    doomed: dict[Entry, None] = {}
    while True:
        entry = coldest.first(doomed, (held or set()).__contains__, now)
        if entry is None:
            break
        doomed[entry] = None
        if entry.parent is not None:
            coldest.unpark(entry.parent)
    coldest.end_plan(doomed, now)
    return [entry.key.decode() for entry in doomed]


def test_priority_counts_before_the_time_of_use_and_uses_count_lazily() -> None:
    coldest = Coldest()
    a, b, c = page("a", 1.0), page("b", 2.0), page("c", 3.0, priority=-1)
    for each in (a, b, c):
        coldest.add(each)
    assert order(coldest) == ["c", "a", "b"]
    a.touched = 5.0
    assert order(coldest) == ["c", "b", "a"]
    c.priority = 1
    coldest.add(c)
    assert order(coldest) == ["b", "a", "c"]
    coldest.remove(b)
    assert order(coldest) == ["a", "c"]


def test_a_page_comes_after_all_that_stand_behind_it() -> None:
    coldest = Coldest()
    root = page("root")
    left, right = page("left", 5.0, parent=root), page("right", 9.0, parent=root)
    leaf = page("leaf", 7.0, parent=left)
    for each in (root, left, right, leaf):
        coldest.add(each)
    assert order(coldest) == ["leaf", "left", "right", "root"]
    assert order(coldest, held={right}) == ["leaf", "left"]
    assert order(coldest) == ["leaf", "left", "right", "root"]


def test_a_pinned_page_waits_for_its_deadline_unless_it_is_unpinned() -> None:
    coldest = Coldest()
    a, b = page("a", 1.0), page("b", 2.0)
    a.pinned_until = 50.0
    coldest.add(a)
    coldest.add(b)
    assert order(coldest, now=10.0) == ["b"]
    assert order(coldest, now=50.0) == ["a", "b"]
    a.pinned_until = 90.0
    assert order(coldest, now=60.0) == ["b"]
    a.pinned_until = 0.0
    coldest.add(a)
    assert order(coldest, now=60.0) == ["a", "b"]


def test_many_held_pages_rest_and_are_not_forgotten() -> None:
    coldest = Coldest()
    pages = [page(f"{number}", float(number)) for number in range(HELD_FEW + 10)]
    for each in pages:
        coldest.add(each)
    free = page("free", 1e9)
    coldest.add(free)
    assert order(coldest, now=10.0, held=set(pages)) == ["free"]
    assert order(coldest, now=10.0) == ["free"], "they are not looked at again at once"
    assert len(order(coldest, now=10.0 + HELD_REST_S)) == len(pages) + 1
    assert len(coldest) == len(pages) + 1
    for each in pages:
        coldest.remove(each)
    assert list(coldest) == [free]
    assert order(coldest) == ["free"]


def test_promised_pages_rest_until_their_promise_ends() -> None:
    coldest = Coldest()
    pages = [page(f"{number}", float(number)) for number in range(10)]
    looks: list[Entry] = []

    def is_held(entry: Entry) -> bool:
        looks.append(entry)
        return entry.held_until > now

    for each in pages:
        each.held_until = 15.0
        coldest.add(each)
    for now in (10.0, 11.0, 14.0):
        assert coldest.first({}, is_held, now) is None
        coldest.end_plan((), now)
    assert len(looks) == len(pages)
    assert order(coldest, now=15.0) == [f"{number}" for number in range(10)]


def test_the_more_pages_are_held_the_longer_they_rest() -> None:
    coldest = Coldest()
    pages = [page(f"{number}") for number in range(4000)]
    for each in pages:
        coldest.add(each)
    assert order(coldest, now=10.0, held=set(pages)) == []
    assert order(coldest, now=10.0 + HELD_REST_S) == []
    assert len(order(coldest, now=10.0 + HELD_REST_EACH_S * len(pages))) == len(pages)


def test_a_search_never_looks_at_pages_that_came_pinned() -> None:
    coldest, free = Coldest(), page("free", 1e9)
    for number in range(1000):
        each = page(f"{number}")
        each.pinned_until = 50.0
        coldest.add(each)
    coldest.add(free)
    assert len(coldest._heap) == 1
    assert order(coldest, now=10.0) == ["free"]
    assert len(order(coldest, now=50.0)) == 1001


def test_pages_that_are_looked_at_anew_again_and_again_take_no_more_memory() -> None:
    coldest = Coldest()
    a, b = page("a", 1.0), page("b", 2.0)
    coldest.add(b)
    for number in range(5 * SLACK):
        coldest.add(a)
        a.pinned_until = number + 1e6
        assert coldest.first({}, lambda entry: False, 10.0) is b
    assert len(coldest._heap) + len(coldest._waiting) < 3 * SLACK
    a.pinned_until = 0.0
    coldest.add(a)
    assert order(coldest) == ["a", "b"]


def test_one_plan_passes_over_so_many_held_pages_and_the_next_goes_on_behind_them() -> None:
    coldest = Coldest()
    held = [page(f"{number}", float(number)) for number in range(2 * HELD_MAX + 10)]
    free = page("free", 1e9)
    for each in (*held, free):
        coldest.add(each)
    looks: list[Entry] = []

    def is_held(entry: Entry) -> bool:
        looks.append(entry)
        return entry is not free

    found: list[Entry | None] = []
    for number in range(3):
        now = 10.0 + number * HELD_REST_S  # those passed over rest until all were met
        found.append(first := coldest.first({}, is_held, now))
        coldest.end_plan(() if first is None else (first,), now)
        assert len(looks) <= (number + 1) * HELD_MAX + 1
    assert found == [None, None, free]
    assert len(looks) == len(set(looks))


def test_pages_that_rested_come_back_a_part_at_a_time_and_all_if_need_be() -> None:
    coldest = Coldest()
    pages = [page(f"{number}", -float(number)) for number in range(2 * HELD_MAX)]
    for each in pages:
        each.pinned_until = 5.0
        coldest.add(each)
    assert coldest.first({}, lambda entry: False, 4.0) is None
    coldest.end_plan((), 4.0)
    first = coldest.first({}, lambda entry: False, 5.0)
    assert first is pages[HELD_MAX - 1], "the coldest of those that are back"
    coldest.end_plan((pages[HELD_MAX - 1],), 5.0)
    assert len(order(coldest, now=5.0)) == len(pages)


def test_pins_that_were_renewed_leave_nothing_that_a_plan_stumbles_over() -> None:
    coldest = Coldest()
    pages = [page(f"{number}") for number in range(HELD_MAX + 10)]
    for until in (5.0, 50.0):
        for each in pages:
            each.pinned_until = until
            coldest.add(each)
    assert coldest.first({}, lambda entry: False, 10.0) is None
    coldest.end_plan((), 10.0)
    assert len(order(coldest, now=50.0)) == len(pages)
