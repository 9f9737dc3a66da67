"""The ledger's rules: which answers of a server that was killed are right."""

import time
from collections.abc import Callable

import pytest

from tests.long.ledger import (
    DURABLE,
    MEMORY,
    TTL_SLACK_S,
    WRITTEN,
    Key,
    Ledger,
    Values,
    Wrong,
)

VALUES = Values("test")
Story = Callable[..., None]


def put(ledger: Ledger, key: Key, level: int, *, acknowledged: bool = True) -> None:
    version = ledger.begin_put(key, level)
    if acknowledged:
        ledger.end_put(key, version, level)


def delete(ledger: Ledger, key: Key, *, acknowledged: bool = True) -> None:
    ledger.begin_delete(key)
    if acknowledged:
        ledger.end_delete(key)


def flush(ledger: Ledger, _: Key, *, acknowledged: bool = True) -> None:
    ledger.begin_flush()
    if acknowledged:
        ledger.end_flush()


# What was done to a key, and the versions that it may have after a crash; 0: it may be absent.
STORIES: list[tuple[str, list[tuple[Story, dict[str, object]]], set[int]]] = [
    ("nothing", [], {0}),
    ("put", [(put, {"level": WRITTEN})], {1}),
    ("put in memory", [(put, {"level": MEMORY})], {0, 1}),
    ("put, no answer", [(put, {"level": DURABLE, "acknowledged": False})], {0, 1}),
    ("put twice", [(put, {"level": WRITTEN}), (put, {"level": DURABLE})], {2}),
    ("put over", [(put, {"level": DURABLE}), (put, {"level": MEMORY})], {0, 2}),
    (
        "put over, no answer",
        [(put, {"level": WRITTEN}), (put, {"level": DURABLE, "acknowledged": False})],
        {1, 2},
    ),
    (
        "put over for less, no answer",
        [(put, {"level": DURABLE}), (put, {"level": WRITTEN, "acknowledged": False})],
        {0, 1, 2},
    ),
    (
        "put over in memory, no answer",
        [(put, {"level": DURABLE}), (put, {"level": MEMORY, "acknowledged": False})],
        {0, 1, 2},
    ),
    ("deleted", [(put, {"level": DURABLE}), (delete, {})], {0}),
    ("deleted?", [(put, {"level": DURABLE}), (delete, {"acknowledged": False})], {0, 1}),
    ("flushed", [(put, {"level": DURABLE}), (flush, {})], {0}),
    ("flushed?", [(put, {"level": DURABLE}), (flush, {"acknowledged": False})], {0, 1}),
]


@pytest.mark.parametrize(("story", "right"), [s[1:] for s in STORIES], ids=[s[0] for s in STORIES])
def test_a_story_has_its_right_ends(
    story: list[tuple[Story, dict[str, object]]], right: set[int]
) -> None:
    for answer in range(4):
        key = Key(b"key", 1, False)
        ledger = Ledger(VALUES, [key], level_kept=WRITTEN, may_evict=False)
        for step, options in story:
            step(ledger, key, **options)
        value = VALUES.of(1, answer) if answer else None
        if answer in right:
            ledger.check_recovered(key, value, -1, clean=False)
        else:
            with pytest.raises(Wrong):
                ledger.check_recovered(key, value, -1, clean=False)


def test_what_may_be_evicted_may_be_absent_and_never_old() -> None:
    key = Key(b"key", 1, False)
    ledger = Ledger(VALUES, [key], level_kept=WRITTEN, may_evict=True)
    put(ledger, key, DURABLE)
    put(ledger, key, DURABLE)
    ledger.check_recovered(key, None, -2, clean=False)
    ledger.check_recovered(key, VALUES.of(1, 2), -1, clean=False)
    with pytest.raises(
        Wrong, match=r"version 1 of b'key' \(last put: 2\), not absent or version 2"
    ):
        ledger.check_recovered(key, VALUES.of(1, 1), -1, clean=False)


def test_an_addressed_page_may_come_back_with_its_bytes_unless_it_was_flushed() -> None:
    key = Key(b"page:", 3, True)
    ledger = Ledger(VALUES, [key], level_kept=WRITTEN, may_evict=False)
    put(ledger, key, DURABLE)
    delete(ledger, key)
    with pytest.raises(Wrong):
        ledger.check(key, VALUES.of(3, 0))
    ledger.check_recovered(key, VALUES.of(3, 0), -1, clean=False)
    flush(ledger, key)
    with pytest.raises(Wrong):
        ledger.check_recovered(key, VALUES.of(3, 0), -1, clean=False)


def test_one_wrong_byte_and_another_keys_value_are_named() -> None:
    keys = [Key(b"a", 1, False), Key(b"b", 2, False)]
    ledger = Ledger(VALUES, keys, level_kept=WRITTEN, may_evict=False)
    for key in keys:
        put(ledger, key, WRITTEN)
    wrong = bytearray(VALUES.of(1, 1))
    wrong[20] ^= 4
    with pytest.raises(Wrong, match="version 1 with 1 wrong bytes"):
        ledger.check(keys[0], bytes(wrong))
    with pytest.raises(Wrong, match="version 1 of b'b'"):
        ledger.check(keys[0], VALUES.of(2, 1))


def test_times_to_live_are_held_to() -> None:
    key = Key(b"key", 1, False)
    ledger = Ledger(VALUES, [key], level_kept=WRITTEN, may_evict=False)
    version = ledger.begin_put(key, DURABLE, 100_000)
    ledger.end_put(key, version, DURABLE, 100_000)
    value = VALUES.of(1, version)
    ledger.check_recovered(key, value, 99_900, clean=False)
    for pttl_ms in (-1, 90_000, 110_000):
        with pytest.raises(Wrong, match="expires in"):
            ledger.check_recovered(key, value, pttl_ms, clean=False)
    window = ledger.begin_expire(key, 1)
    ledger.end_expire(key, 1, window, was_there=True)
    time.sleep(0.5)
    with pytest.raises(Wrong):
        ledger.check_recovered(key, value, 1, clean=False)
    ledger.check_recovered(key, None, -2, clean=False)


def test_an_answer_that_waited_may_be_older_than_a_time_to_live() -> None:
    key = Key(b"key", 1, False)
    ledger = Ledger(VALUES, [key], level_kept=WRITTEN, may_evict=False)
    put(ledger, key, DURABLE)
    window = ledger.begin_expire(key, 1)
    ledger.end_expire(key, 1, window, was_there=True)
    value, asked_before = VALUES.of(1, 1), time.time()
    time.sleep(TTL_SLACK_S + 0.1)
    ledger.check(key, value, asked_before)
    ledger.check(key, None, asked_before)
    for asked_after in (time.time(), None):
        with pytest.raises(Wrong, match=r"version 1 .* not absent"):
            ledger.check(key, value, asked_after)
        ledger.check(key, None, asked_after)


def test_a_time_to_live_that_waited_is_one_from_between_question_and_answer() -> None:
    key = Key(b"key", 1, False)
    ledger = Ledger(VALUES, [key], level_kept=WRITTEN, may_evict=False)
    version = ledger.begin_put(key, DURABLE, 100_000)
    ledger.end_put(key, version, DURABLE, 100_000)
    value, since = VALUES.of(1, version), time.time() - 10
    ledger.check_recovered(key, value, 105_000, clean=False, since=since)
    for pttl_ms in (-1, 90_000, 115_000):
        with pytest.raises(Wrong, match="expires in"):
            ledger.check_recovered(key, value, pttl_ms, clean=False, since=since)
