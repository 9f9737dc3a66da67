"""Pages are raised before somebody asks, and only where that costs nobody anything."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio.lowlevel
import pytest

from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.mover import Mover
from respkv.engine.prefetch import REST_S, TRIAL, Limits, Source, State
from respkv.engine.prefetcher import LOOK_S, Prefetcher, prefetching
from tests.engine.fake_tier import FakeTier
from tests.engine.files import clean, get, make_cold, opened, until
from tests.fakes import ManualClock, make_cache

pytestmark = pytest.mark.anyio
PAGE_BYTES = 5000
ALWAYS = Limits("on", 1 << 20)


@asynccontextmanager
async def prefetched(
    limits: Limits = ALWAYS, *, arena_bytes: int = 2 << 20
) -> AsyncIterator[tuple[Cache, ManualClock, Mover, FakeTier, Prefetcher]]:
    cache, clock = make_cache(arena_bytes)
    tier = FakeTier()
    async with (
        opened(cache, tier) as mover,
        prefetching(cache, mover, limits) as prefetcher,
    ):
        await until(lambda: prefetcher._is_running)
        yield cache, clock, mover, tier, prefetcher
        prefetcher.check()


def put_chain(
    cache: Cache, name: str, num_pages: int, parent: bytes = b"", session: bytes = b""
) -> list[Entry]:
    """Store a chain of pages, and return them."""
    pages: list[Entry] = []
    for number in range(num_pages):
        key = b"ns:%s-%d" % (name.encode(), number)
        how = Put("kvpage", tokens=16, parent=parent or None, session=session)
        pages.append(cache.put(key, (key * 10).ljust(PAGE_BYTES), how))
        parent = key
    return pages


def match(cache: Cache, pages: Sequence[Entry]) -> list[Entry]:
    return cache.match([page.key for page in pages], cache.clock.now)


def num_warm(pages: Sequence[Entry]) -> int:
    return sum(not page.is_cold for page in pages)


async def idle(mover: Mover) -> None:
    """Wait until nothing is read any more."""
    for _ in range(5):
        await anyio.lowlevel.checkpoint()
    await until(lambda: not len(mover.loader))


async def test_what_was_matched_is_raised_before_it_is_asked_for() -> None:
    async with prefetched() as (cache, _, mover, tier, prefetcher):
        pages = put_chain(cache, "a", 4)
        await make_cold(cache, mover)
        assert match(cache, pages) == pages
        await until(lambda: num_warm(pages) == 4)
        assert sorted(tier.reads) == [page.key for page in pages]
        assert prefetcher.book.nbytes == sum(page.nbytes for page in pages)
        for page in pages:
            assert cache.use(page.key)
        prefetcher.book.sweep(cache.clock.now)
        tally = prefetcher.book.tallies[Source.MATCH]
        assert (tally.num_raised, tally.num_won, tally.num_lost) == (4, 4, 0)
        assert prefetcher.book.nbytes == 0


async def test_nothing_is_raised_when_prefetch_is_off() -> None:
    async with prefetched(Limits("off", 1 << 20)) as (cache, clock, mover, tier, prefetcher):
        pages = put_chain(cache, "a", 4)
        await make_cold(cache, mover)
        match(cache, pages)
        assert prefetcher.expect(pages, clock.now) == 0
        await idle(mover)
        assert tier.reads == []


async def test_a_budget_bounds_what_is_raised_and_not_used() -> None:
    limits = Limits("on", 2 * PAGE_BYTES + 1000)
    async with prefetched(limits) as (cache, _, mover, _, prefetcher):
        pages = put_chain(cache, "a", 5)
        await make_cold(cache, mover)
        match(cache, pages)
        await until(lambda: num_warm(pages) == 2)
        await idle(mover)
        assert num_warm(pages) == 2
        assert prefetcher.book.tallies[Source.MATCH].num_missed == 3


async def test_plans_for_later_leave_room_for_what_is_asked_for_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("respkv.engine.prefetcher.WISHES_MAX", 8)
    async with prefetched() as (cache, clock, mover, _, prefetcher):
        later, now = put_chain(cache, "a", 6), put_chain(cache, "b", 4)
        await make_cold(cache, mover)
        for _ in range(20):  # each plan replaces the one before
            assert prefetcher.expect(later, clock.now + 1000) == 4
        assert len(prefetcher._wishes) <= 16
        match(cache, now)
        await until(lambda: num_warm(now) == 4)
        assert num_warm(later) == 0


async def test_what_most_went_on_to_is_raised_as_well() -> None:
    async with prefetched() as (cache, _, mover, _, prefetcher):
        pages = put_chain(cache, "a", 4)
        for _ in range(8):
            match(cache, pages)
        await make_cold(cache, mover)
        match(cache, pages[:2])
        await until(lambda: num_warm(pages) == 4)
        assert prefetcher.book.tallies[Source.CHAIN].num_raised == 2


async def test_what_few_went_on_to_stays_where_it_is() -> None:
    async with prefetched() as (cache, _, mover, _, prefetcher):
        front = put_chain(cache, "a", 2)
        behind = [put_chain(cache, f"b{n}", 1, front[-1].key)[0] for n in range(8)]
        for page in behind:
            match(cache, [*front, page])
        await make_cold(cache, mover)
        match(cache, front)
        await until(lambda: num_warm(front) == 2)
        await idle(mover)
        assert num_warm(behind) == 0
        assert prefetcher.book.tallies[Source.CHAIN].num_raised == 0


async def test_a_hint_raises_shortly_before_its_time() -> None:
    async with prefetched() as (cache, clock, mover, tier, prefetcher):
        pages = put_chain(cache, "a", 3)
        await make_cold(cache, mover)
        assert prefetcher.expect(reversed(pages), clock.now + 30) == 3
        clock.advance(20)
        prefetcher.look()
        await idle(mover)
        assert tier.reads == []
        clock.advance(9.95)
        prefetcher.look()
        await until(lambda: num_warm(pages) == 3)
        assert sorted(tier.reads) == [page.key for page in pages]
        assert prefetcher.book.tallies[Source.HINT].num_raised == 3


async def test_a_page_is_raised_with_the_parts_that_it_is_of_no_use_without() -> None:
    async with prefetched() as (cache, clock, mover, _, prefetcher):
        page_key = b"ns:" + b"ab" * 32
        page = cache.put(page_key, bytes(PAGE_BYTES), Put("kvpage", tokens=16))
        how = Put("kvpage", tokens=16, parent=page_key)
        bound, free = (
            cache.put(page_key + suffix, bytes(PAGE_BYTES), how) for suffix in (b".g.w", b".logits")
        )
        await make_cold(cache, mover)
        assert prefetcher.expect([page], clock.now) == 2
        await until(lambda: num_warm([page, bound]) == 2)
        await idle(mover)
        assert free.is_cold


async def test_a_hint_that_was_taken_back_raises_nothing() -> None:
    async with prefetched() as (cache, clock, mover, tier, prefetcher):
        pages = put_chain(cache, "a", 3)
        await make_cold(cache, mover)
        prefetcher.expect(pages, clock.now + 3)
        prefetcher.forget(pages)
        clock.advance(3)
        prefetcher.look()
        await idle(mover)
        assert tier.reads == []


async def test_what_leaves_memory_after_a_hint_is_raised_for_it_too() -> None:
    async with prefetched() as (cache, clock, mover, tier, prefetcher):
        pages = put_chain(cache, "a", 3, session=b"s")
        cache.requests.expect(b"s", b"ns", clock.now + 30)
        assert prefetcher.expect(pages, clock.now + 30) == 0, "they are in memory"
        await make_cold(cache, mover)
        clock.advance(20)
        prefetcher.look()
        await idle(mover)
        assert tier.reads == []
        clock.advance(9.95)
        prefetcher.look()
        await until(lambda: num_warm(pages) == 3)
        assert sorted(tier.reads) == [page.key for page in pages]
        await make_cold(cache, mover)
        clock.advance(LOOK_S)
        prefetcher.look()
        await idle(mover)
        assert len(tier.reads) == 3, "what had to go again is not raised for the same hint"


async def test_what_leaves_memory_after_a_hint_was_void_stays_out() -> None:
    async with prefetched() as (cache, clock, mover, tier, prefetcher):
        put_chain(cache, "a", 3, session=b"s")
        cache.requests.expect(b"s", b"ns", clock.now + 3)
        await make_cold(cache, mover)
        cache.requests.end(b"s", b"ns")
        clock.advance(3)
        prefetcher.look()
        await idle(mover)
        assert tier.reads == []


async def test_a_load_that_somebody_waits_for_goes_first() -> None:
    async with prefetched() as (cache, _, mover, tier, prefetcher):
        pages = put_chain(cache, "a", 3)
        others = put_chain(cache, "b", 2)
        await make_cold(cache, mover)
        tier.close_gate()
        loads = [mover.start_load(page) for page in others]
        await until(lambda: len(tier.reads) == 2)
        match(cache, pages)
        prefetcher.look()
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        assert len(tier.reads) == 2, "nothing was read beside them"
        tier.open_gate()
        for load in loads:
            await load.wait()
            mover.release(load)
        await until(lambda: num_warm(pages) == 3)


async def test_who_asks_for_what_is_on_its_way_joins() -> None:
    async with prefetched() as (cache, _, mover, tier, prefetcher):
        pages = put_chain(cache, "a", 1)
        await make_cold(cache, mover)
        tier.close_gate()
        match(cache, pages)
        await until(lambda: len(tier.reads) == 1)
        load = mover.start_load(pages[0])
        assert cache.stats.loads_joined == 1
        tier.open_gate()
        await load.wait()
        mover.release(load)
        assert len(tier.reads) == 1
        assert not pages[0].is_cold
        assert prefetcher.book.find(pages[0]) is not None


async def fill(cache: Cache, mover: Mover) -> list[Entry]:
    """Fill memory with pages that have a copy each; return those that are there."""
    pages: list[Entry] = []
    while not cache.stats.demoted:
        pages += put_chain(cache, f"f{len(pages)}", 1)
        await clean(cache, mover)
    warm = [page for page in pages if not page.is_cold]
    assert len(warm) > 10
    return warm


async def test_what_is_hotter_stays_in_memory() -> None:
    async with prefetched(arena_bytes=1 << 20) as (cache, clock, mover, _, prefetcher):
        pages = put_chain(cache, "a", 4)
        await make_cold(cache, mover)
        warm = await fill(cache, mover)
        match(cache, pages)
        await idle(mover)
        await until(lambda: not prefetcher._wanted)
        assert num_warm(pages) == 0
        assert num_warm(warm) == len(warm)
        assert prefetcher.book.tallies[Source.MATCH].num_missed == 4
        clock.advance(60)  # now they are not hotter any more
        match(cache, pages)
        await until(lambda: num_warm(pages) == 4)
        assert num_warm(warm) >= len(warm) - 4


async def test_what_has_no_copy_never_makes_room() -> None:
    async with prefetched(arena_bytes=1 << 20) as (cache, clock, mover, tier, _):
        pages = put_chain(cache, "a", 2)
        await make_cold(cache, mover)
        full = await fill(cache, mover)
        warm = [put_chain(cache, f"d{n}", 1)[0] for n in range(len(full))]
        assert num_warm(full) == 0
        tier.close_gate()
        clock.advance(60)
        match(cache, pages)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        assert num_warm(pages) == 0
        assert all(page.position >= 0 and not page.is_cold for page in warm)
        tier.open_gate()


async def test_pages_that_go_while_they_are_read_leave_nothing_behind() -> None:
    async with prefetched() as (cache, _, mover, tier, prefetcher):
        pages = put_chain(cache, "a", 3)
        await make_cold(cache, mover)
        tier.close_gate()
        match(cache, pages)
        await until(lambda: len(tier.reads) > 0)
        cache.flush()
        tier.open_gate()
        await idle(mover)
        assert len(prefetcher.book) == prefetcher.book.nbytes == 0
        assert not prefetcher._wanted


async def test_sessions_that_return_are_raised_before_they_do() -> None:
    """Each conversation goes on 8 s after its last turn, and has left memory by then."""
    limits = Limits("auto", 4 << 20)
    async with prefetched(limits, arena_bytes=4 << 20) as (cache, clock, mover, _, prefetcher):
        sessions = [put_chain(cache, f"s{n}", 3) for n in range(30)]
        tally = prefetcher.book.tallies[Source.SESSION]
        num_ready = []
        for turn in range(6):
            for number, pages in enumerate(sessions):
                assert match(cache, pages) == pages
                last = pages[-1].key
                pages += put_chain(cache, f"s{number}t{turn}", 1, last)
            await make_cold(cache, mover)
            for _ in range(20):
                clock.advance(8.0 / 20)
                prefetcher.look()
                await idle(mover)
            num_ready.append(sum(num_warm(pages) == len(pages) for pages in sessions))
        assert prefetcher.book.gates[Source.SESSION].state is State.ON
        assert num_ready[-1] == 30, num_ready
        assert tally.num_won > 5 * tally.num_lost


async def test_prefetching_that_does_not_pay_turns_itself_off_and_looks_again() -> None:
    """Clients match and never get, until one day they do."""
    async with prefetched(Limits("auto", 1 << 20)) as (cache, clock, mover, tier, prefetcher):
        chains = [put_chain(cache, f"c{n}", 4) for n in range(40)]
        tally = prefetcher.book.tallies[Source.MATCH]

        async def turn(chain: list[Entry], *, gets: bool) -> None:
            match(cache, chain)
            await idle(mover)
            if gets:
                for page in chain:
                    assert await get(cache, mover, page.key)
                    cache.use(page.key)
            await make_cold(cache, mover)
            clock.advance(LOOK_S)
            prefetcher.look()

        await make_cold(cache, mover)
        for chain in chains[:10]:
            await turn(chain, gets=False)
        assert prefetcher.info_fields()["match_state"] == "off"
        num_raised, num_reads = tally.num_raised, len(tier.reads)
        assert num_raised <= 24
        for chain in chains[10:20]:
            await turn(chain, gets=False)
        assert (tally.num_raised, len(tier.reads)) == (num_raised, num_reads)
        clock.advance(REST_S)
        for chain in chains[20 : 20 + TRIAL // 4]:
            await turn(chain, gets=True)
        assert tally.num_raised == num_raised, "a trial reads nothing"
        assert prefetcher.info_fields()["match_state"] == "on"
        await turn(chains[-1], gets=True)
        assert tally.num_raised > num_raised


async def test_info_counts_for_each_source() -> None:
    async with prefetched() as (cache, _, mover, _, prefetcher):
        pages = put_chain(cache, "a", 2)
        await make_cold(cache, mover)
        match(cache, pages)
        await until(lambda: num_warm(pages) == 2)
        fields = prefetcher.info_fields()
        assert fields["match_raised"] == fields["pending"] == 2
        assert fields["match_state"] == "on"
        assert fields["chain_state"] == "trial"
        assert fields["pending_bytes"] == sum(page.nbytes for page in pages)
