"""The janitor: what has expired goes in the background, and a broken state is noticed."""

import logging
from functools import partial

import anyio
import anyio.lowlevel
import pytest

from respkv.engine.cache import Cache
from respkv.engine.entry import Put
from respkv.engine.janitor import SWEEP_STEP, make_janitor
from respkv.engine.messages import Check, Sweep
from respkv.engine.supervisor import supervise
from respkv.errors import ActorDown
from tests.fakes import ManualClock, make_cache

pytestmark = pytest.mark.anyio


def fill(cache: Cache, clock: ManualClock, num: int) -> None:
    for number in range(num):
        cache.put(b"%d" % number, b"v", Put(expires_ms=clock.wall_ms + 1000))
    cache.put(b"stays", b"v")


async def no_recovery() -> None:
    raise AssertionError("the janitor crashed")


async def test_a_sweep_removes_what_has_expired_and_lets_others_run_in_between() -> None:
    cache, clock = make_cache(small_max=1 << 20)
    fill(cache, clock, 3 * SWEEP_STEP + 5)
    clock.advance(2)
    janitor = make_janitor(cache)
    seen = []

    async def watch() -> None:
        while len(cache.entries) > 1:
            seen.append(len(cache.entries))
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supervise, janitor, no_recovery)
        tasks.start_soon(watch)
        await janitor.ask(Sweep())
        janitor.stop()
    assert list(cache.entries) == [b"stays"]
    assert len(set(seen)) > 1, "nobody ran between the steps"
    assert cache.stats.expired == 3 * SWEEP_STEP + 5
    cache.check()


async def test_a_sweep_of_keys_whose_ttl_was_set_twice_does_not_crash() -> None:
    cache, clock = make_cache()
    fill(cache, clock, 5)
    for key in (b"1", b"2"):
        cache.expire_at(cache.entries[key], 5)
        cache.expire_at(cache.entries[key], 7)
        cache.expire_at(cache.entries[key], 5)
    janitor = make_janitor(cache)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supervise, janitor, no_recovery)
        await janitor.ask(Sweep())
        janitor.stop()
    assert len(cache.entries) == 4


async def test_a_state_that_is_not_whole_empties_the_cache(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache, clock = make_cache()
    fill(cache, clock, 5)
    janitor = make_janitor(cache)

    async def forget() -> None:
        cache.flush()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(supervise, janitor, forget, backoff_s=0.0))
        await janitor.ask(Check())
        cache.room.small_bytes += 1
        with pytest.raises(ActorDown), caplog.at_level(logging.CRITICAL):
            await janitor.ask(Check())
        await janitor.ask(Check())  # it is whole again, and served again
        tasks.cancel_scope.cancel()
    assert len(cache.entries) == 0
    assert cache.stats.checks == 2


async def test_more_advice_than_there_is_room_for_is_dropped() -> None:
    cache, _ = make_cache()
    janitor = make_janitor(cache)
    assert [janitor.advise(Sweep()) for _ in range(5)] == [True] * 4 + [False]
    janitor.abandon()
