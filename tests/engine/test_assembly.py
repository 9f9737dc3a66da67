"""Pages that are put together: seen when whole and behind their parent, bounded, dropped in time."""

import random

import pytest

from respkv.engine.assembly import Assemblies, Assembly
from respkv.engine.cache import Cache
from respkv.engine.entry import Put
from respkv.errors import OutOfMemory
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


def test_nothing_is_hashed_or_published_of_what_was_dropped() -> None:
    made, cache, _ = make()
    assembly = begin(made, 0)
    write(assembly, WHOLE, 1)
    cache.flush()
    list(assembly.hash_steps())
    made.end(assembly)
    assert made.publish() == []
    cache.check()
