"""Placement: where values go, which stay, and in which order they are saved."""

import pytest

from respkv.engine.entry import Entry
from respkv.engine.placement import (
    Ages,
    Watermarks,
    choose_tier,
    drain_order,
    idle_s,
    is_promoted,
)
from tests.engine.fake_tier import FakeTier


def entry(name: str, touched: float, *, parent: Entry | None = None, pinned: bool = False) -> Entry:
    made = Entry(name.encode(), "kvpage", 100, touched)
    made.pinned_until = 1e9 if pinned else 0.0
    if parent is not None:
        made.parent = parent
        parent.children = {*(parent.children or ()), made}
    return made


def test_the_first_tier_that_works_and_takes_the_size_is_chosen() -> None:
    tiers = [FakeTier(), FakeTier(name="disk")]
    tiers[0].payload_bytes_max = 10
    assert choose_tier(tiers, 10) == 0
    assert choose_tier(tiers, 11) == 1
    assert choose_tier(tiers, 10, 1) == 1
    assert choose_tier(tiers, 10, 2) is None
    tiers[0].health.state = "read-only"
    assert choose_tier(tiers, 10) == 1
    tiers[1].health.state = "off"
    assert choose_tier(tiers, 10) is None


@pytest.mark.parametrize(
    ("promote", "touches", "free_bytes", "expected"),
    [
        ("never", 9, 100, False),
        ("first", 1, 0, True),
        ("second", 1, 24, False),
        ("second", 1, 25, True),
        ("second", 2, 0, True),
    ],
)
def test_who_stays_in_memory(promote: str, touches: int, free_bytes: int, expected: bool) -> None:
    assert is_promoted(promote, touches, free_bytes, 100) is expected


def test_cleaning_begins_at_the_high_mark_and_ends_at_the_low_one() -> None:
    marks = Watermarks()
    marks.set(1000, 50, 40)
    assert [marks.excess(dirty) for dirty in (450, 500, 501, 450, 401, 400, 450)] == [
        0,
        0,
        101,
        50,
        1,
        0,
        0,
    ]


def test_a_copy_is_kept_if_its_value_is_used_more_recently_than_most() -> None:
    ages = Ages()
    assert not ages.is_worth_keeping(0.0, has_level=False)
    for _ in range(3000):
        ages.is_worth_keeping(100.0, has_level=False)
    assert ages.mean_s == pytest.approx(100, rel=0.01)
    assert ages.is_worth_keeping(40, has_level=False)
    assert not ages.is_worth_keeping(60, has_level=False)
    assert ages.is_worth_keeping(60, has_level=True)


def test_a_page_is_as_fresh_as_the_pages_right_behind_it() -> None:
    parent = entry("parent", 10)
    entry("child", 50, parent=parent)
    assert idle_s(parent, 60) == 10


def test_saving_goes_from_what_would_be_missed_most_and_never_before_a_parent() -> None:
    root = entry("root", 1)
    middle = entry("middle", 2, parent=root)
    leaf = entry("leaf", 90, parent=middle)
    pinned, old, fresh = entry("pinned", 5, pinned=True), entry("old", 3), entry("fresh", 80)
    order = drain_order([old, fresh, leaf, pinned, root, middle], now=100)
    assert [each.key.decode() for each in order] == [
        "pinned",
        "root",
        "middle",
        "leaf",
        "fresh",
        "old",
    ]
    assert drain_order([leaf], now=100) == [leaf]  # its parents have copies
