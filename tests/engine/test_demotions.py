"""Demotions: pages leave memory once they are in a file, and none is lost by it."""

import pytest

from respkv.engine.entry import Put
from tests.engine.fake_tier import FakeTier
from tests.engine.files import PAGE, clean, get, opened, until
from tests.fakes import make_cache

pytestmark = pytest.mark.anyio


async def test_pages_are_written_first_and_then_leave_memory() -> None:
    cache, clock = make_cache()
    async with opened(cache, FakeTier()) as mover:
        entries = [cache.put(b"ns:%d" % n, b"%d" % n * 3000, PAGE) for n in range(8)]
        clock.advance(1)
        assert mover.demotions.ask(entries) == 8
        assert mover.demotions.ask(entries) == 8, "asking again changes nothing"
        await until(lambda: all(entry.is_cold for entry in entries))
        assert len(mover.demotions) == 0
        assert cache.slabs.used_bytes == 0
        cache.check()
        for number in range(8):
            assert await get(cache, mover, b"ns:%d" % number) == b"%d" % number * 3000


async def test_a_page_that_is_used_meanwhile_stays() -> None:
    cache, clock = make_cache()
    async with opened(cache, FakeTier()) as mover:
        used, other = (cache.put(key, b"x" * 3000, PAGE) for key in (b"ns:a", b"ns:b"))
        mover.demotions.ask([used, other])
        clock.advance(1)
        cache.use(used.key)
        await until(lambda: other.is_cold)
        await until(lambda: not len(mover.demotions))
        assert not used.is_cold


async def test_a_page_that_is_pinned_or_read_leaves_when_that_has_ended() -> None:
    cache, clock = make_cache()
    async with opened(cache, FakeTier()) as mover:
        pinned = cache.put(b"ns:a", b"x" * 3000, Put("kvpage", pinned_until=clock.now + 5))
        read = cache.put(b"ns:b", b"x" * 3000, PAGE)
        await clean(cache, mover)
        slot = read.slot
        assert slot is not None
        cache.borrow(slot)
        mover.demotions.ask([pinned, read])
        mover.demotions.look()
        assert [pinned.is_cold, read.is_cold] == [False, False]
        clock.advance(6)
        cache.restore(slot)
        mover.poke()
        await until(lambda: pinned.is_cold and read.is_cold)


async def test_what_no_tier_takes_stays_in_memory() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        entry = cache.put(b"ns:a", b"x" * 3000, PAGE)
        tier.health.state = "off"
        mover.demotions.ask([entry])
        for _ in range(3):
            mover.demotions.look()
        assert not entry.is_cold
        cache.delete(entry)
        mover.demotions.look()
        assert len(mover.demotions) == 0
