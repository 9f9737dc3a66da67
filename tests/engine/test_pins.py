"""Pins: how many bytes are pinned, whatever becomes of the pages."""

from respkv.engine.entry import Put
from respkv.engine.pins import SLACK
from tests.fakes import make_cache


def page(pinned_until: float = 0.0) -> Put:
    return Put("kvpage", pinned_until=pinned_until)


def test_a_pin_counts_until_it_ends_or_is_taken_away() -> None:
    cache, clock = make_cache()
    a = cache.put(b"ns:a", b"x" * 1000, page(clock.now + 5))
    b = cache.put(b"ns:b", b"x" * 2000, page(clock.now + 9))
    assert (cache.pins.nbytes, len(cache.pins)) == (3000, 2)
    assert cache.pins.nbytes_but(a) == 2000
    assert cache.pins.nbytes_but(a, b, None) == 0
    cache.pin(a, clock.now + 1)  # sooner
    clock.advance(2)
    assert (cache.pins.nbytes, len(cache.pins)) == (2000, 1)
    cache.pin(b, 0.0)
    assert cache.pins.nbytes == 0
    cache.pin(b, clock.now + 1)
    cache.pin(b, clock.now + 60)  # later; the first deadline means nothing then
    clock.advance(30)
    assert cache.pins.nbytes == 2000


def test_pins_that_are_renewed_or_whose_pages_go_take_no_more_memory() -> None:
    cache, clock = make_cache()
    a = cache.put(b"ns:a", b"x" * 1000, page(clock.now + 3600))
    for number in range(3 * SLACK):
        cache.pin(a, clock.now + 3600 + number)
        cache.delete(cache.put(b"ns:b", b"x" * 1000, page(clock.now + 7200)))
    assert len(cache.pins._ends) <= SLACK + 3
    assert (cache.pins.nbytes, len(cache.pins)) == (1000, 1)
    clock.advance(3600 + 3 * SLACK)
    assert (cache.pins.nbytes, len(cache.pins)) == (0, 0)


def test_a_page_that_is_overwritten_deleted_or_flushed_is_counted_as_it_is() -> None:
    cache, clock = make_cache()
    cache.put(b"ns:a", b"x" * 1000, page(clock.now + 5))
    cache.put(b"ns:a", b"x" * 3000, page())
    assert cache.pins.nbytes == 3000, "the pin is of the key"
    cache.put(b"ns:a", b"a string")
    assert cache.pins.nbytes == 8
    cache.delete(cache.entries[b"ns:a"])
    assert cache.pins.nbytes == 0
    entry = cache.put(b"ns:b", b"x" * 1000, page(clock.now + 5))
    cache.delete(entry)
    assert cache.pins.nbytes == 0
    cache.put(b"ns:b", b"x" * 1000, page(clock.now + 5))
    cache.flush()
    assert (cache.pins.nbytes, len(cache.pins)) == (0, 0)


def test_an_ordinary_value_that_is_pinned_counts_as_well() -> None:
    cache, clock = make_cache()
    entry = cache.put(b"k", b"x" * 1000)
    cache.pin(entry, clock.now + 5)
    assert cache.pins.nbytes == 1000
    cache.put(b"k", b"x" * 20)
    assert cache.pins.nbytes == 20
    cache.put(b"k", b"x" * 600, page())
    assert cache.pins.nbytes == 600
    cache.delete(cache.entries[b"k"])
    assert (cache.pins.nbytes, len(cache.pins)) == (0, 0)
