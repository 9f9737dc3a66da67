"""Events: who is told what of pages, with which numbers, and that a mirror made of them is right."""

import random
from collections.abc import Callable, Iterable

import pytest

from respkv.engine.cache import Cache
from respkv.engine.entry import Put
from respkv.engine.events import Event, Events, Listener, page_id_of
from respkv.engine.namespaces import Schema
from respkv.page import Geometry, part_key
from tests.engine.fake_tier import FakeTier
from tests.engine.files import clean, load, make_cold, opened
from tests.fakes import make_cache

PAGE = Put("kvpage")


def key_of(number: int, namespace: bytes = b"ns") -> bytes:
    return b"%b:%064x" % (namespace, number)


def always(namespace: bytes) -> bool:
    return True


def listening(
    cache: Cache,
    *,
    wants: Callable[[bytes], bool] = always,
    named: Iterable[bytes] = (),
    count_max: int = 1000,
) -> tuple[Events, Listener]:
    """Return the events of a cache and a listener that is on."""
    events = Events(cache)
    cache.watchers.add(events)
    listener = Listener(wants, lambda: named, lambda: None, count_max=count_max)
    listener.is_on = True
    events.add(listener)
    return events, listener


def told(listener: Listener) -> list[tuple[str, int, bytes]]:
    return [(each.kind, each.sequence, each.key) for each in listener.take(1000)]


def test_a_page_is_told_of_when_it_is_stored_and_when_it_goes() -> None:
    cache, _ = make_cache()
    _, listener = listening(cache)
    cache.put(key_of(1), b"x" * 600, Put("kvpage", tokens=16, token_ids=b"\1\0\0\0" * 16))
    cache.put(key_of(2), b"y" * 700, Put("kvpage", tokens=8, parent=key_of(1)))
    found = cache.find(key_of(2))
    assert found is not None
    cache.delete(found)
    first, second, third = listener.take(10)
    assert first == Event(
        *("stored", b"ns", 1, key_of(1), 16, 0, 0, b"", "cpu", "new", 600, b"\1\0\0\0" * 16)
    )
    assert (second.sequence, second.depth, second.parent) == (2, 16, key_of(1))
    assert (third.kind, third.sequence, third.reason, third.tier) == (
        *("removed", 3, "deleted", "cpu"),
    )
    assert (third.depth, third.parent, third.nbytes) == (16, key_of(1), 700)


def test_a_page_that_is_told_of_can_be_fetched() -> None:
    cache, _ = make_cache()
    seen: list[bytes | None] = []

    def look() -> None:
        entry = cache.find(listener.queue[-1].key)
        seen.append(None if entry is None else cache.copy(entry))

    events = Events(cache)
    cache.watchers.add(events)
    listener = Listener(always, list, look)
    listener.is_on = True
    events.add(listener)
    cache.put(key_of(1), b"whole", PAGE)
    assert seen == [b"whole"]


def test_plain_values_are_told_of_to_nobody() -> None:
    cache, _ = make_cache()
    _, listener = listening(cache)
    cache.put(b"small", b"x")
    cache.put(b"large", b"x" * 5000)
    for key in (b"small", b"large"):
        found = cache.find(key)
        assert found is not None
        cache.delete(found)
    assert not listener.queue


def test_a_page_that_becomes_a_plain_value_is_removed() -> None:
    cache, _ = make_cache()
    _, listener = listening(cache)
    cache.put(key_of(1), b"page", PAGE)
    cache.put(key_of(1), b"value")
    cache.put(key_of(1), b"page", PAGE)
    assert [(each.kind, each.reason) for each in listener.take(9)] == [
        *[("stored", "new"), ("removed", "deleted"), ("stored", "new")],
    ]


def test_numbers_are_those_of_the_namespace() -> None:
    cache, _ = make_cache()
    events, listener = listening(cache)
    for number, namespace in enumerate([b"a", b"b", b"a", b"", b"a:b", b"b"]):
        key = key_of(number, namespace) if namespace else b"%064x" % number
        cache.put(key, b"x", PAGE)
    got = [(each.namespace, each.sequence) for each in listener.take(9)]
    assert got == [(b"a", 1), (b"b", 1), (b"a", 2), (b"", 1), (b"a:b", 1), (b"b", 2)]
    assert events.number_of(b"a") == 2
    assert events.number_of(b"never") == 0


def test_what_nobody_wants_is_not_counted_and_leaves_a_gap() -> None:
    cache, _ = make_cache()
    wanted = {b"a"}
    events, listener = listening(cache, wants=wanted.__contains__)
    cache.put(key_of(1, b"a"), b"x", PAGE)
    cache.put(key_of(1, b"b"), b"x", PAGE)
    assert told(listener) == [("stored", 1, key_of(1, b"a"))]
    wanted.clear()
    events.changed()
    for number in range(2, 6):
        cache.put(key_of(number, b"a"), b"x", PAGE)
    assert not listener.queue
    wanted |= {b"a", b"b"}
    events.changed()
    cache.put(key_of(6, b"a"), b"x", PAGE)
    cache.put(key_of(2, b"b"), b"x", PAGE)
    assert told(listener) == [("stored", 3, key_of(6, b"a")), ("stored", 1, key_of(2, b"b"))]


def test_a_change_while_nothing_happens_leaves_no_gap() -> None:
    cache, _ = make_cache()
    wanted = {b"a"}
    events, listener = listening(cache, wants=wanted.__contains__)
    cache.put(key_of(1, b"a"), b"x", PAGE)
    for names in (set[bytes](), {b"a"}):
        wanted.clear()
        wanted |= names
        events.changed()
    cache.put(key_of(2, b"a"), b"x", PAGE)
    assert [sequence for _, sequence, _ in told(listener)] == [1, 2]


def test_while_nobody_listens_at_all_there_is_a_gap_too() -> None:
    cache, _ = make_cache()
    events, listener = listening(cache)
    cache.put(key_of(1), b"x", PAGE)
    listener.is_on = False
    events.changed()
    cache.put(key_of(2), b"x", PAGE)
    listener.is_on = True
    events.changed()
    cache.put(key_of(3), b"x", PAGE)
    assert [sequence for _, sequence, _ in told(listener)] == [1, 3]


def test_a_queue_that_is_full_loses_its_oldest_which_the_numbers_say() -> None:
    cache, _ = make_cache()
    _, listener = listening(cache, count_max=3)
    for number in range(1, 6):
        cache.put(key_of(number), b"x", PAGE)
    assert [sequence for _, sequence, _ in told(listener)] == [3, 4, 5]
    assert listener.dropped == 2


def test_all_listeners_of_a_namespace_get_the_same_number() -> None:
    cache, _ = make_cache()
    events, first = listening(cache)
    second = Listener(lambda namespace: namespace == b"b", list, lambda: None)
    second.is_on = True
    events.add(second)
    cache.put(key_of(1, b"a"), b"x", PAGE)
    cache.put(key_of(1, b"b"), b"x", PAGE)
    assert told(first) == [("stored", 1, key_of(1, b"a")), ("stored", 1, key_of(1, b"b"))]
    assert told(second) == [("stored", 1, key_of(1, b"b"))]


def test_a_flush_is_one_event_for_each_namespace() -> None:
    cache, _ = make_cache()
    cache.namespaces.put(Schema(b"with-schema", Geometry(1, 1, 8, 4, "float16")))
    wanted = {b"a", b"named", b"with-schema"}
    _, listener = listening(cache, wants=wanted.__contains__, named=[b"named"])
    for number in range(100):
        cache.put(key_of(number, b"a"), b"x", PAGE)
    listener.take(1000)
    cache.flush()
    got = [(each.kind, each.namespace, each.sequence) for each in listener.take(9)]
    assert sorted(got) == [
        *[("cleared", b"a", 101), ("cleared", b"named", 1), ("cleared", b"with-schema", 1)]
    ]


def test_tails_and_parts_say_which_they_are() -> None:
    cache, _ = make_cache()
    cache.namespaces.put(Schema(b"ns", Geometry(1, 1, 8, 4, "float16")))
    _, listener = listening(cache)
    cache.put(key_of(1), b"x" * 64, Put("kvpage", tokens=4))
    cache.put(key_of(2), b"x" * 16, Put("kvpage", tokens=1, parent=key_of(1)))
    for suffix in (b"logits", b"hidden", b"g.window"):
        cache.put(part_key(key_of(2), suffix), b"x", Put("kvpage", parent=key_of(1)))
    cache.put(b"ns:document-7", b"x", Put("kvpage", tokens=4))
    parts = [each.part for each in listener.take(9)]
    assert parts == ["page", "tail", "logits", "hidden", "g.window", "page"]


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (key_of(7), (7).to_bytes(32, "big")),
        (b"%064x" % 7, (7).to_bytes(32, "big")),
        (key_of(7) + b".logits", None),
        (b"ns:" + b"g" * 64, None),
        (b"ns:abc", None),
        (b"", None),
    ],
)
def test_the_id_of_a_page_is_read_from_its_key(key: bytes, found: bytes | None) -> None:
    assert page_id_of(key) == found


def mirrored(mirror: dict[bytes, str], events: Iterable[Event]) -> None:
    """Carry out events on a mirror: page keys and the tier of each."""
    for event in events:
        match event.kind:
            case "stored":
                assert event.reason == ("replaced" if event.key in mirror else "new")
                mirror[event.key] = event.tier
            case "demoted" | "promoted":
                assert mirror[event.key] != event.tier
                mirror[event.key] = event.tier
            case "removed":
                assert mirror.pop(event.key) == event.tier
            case "cleared":
                for key in [key for key in mirror if key.startswith(event.namespace + b":")]:
                    del mirror[key]


@pytest.mark.parametrize("seed", range(5))
def test_a_mirror_made_of_events_is_the_cache(seed: int) -> None:
    rng = random.Random(seed)
    cache, clock = make_cache(1 << 20)
    _, listener = listening(cache, count_max=10**6)
    mirror: dict[bytes, str] = {}
    for _ in range(3000):
        key = key_of(rng.randrange(300), rng.choice([b"a", b"b"]))
        entry = cache.find(key)
        roll = rng.random()
        if roll < 0.7:
            parent = key_of(rng.randrange(300), b"a") if rng.random() < 0.5 else None
            how = Put("kvpage", tokens=4, parent=parent) if rng.random() < 0.9 else Put()
            cache.put(key, b"x" * rng.choice([10, 1000, 20_000]), how)
        elif roll < 0.9 and entry is not None:
            cache.delete(entry)
        elif roll < 0.95 and entry is not None:
            cache.expire_at(entry, clock.wall_ms + 5)
            clock.advance(0.01)
            cache.expire_due(100)
        elif roll > 0.998:
            cache.flush()
        clock.advance(0.001)
    mirrored(mirror, listener.take(10**6))
    assert set(mirror) == {each.key for each in cache.entries.values() if each.kind == "kvpage"}
    assert cache.stats.evicted > 100


@pytest.mark.anyio
async def test_pages_that_move_are_told_of_with_the_tier_they_are_in() -> None:
    cache, _ = make_cache()
    events, listener = listening(cache)
    tier = FakeTier()
    events.file_tiers = (tier.name,)
    async with opened(cache, tier) as mover:
        for number in range(3):
            cache.put(key_of(number), b"x" * 600, PAGE)
        await make_cold(cache, mover)
        found = cache.find(key_of(1))
        assert found is not None
        await load(mover, found)
        if found.is_cold:
            await load(mover, found)
        assert not found.is_cold
        await clean(cache, mover)
        for number in (0, 1):
            doomed = cache.find(key_of(number))
            assert doomed is not None
            cache.delete(doomed)
        got = [(each.kind, each.key, each.tier) for each in listener.take(99)]
    assert got == [
        *[("stored", key_of(number), "cpu") for number in range(3)],
        *[("demoted", key_of(number), tier.name) for number in range(3)],
        ("promoted", key_of(1), "cpu"),
        ("removed", key_of(0), tier.name),
        ("removed", key_of(1), "cpu"),
    ]


@pytest.mark.anyio
async def test_a_page_whose_last_copy_went_from_a_file_is_told_to_have_been_there() -> None:
    cache, _ = make_cache()
    events, listener = listening(cache)
    tier = FakeTier()
    events.file_tiers = ("nvme", "disk")
    async with opened(cache, tier) as mover:
        for number in range(2):
            cache.put(key_of(number), b"x" * 600, PAGE)
        await make_cold(cache, mover)
        listener.take(99)
        for number, reason in ((0, "evicted"), (1, "corrupt")):
            entry = cache.find(key_of(number))
            assert entry is not None
            tier.drop(entry.records[0], reason)
        got = [(each.kind, each.key, each.tier, each.reason) for each in listener.take(99)]
    assert got == [
        ("removed", key_of(0), "nvme", "evicted"),
        ("removed", key_of(1), "nvme", "corrupt"),
    ]


@pytest.mark.anyio
async def test_a_page_that_gets_its_tokens_while_it_is_in_a_file_is_told_to_be_there() -> None:
    cache, _ = make_cache()
    events, listener = listening(cache)
    tier = FakeTier()
    events.file_tiers = (tier.name,)
    async with opened(cache, tier) as mover:
        cache.put(key_of(1), b"x" * 600, PAGE)
        await make_cold(cache, mover)
        entry = cache.find(key_of(1))
        assert entry is not None
        listener.take(99)
        cache.describe(entry, Put("kvpage", tokens=16, token_ids=b"\1\0\0\0" * 16))
        assert entry.is_cold
        (event,) = listener.take(99)
    assert (event.kind, event.tier, event.tokens) == ("stored", tier.name, 16)


def test_a_page_stays_a_page_when_its_namespace_gets_a_schema() -> None:
    cache, _ = make_cache()
    _, listener = listening(cache)
    cache.put(key_of(1), b"x" * 600, PAGE)
    cache.namespaces.put(Schema(b"ns", Geometry(1, 1, 8, 4, "float16")))
    entry = cache.find(key_of(1))
    assert entry is not None
    cache.delete(entry)
    assert [(each.kind, each.part) for each in listener.take(9)] == [
        ("stored", "page"),
        ("removed", "page"),
    ]
