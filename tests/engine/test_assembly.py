"""Pages that are put together: seen when whole and behind their parent, bounded, dropped in time."""

import random
from dataclasses import replace

import pytest

from respkv.engine.assembly import Assemblies, Assembly
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.namespaces import Schema
from respkv.engine.spaces import Limits
from respkv.errors import OutOfMemory, PinRefused, QuotaExceeded
from respkv.page import Geometry
from respkv.tiers.record import Level
from respkv.tiers.rectangles import Rectangle, write_steps
from tests.fakes import ManualClock, make_cache

SHAPE = Geometry(layers=2, heads=4, dim=4, tokens=4, dtype="int8")
WHOLE = Rectangle.of(SHAPE, None, None)
KEYS = [b"m:" + bytes([97 + number]) * 64 for number in range(6)]
HOW = Put("kvpage", 0, tokens=4)
PARTS = [Rectangle.of(SHAPE, (layer, 1), (head, 2)) for layer in (0, 1) for head in (0, 2)]


def make(**settings: float) -> tuple[Assemblies, Cache, ManualClock]:
    cache, clock = make_cache()
    made = Assemblies(cache, bytes_max=int(settings.get("bytes_max", 1 << 20)), timeout_s=60)
    return made, cache, clock


def begin(made: Assemblies, number: int, how: Put = HOW, identity: object = 1) -> Assembly:
    parent = KEYS[number - 1] if number else b""
    return made.begin(KEYS[number], parent, SHAPE, how, identity)


def write(assembly: Assembly, rectangle: Rectangle, byte: int) -> None:
    part = memoryview(bytes([byte]) * rectangle.shape(SHAPE).page_bytes)
    list(write_steps(assembly.landing.memory, SHAPE, rectangle, part))
    assembly.cover(rectangle.cells(SHAPE))


def finish(made: Assemblies, assembly: Assembly) -> None:
    list(assembly.hash_steps())
    made.end(assembly)


def complete(made: Assemblies, number: int) -> None:
    assembly = begin(made, number)
    write(assembly, WHOLE, number)
    finish(made, assembly)


def test_a_page_is_seen_once_its_last_part_has_come() -> None:
    made, cache, _ = make()
    for order in range(5):
        parts = PARTS + PARTS[:2]
        random.Random(order).shuffle(parts)
        assembly = begin(made, 0)
        while not assembly.is_whole:
            assert cache.find(KEYS[0]) is None
            write(begin(made, 0), parts.pop(), 7)
        finish(made, assembly)
        (entry,) = made.publish()
        assert cache.find(KEYS[0]) is entry
        assert entry.slot is not None
        assert cache.payload(entry.slot) == bytes([7]) * SHAPE.page_bytes
        assert (len(made), made.nbytes) == (0, 0)
        cache.check()
        cache.flush()


def test_pages_appear_behind_their_parents() -> None:
    made, cache, _ = make()
    for number in (3, 1, 2):
        complete(made, number)
        assert made.publish() == []
    complete(made, 0)
    assert [entry.key for entry in made.publish()] == KEYS[:4]
    assert len(made) == 0
    cache.check()


def test_what_stands_under_another_schema_is_no_parent() -> None:
    made, cache, _ = make()
    cache.put(KEYS[0], bytes(SHAPE.page_bytes), HOW)
    cache.namespaces.put(Schema(b"m", SHAPE))
    complete(made, 1)
    assert made.publish() == []
    complete(made, 0)
    assert [entry.key for entry in made.publish()] == KEYS[:2]
    cache.put(KEYS[3], b"a string")
    complete(made, 4)
    assert made.publish() == []


def test_what_nobody_adds_to_is_dropped_and_counted() -> None:
    made, cache, clock = make()
    first, second = begin(made, 0), begin(made, 1)
    clock.advance(50)
    begin(made, 1)
    clock.advance(20)
    made.expire()
    assert not first.is_open
    assert second.is_open
    assert made.num_dropped == 1
    clock.advance(50)
    made.expire()
    assert (len(made), made.nbytes, made.num_dropped) == (0, 0, 2)
    assert cache.slabs.used_bytes == 0
    cache.check()


def test_what_waits_is_bounded_and_what_is_old_makes_room() -> None:
    made, cache, clock = make(bytes_max=2 * SHAPE.page_bytes)
    begin(made, 0)
    begin(made, 1)
    with pytest.raises(OutOfMemory, match="assembly-memory, 512"):
        begin(made, 2)
    clock.advance(61)
    begin(made, 2)
    assert len(made) == 1
    made.check()
    cache.check()


def test_a_flush_and_another_schema_forget_what_came_before() -> None:
    made, cache, _ = make()
    first = begin(made, 0)
    write(first, PARTS[0], 1)
    assert begin(made, 0) is first
    other = begin(made, 0, identity=2)
    assert other is not first
    assert not first.is_open
    assert other.needs(PARTS[0].cells(SHAPE))
    cache.flush()
    assert not other.is_open
    again = begin(made, 0)
    made.drop_namespace(b"n")
    assert again.is_open
    made.drop_namespace(b"m")
    assert not again.is_open
    assert cache.slabs.used_bytes == 0
    cache.check()


def test_a_page_is_kept_at_the_highest_level_that_a_part_asked_for() -> None:
    made, _, _ = make()
    begin(made, 0, Put("kvpage", 0, level=Level.WRITTEN))
    assembly = begin(made, 0, Put("kvpage", 5, priority=2))
    assert (assembly.how.level, assembly.how.priority) == (Level.WRITTEN, 2)
    assembly = begin(made, 0, Put("kvpage", 5, level=Level.DURABLE))
    assert assembly.how.level is Level.DURABLE


def test_parts_come_with_their_page_and_go_with_it() -> None:
    made, cache, _ = make()
    key = KEYS[0] + b".logits"
    for is_dropped in (True, False):
        assembly = begin(made, 0)
        made.add_part(assembly, key, b"x" * 1000, Put("kvpage", 0, parent=KEYS[0]))
        made.add_part(assembly, key, b"x" * 1000, Put("kvpage", 0, parent=KEYS[0]))
        assert made.nbytes == SHAPE.page_bytes + 1000
        made.check()
        assert cache.find(key) is None
        if is_dropped:
            made.drop(assembly)
        else:
            write(assembly, WHOLE, 1)
            finish(made, assembly)
            made.publish()
    assert cache.find(key) is not None
    cache.check()


def test_a_page_that_came_whole_meanwhile_stays() -> None:
    made, cache, _ = make()
    complete(made, 0)
    there = cache.put(KEYS[0], bytes(SHAPE.page_bytes), HOW)
    assert made.publish() == [there]
    assert cache.stats.pages_skipped == 0 or cache.find(KEYS[0]) is there
    cache.check()


def test_a_page_that_its_owner_may_not_keep_takes_no_other_with_it() -> None:
    made, cache, _ = make()
    cache.accounts.set_limits(b"m", Limits(max_bytes=3 * SHAPE.page_bytes, tenants={b"t": 1}))
    dropped = begin(made, 0, replace(HOW, tenant=b"t"))
    write(dropped, WHOLE, 1)
    finish(made, dropped)
    other = made.begin(KEYS[3], b"", SHAPE, HOW, 1)
    write(other, WHOLE, 2)
    finish(made, other)
    assert [entry.key for entry in made.publish()] == [KEYS[3]]
    assert isinstance(dropped.failure, QuotaExceeded)
    assert other.failure is None
    assert (len(made), made.num_dropped) == (0, 1)
    made.check()
    cache.check()


def test_a_page_stays_when_its_pin_or_a_part_is_refused() -> None:
    made, cache, _ = make()
    cache.accounts.set_limits(b"m", Limits(max_bytes=2 * SHAPE.page_bytes))

    def refuse(entry: Entry, ms: int) -> None:
        asked.append((entry.key, ms))
        raise PinRefused("too much")

    asked: list[tuple[bytes, int]] = []
    assembly = begin(made, 0)
    assembly.pin_ms = 5
    write(assembly, WHOLE, 1)
    finish(made, assembly)
    (first,) = made.publish(refuse)
    assert asked == [(KEYS[0], 5)]
    assert isinstance(assembly.failure, PinRefused)
    assembly = begin(made, 1)
    too_large = bytes(2 * SHAPE.page_bytes)
    made.add_part(assembly, KEYS[1] + b".logits", too_large, Put("kvpage", 0, parent=KEYS[1]))
    write(assembly, WHOLE, 1)
    finish(made, assembly)
    (second,) = made.publish(refuse)
    assert isinstance(assembly.failure, QuotaExceeded)
    assert (first.pinned_until, second.pinned_until, made.num_dropped) == (0.0, 0.0, 0)
    cache.check()


def test_nothing_is_hashed_or_published_of_what_was_dropped() -> None:
    made, cache, _ = make()
    assembly = begin(made, 0)
    write(assembly, WHOLE, 1)
    cache.flush()
    list(assembly.hash_steps())
    made.end(assembly)
    assert made.publish() == []
    cache.check()
