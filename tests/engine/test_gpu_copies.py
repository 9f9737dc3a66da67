"""Which pages are in the gpu tier: who comes, who goes, and that no old value stays."""

import random
import subprocess
import sys
from collections.abc import Callable

import pytest

from respkv.engine import gpu_copies
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.placement import GpuPromote, is_lifted
from respkv.errors import LeaseGone
from respkv.tiers.format import hash64
from tests.engine.fake_gpu import (
    NBYTES,
    PAGE,
    FakeGpu,
    check_bytes,
    declare,
    put_page,
    read_page,
)
from tests.fakes import ManualClock, make_cache

SLOTS = 8


class Asked(list[Entry]):
    """Entries that a copy was asked for."""

    def advise(self, entry: Entry) -> bool:
        self.append(entry)
        return True


def make(
    promote: GpuPromote = "second", *, slots: int = SLOTS
) -> tuple[Cache, ManualClock, FakeGpu, Asked]:
    cache, clock = make_cache(1 << 20)
    gpu, asked = FakeGpu(slots * NBYTES), Asked()
    cache.gpu.use(gpu, promote)
    cache.gpu.advise = asked.advise
    declare(cache)
    return cache, clock, gpu, asked


def lift(cache: Cache, gpu: FakeGpu, entry: Entry) -> bool:
    """Copy a page as the actor does, at once."""
    form = cache.gpu.form_of(entry)
    assert form is not None
    assert entry.slot is not None
    slot = cache.gpu.take(form.nbytes)
    if slot is None:
        return False
    payload = cache.payload(entry.slot)
    gpu.memory[slot.offset : slot.offset + form.nbytes] = payload[: form.nbytes]
    flight = cache.gpu.begin_lift(entry)
    assert cache.gpu.attach(flight, slot, form, hash64(payload))
    cache.gpu.end_lift(flight)
    return True


def fill(cache: Cache, gpu: FakeGpu, clock: ManualClock, count: int = SLOTS) -> list[Entry]:
    """Put and lift pages, the first one used longest ago."""
    entries = []
    for number in range(count):
        entries.append(put_page(cache, b"ns:%d" % number, number))
        assert lift(cache, gpu, entries[-1])
        clock.advance(1)
    return entries


# -- who comes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("promote", "reads", "answer"),
    [
        ("never", 1000, False),
        ("first", 0, False),
        ("first", 1, True),
        ("second", 1, False),
        ("second", 2, True),
        ("second", 3, True),
    ],
)
def test_the_setting_says_on_which_read_a_page_is_copied(
    promote: GpuPromote, reads: int, answer: bool
) -> None:
    assert is_lifted(promote, reads) is answer
    cache, _, _, asked = make(promote)
    entry = put_page(cache, b"ns:1", 1)
    read_page(cache, b"ns:1", reads)
    assert (entry in asked) is answer


def test_a_match_is_no_read() -> None:
    cache, clock, _, asked = make("first")
    put_page(cache, b"ns:1", 1)
    for _ in range(5):
        cache.match([b"ns:1"], clock.now + 5)
    assert not asked
    read_page(cache, b"ns:1")
    assert len(asked) == 1


def test_reads_are_counted_anew_for_a_new_value() -> None:
    cache, _, _, asked = make("second")
    put_page(cache, b"ns:1", 1)
    read_page(cache, b"ns:1")
    put_page(cache, b"ns:1", 2)
    read_page(cache, b"ns:1")
    assert not asked


def test_only_pages_of_a_schema_are_copied() -> None:
    cache, _, _, asked = make("first")
    cache.put(b"ns:string", bytes(NBYTES))
    cache.put(b"free:page", bytes(NBYTES), PAGE)
    cache.put(b"small", b"tiny")
    for key in (b"ns:string", b"free:page", b"small"):
        read_page(cache, key, 3)
    assert not asked


def test_a_page_that_never_fits_is_not_asked_for() -> None:
    cache, _, _, asked = make("first", slots=1)
    put_page(cache, b"ns:1", 1)
    read_page(cache, b"ns:1")
    assert len(asked) == 1
    assert NBYTES > 4096
    cache.gpu.use(FakeGpu(4096), "first")
    put_page(cache, b"ns:2", 2)
    read_page(cache, b"ns:2")
    assert len(asked) == 1


def test_advice_that_is_dropped_is_counted() -> None:
    cache, _, _, _ = make("first")
    cache.gpu.advise = lambda entry: False
    put_page(cache, b"ns:1", 1)
    read_page(cache, b"ns:1", 3)
    assert cache.gpu.stats.dropped == 3


def test_so_many_reads_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_copies, "READS_KEPT_MAX", 4)
    cache, _, _, asked = make("second")
    for number in range(5):
        put_page(cache, b"ns:%d" % number, number)
        read_page(cache, b"ns:%d" % number)
    read_page(cache, b"ns:0")
    assert not asked, "its first read was forgotten"
    read_page(cache, b"ns:4")
    assert [entry.key for entry in asked] == [b"ns:4"]


def test_without_the_tier_nothing_is_looked_at() -> None:
    cache, _ = make_cache()
    declare(cache)
    put_page(cache, b"ns:1", 1)
    read_page(cache, b"ns:1", 5)
    cache.check()
    assert not cache.gpu.is_on
    with pytest.raises(AssertionError, match="no gpu tier"):
        _ = cache.gpu.tier


# -- what ends a copy ---------------------------------------------------------------------------

ENDS: dict[str, Callable[[Cache, ManualClock, Entry], object]] = {
    "SET": lambda cache, clock, entry: cache.put(entry.key, b"x" * 5000),
    "SET of a small value": lambda cache, clock, entry: cache.put(entry.key, b"x"),
    "KV.PUT": lambda cache, clock, entry: put_page(cache, entry.key, 99),
    "DEL": lambda cache, clock, entry: cache.delete(entry),
    "FLUSHALL": lambda cache, clock, entry: cache.flush(),
    "eviction": lambda cache, clock, entry: cache.room.lose(entry),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_copy_goes_in_the_turn_in_which_its_value_goes(name: str) -> None:
    cache, clock, gpu, _ = make()
    entry = put_page(cache, b"ns:1", 1)
    lift(cache, gpu, entry)
    assert cache.gpu.find(entry) is not None
    ENDS[name](cache, clock, entry)
    assert cache.gpu.find(entry) is None
    assert gpu.slots.used_bytes == 0
    assert cache.gpu.bytes == 0
    cache.check()


@pytest.mark.parametrize("is_met", ["find", "sweep"])
def test_the_copy_goes_when_its_page_expires(is_met: str) -> None:
    cache, clock, gpu, _ = make()
    entry = put_page(cache, b"ns:1", 1, Put("kvpage", expires_ms=clock.wall_ms + 500))
    lift(cache, gpu, entry)
    clock.advance(1)
    assert (cache.find(b"ns:1") is None) if is_met == "find" else cache.expire_due(10) == 1
    assert gpu.slots.used_bytes == 0


@pytest.mark.parametrize("name", [name for name in ENDS if name != "eviction"])
def test_a_copy_that_is_on_its_way_comes_too_late(name: str) -> None:
    cache, clock, _, _ = make()
    entry = put_page(cache, b"ns:1", 1)
    form = cache.gpu.form_of(entry)
    assert form is not None
    slot = cache.gpu.take(form.nbytes)
    assert slot is not None
    flight = cache.gpu.begin_lift(entry)
    ENDS[name](cache, clock, entry)
    assert not cache.gpu.attach(flight, slot, form, 0)
    cache.gpu.end_lift(flight)
    cache.gpu.give_back(slot)
    assert cache.gpu.stats.void == 1
    cache.check()


def test_a_page_put_again_with_the_same_content_keeps_its_copy() -> None:
    cache, _, gpu, _ = make()
    key = b"ns:" + b"0" * 64
    entry = put_page(cache, key, 1)
    lift(cache, gpu, entry)
    assert cache.has_page(key, NBYTES) is entry
    assert cache.gpu.find(entry) is not None


# -- who goes for others ------------------------------------------------------------------------


def test_the_page_used_longest_ago_goes() -> None:
    cache, clock, gpu, _ = make()
    entries = fill(cache, gpu, clock)
    read_page(cache, b"ns:0")
    lift(cache, gpu, put_page(cache, b"ns:new", 200))
    left = [entry for entry in entries if cache.gpu.find(entry)]
    assert left == [entries[0], *entries[2:]]
    assert cache.gpu.stats.evicted == 1
    assert entries[1].slot is not None, "it is in memory all the same"
    check_bytes(cache, gpu)
    cache.check()


def test_pinned_and_leased_pages_stay() -> None:
    cache, clock, gpu, _ = make()
    entries = fill(cache, gpu, clock)
    cache.pin(entries[0], clock.now + 100)
    lease = cache.gpu.begin_lease(7, clock.now + 100)
    assert cache.gpu.add_to_lease(lease, entries[1]) is cache.gpu.find(entries[1])
    for number in range(SLOTS - 2):
        assert lift(cache, gpu, put_page(cache, b"ns:new%d" % number, 100))
        assert cache.gpu.find(entries[0])
        assert cache.gpu.find(entries[1])
    cache.check()


def test_when_all_are_held_there_is_no_copy() -> None:
    cache, clock, gpu, _ = make()
    for entry in fill(cache, gpu, clock):
        cache.pin(entry, clock.now + 100)
    assert not lift(cache, gpu, put_page(cache, b"ns:new", 200))
    assert cache.gpu.stats.no_room == 1
    assert cache.gpu.stats.evicted == 0


def test_pages_of_another_size_make_room() -> None:
    cache, clock, gpu, _ = make()
    fill(cache, gpu, clock)
    declare(cache, b"half", codecs=((b"gpu", b"i4"),))
    entry = put_page(cache, b"half:1", 1)
    assert lift(cache, gpu, entry)
    copy = cache.gpu.find(entry)
    assert copy is not None
    assert copy.form.nbytes < NBYTES
    cache.check()


def test_capacity_is_never_exceeded() -> None:
    cache, clock, gpu, _ = make()
    for number in range(50):
        lift(cache, gpu, put_page(cache, b"ns:%d" % (number % 20), number))
        clock.advance(1)
        assert gpu.slots.used_bytes <= gpu.slots.capacity_bytes
        check_bytes(cache, gpu)
    assert len(cache.gpu.by_entry) == SLOTS


# -- leases -------------------------------------------------------------------------------------


def test_leased_bytes_stay_whatever_becomes_of_the_key() -> None:
    cache, clock, gpu, _ = make(slots=2)
    entry = put_page(cache, b"ns:1", 1)
    lift(cache, gpu, entry)
    lease = cache.gpu.begin_lease(7, clock.now + 10)
    copy = cache.gpu.add_to_lease(lease, entry)
    assert copy is not None
    cache.delete(entry)
    for number in range(2, 9):
        lift(cache, gpu, put_page(cache, b"ns:%d" % number, number))
    place = copy.slot.offset
    assert gpu.memory[place : place + NBYTES] == bytes([1]) * NBYTES
    cache.check()
    assert cache.gpu.leases.end(7, lease.number)
    assert copy.slot.holders == 0
    cache.check()


@pytest.mark.parametrize("ending", ["lapse", "drop"])
def test_a_lease_ends_with_its_time_and_its_owner(ending: str) -> None:
    cache, clock, gpu, _ = make()
    entry = put_page(cache, b"ns:1", 1)
    lift(cache, gpu, entry)
    lease = cache.gpu.begin_lease(7, clock.now + 10)
    copy = cache.gpu.add_to_lease(lease, entry)
    assert copy is not None
    assert copy.slot.holders == 2
    if ending == "lapse":
        clock.advance(11)
        assert cache.lapse() == []
        assert cache.stats.lapsed == 1
    else:
        cache.drop_owner(7)
    assert copy.slot.holders == 1
    with pytest.raises(LeaseGone):
        cache.gpu.add_to_lease(lease, entry)


def test_leases_of_both_tiers_have_numbers_of_their_own() -> None:
    cache, clock, _, _ = make()
    put_page(cache, b"ns:1", 1)
    below = cache.lease(7, [cache.entries[b"ns:1"]], clock.now + 10)
    above = cache.gpu.begin_lease(7, clock.now + 10)
    assert above.number > below.number + (1 << 40)
    assert not cache.leases.end(7, above.number)
    assert not cache.gpu.leases.end(7, below.number)


# -- all together -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_copy_is_ever_of_an_old_value(seed: int) -> None:
    rng = random.Random(seed)
    cache, clock, gpu, asked = make("second", slots=4)
    leases = []
    for step in range(1500):
        key = b"ns:%d" % rng.randrange(14)
        entry = cache.find(key)
        choice = rng.random()
        if choice < 0.25:
            put_page(cache, key, rng.randrange(256))
        elif choice < 0.65 and entry is not None:
            read_page(cache, key)
        elif choice < 0.72 and entry is not None:
            cache.delete(entry)
        elif choice < 0.77 and entry is not None:
            cache.expire_at(entry, clock.wall_ms + rng.randrange(2000))
        elif choice < 0.84 and entry is not None:
            lease = cache.gpu.begin_lease(rng.randrange(3), clock.now + rng.random() * 20)
            cache.gpu.add_to_lease(lease, entry)
            leases.append(lease)
        elif choice < 0.9:
            cache.lapse()
            cache.drop_owner(rng.randrange(3))
        elif choice < 0.903:
            cache.flush()
        clock.advance(rng.random())
        while asked:
            found = asked.pop()
            if found.position >= 0 and found not in cache.gpu.by_entry:
                lift(cache, gpu, found)
        check_bytes(cache, gpu)
        if step % 10 == 0:
            cache.check()
    assert cache.gpu.stats.lifted > 20
    assert cache.gpu.stats.evicted > 0
    cache.gpu.clear()
    for owner in range(3):
        cache.drop_owner(owner)
    assert gpu.slots.used_bytes == 0


def test_the_engine_loads_no_torch() -> None:
    code = "import sys, respkv.engine.gpu_actor, respkv.server.serve; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
