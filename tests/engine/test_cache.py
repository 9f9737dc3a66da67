"""The cache: known cases, and a machine that holds it against a dict that may forget."""

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from respkv.engine.cache import FLUSHED_NOTED_MAX, Cache
from respkv.engine.entry import SMALL_BYTES_MAX, Entry, Put
from respkv.engine.eviction import POLICIES
from respkv.engine.landing import Landing
from respkv.engine.leases import Lease, Mode
from respkv.engine.namespaces import Schema
from respkv.errors import LeaseGone, OutOfMemory
from respkv.page import Geometry
from respkv.tiers.format import HEADER_BYTES, check_page, hash64, read_header
from respkv.tiers.slab import SlabAllocator, Slot
from tests.fakes import ManualClock, make_cache

PAGE = Put("kvpage")
ID = b"ab" * 32


def value(cache: Cache, key: bytes) -> bytes | None:
    entry = cache.find(key)
    return None if entry is None else cache.copy(entry)


@pytest.mark.parametrize("nbytes", [0, 1, SMALL_BYTES_MAX, SMALL_BYTES_MAX + 1, 70_000])
def test_a_value_of_any_size_is_read_back(nbytes: int) -> None:
    cache, _ = make_cache()
    data = random.Random(nbytes).randbytes(nbytes)
    entry = cache.put(b"k", data)
    assert value(cache, b"k") == data
    assert (entry.slot is None) == (nbytes <= SMALL_BYTES_MAX)
    cache.check()


def test_a_page_has_a_slot_however_small_it_is_and_its_header_says_whose_it_is() -> None:
    cache, _ = make_cache()
    schema = Schema(b"ns", Geometry(1, 1, 1, 4, "float16"), b"model")
    cache.namespaces.put(schema)
    entry = cache.put(b"ns:a", b"x" * 16, PAGE)
    assert entry.slot is not None
    header = cache.arena[entry.slot.offset : entry.slot.offset + HEADER_BYTES]
    payload = cache.payload(entry.slot)
    found = check_page(header, payload, key=b"ns:a", generation=entry.slot.generation)
    assert found.namespace == schema.fingerprint_hash
    assert (entry.namespace, entry.tokens) == (b"ns", 4)


def test_nobody_sees_a_value_before_it_is_committed_or_after_it_is_abandoned() -> None:
    cache, _ = make_cache()
    cache.put(b"k", b"old")
    landing = cache.reserve(1000)
    landing.write(b"new" * 300)
    assert value(cache, b"k") == b"old"
    cache.abandon(landing)
    cache.abandon(landing)
    assert value(cache, b"k") == b"old"
    assert cache.slabs.used_bytes == 0
    cache.check()


def test_a_reader_keeps_what_it_reads_when_the_value_is_overwritten_deleted_and_flushed() -> None:
    cache, _ = make_cache()
    for away in ("overwrite", "delete", "flush", "expire"):
        entry = cache.put(b"k", b"a" * 5000)
        slot = entry.slot
        assert slot is not None
        cache.borrow(slot)
        if away == "overwrite":
            cache.put(b"k", b"b" * 5000)
        elif away == "delete":
            cache.delete(entry)
        elif away == "flush":
            cache.flush()
        else:
            cache.expire_at(entry, 1)
            assert cache.expire_due(10) == 1
        cache.put(b"other", b"c" * 5000)
        assert bytes(cache.payload(slot)) == b"a" * 5000
        cache.check()
        cache.restore(slot)
        cache.check()
        cache.flush()
        assert cache.slabs.used_bytes == 0


def test_an_overwrite_of_another_size_or_place_leaves_nothing_behind() -> None:
    cache, _ = make_cache()
    for nbytes in (0, 5000, 10, 300, 5001, 100_000, 1):
        cache.put(b"k", b"v" * nbytes)
        cache.check()
    cache.delete(cache.entries[b"k"])
    assert (cache.slabs.used_bytes, cache.room.small_bytes) == (0, 0)


def test_room_is_announced_when_the_last_holder_lets_go() -> None:
    cache, _ = make_cache()
    announced: list[int] = []
    cache.on_room = lambda: announced.append(cache.slabs.used_bytes)
    slot = cache.put(b"k", b"v" * 5000).slot
    assert slot is not None
    cache.borrow(slot)
    cache.borrow(slot)
    cache.delete(cache.entries[b"k"])
    cache.restore(slot)
    assert announced == []
    cache.restore(slot)
    assert announced == [0]


def test_a_ttl_ends_lazily_and_actively_and_says_so() -> None:
    cache, clock = make_cache()
    for key in (b"lazy", b"active"):
        cache.put(key, b"v", Put(expires_ms=clock.wall_ms + 1000))
    clock.advance(2)
    assert value(cache, b"lazy") is None
    assert cache.expire_due(10) == 1
    assert (len(cache.entries), cache.stats.expired) == (0, 2)
    assert cache.history.find(b"active") == "expired"


def test_an_entry_with_two_equal_tickets_expires_once() -> None:
    cache, clock = make_cache()
    entry = cache.put(b"k", b"v")
    for _ in range(3):
        cache.expire_at(entry, clock.wall_ms + 1000)
    clock.advance(2)
    assert cache.expire_due(200) == 1
    cache.check()


@pytest.mark.parametrize("nbytes", [5, 5000])
def test_a_put_replaces_the_ttl_or_keeps_it_when_asked(nbytes: int) -> None:
    cache, clock = make_cache()
    ends = clock.wall_ms + 1000
    cache.put(b"k", b"a" * nbytes, Put(expires_ms=ends))
    cache.put(b"k", b"b" * nbytes, Put(expires_ms=None))
    assert cache.entries[b"k"].expires_ms == ends
    cache.put(b"k", b"c" * nbytes)
    assert cache.entries[b"k"].expires_ms == 0
    cache.check()


def test_only_a_page_whose_key_is_an_id_counts_as_there() -> None:
    cache, _ = make_cache()
    cache.put(b"ns:" + ID, b"x" * 1000, PAGE)
    cache.put(b"ns:page", b"x" * 1000, PAGE)
    cache.put(b"other:" + ID, b"x" * 1000)  # a string: equal keys do not mean equal bytes
    assert cache.has_page(b"ns:" + ID, 1000) is cache.entries[b"ns:" + ID]
    assert cache.has_page(b"ns:" + ID, 999) is None
    assert cache.has_page(b"ns:page", 1000) is None
    assert cache.has_page(b"other:" + ID, 1000) is None
    assert cache.has_page(ID, 1000) is None


def test_leaves_are_evicted_before_the_pages_they_stand_behind() -> None:
    cache, clock = make_cache(1 << 20)
    parent = b""
    for number in range(6):
        key = b"p%d" % number
        cache.put(key, b"v" * 100_000, Put("kvpage", parent=parent))
        parent = key
        clock.advance(1)
    present: list[bool] = []
    for number in range(8):
        cache.put(b"q%d" % number, b"v" * 100_000, PAGE)
        present = [key in cache.entries for key in (b"p%d" % each for each in range(6))]
        assert present == sorted(present, reverse=True), "a page without the one before it"
    assert not all(present)
    assert cache.history.find(b"p5") == "evicted"
    cache.check()


@pytest.mark.parametrize("hold", ["promise", "pin", "borrow", "lease"])
def test_what_is_held_is_not_evicted_and_memory_that_cannot_be_had_changes_nothing(
    hold: str,
) -> None:
    cache, clock = make_cache(1 << 20)
    entries = [cache.put(b"k%d" % number, b"v" * 200_000) for number in range(4)]
    for entry in entries:
        assert entry.slot is not None
        if hold == "promise":
            cache.promise(entry, clock.now + 5)
        elif hold == "pin":
            entry.pinned_until = clock.now + 5
        elif hold == "borrow":
            cache.borrow(entry.slot)
        else:
            cache.lease(1, [entry], clock.now + 5)
    for nbytes in (200_000, 400_000):
        with pytest.raises(OutOfMemory, match="pinned, leased or in flight"):
            cache.put(b"new", b"v" * nbytes)
    assert len(cache.entries) == 4
    assert (cache.stats.oom, cache.stats.evicted) == (2, 0)
    assert cache.is_waiting_useful(200_000) == (hold != "pin")
    assert not cache.is_waiting_useful(2 << 20)
    cache.check()
    clock.advance(6)
    cache.lapse()
    if hold == "borrow":
        cache.restore(entries[0].slot or pytest.fail("it lost its slot"))
    cache.put(b"new", b"v" * 200_000)
    assert cache.stats.evicted == 1


def test_a_promise_is_never_shortened() -> None:
    cache, clock = make_cache()
    entry = cache.put(b"k", b"v")
    cache.promise(entry, clock.now + 10)
    cache.promise(entry, clock.now + 1)
    assert entry.held_until == clock.now + 10


def test_a_value_that_never_fits_is_refused_by_name() -> None:
    cache, _ = make_cache(1 << 20)
    assert not cache.is_waiting_useful(2 << 20)
    with pytest.raises(OutOfMemory, match="never fits"):
        cache.reserve(2 << 20)
    cache.check()


def test_a_reserved_slot_becomes_a_page_with_the_bytes_that_are_there_then() -> None:
    cache, clock = make_cache()
    lease = cache.lease_room(7, b"k", 1000, clock.now + 5)
    assert value(cache, b"k") is None
    cache.payload(lease.slots[0])[:] = b"w" * 1000
    landing = cache.adopt(cache.leases.take_over(lease))
    cache.check()
    cache.seal(b"k", landing, hash64(landing.memory), PAGE)
    assert value(cache, b"k") == b"w" * 1000
    with pytest.raises(LeaseGone):
        cache.leases.get(7, lease.number)
    cache.check()


def test_a_connection_that_goes_gives_back_its_leases() -> None:
    cache, clock = make_cache()
    entry = cache.put(b"k", b"v" * 1000)
    cache.lease(1, [entry, entry], clock.now + 5)
    cache.lease(2, [entry], clock.now + 5)
    cache.lease_room(1, b"new", 1000, clock.now + 5)
    cache.check()
    cache.drop_owner(1)
    assert len(cache.leases) == 1
    assert entry.slot is not None
    assert entry.slot.holders == 2
    cache.check()


def test_a_flush_forgets_keys_chains_and_ttls_and_remembers_why() -> None:
    cache, clock = make_cache(8 << 20, small_max=16 << 20)
    cache.put(b"a", b"v", Put(expires_ms=clock.wall_ms + 5))
    cache.put(b"b", b"v" * 1000, Put("kvpage", parent=b"p"))
    for number in range(FLUSHED_NOTED_MAX):
        cache.put(b"%d" % number, b"v")
    cache.flush()
    assert (len(cache.entries), cache.slabs.used_bytes, cache.room.small_bytes) == (0, 0, 0)
    assert cache.history.find(b"9") == "flushed"
    cache.check()
    cache.put(b"b", b"v" * 1000, PAGE)
    cache.check()


def test_a_check_notices_a_slot_that_nobody_accounts_for() -> None:
    cache, _ = make_cache()
    slot = cache.put(b"k", b"v" * 1000).slot
    assert slot is not None
    cache.slabs.hold(slot)
    with pytest.raises(AssertionError, match="not accounted"):
        cache.check()


class WatchedCache(Cache):
    """Asks its machine before it lets an entry go."""

    machine: "CacheMachine"

    def _lose(self, entry: Entry) -> None:
        self.machine.may_evict(entry.key)
        super()._lose(entry)


UNIT = 4096
ARENA = 24 * UNIT
SMALL_MAX = 6000
KEYS = [b"k%d" % number for number in range(9)] + [b"ns:" + b"%064x" % n for n in range(3)]
sizes = st.one_of(
    st.integers(0, 30),
    st.integers(400, 2000),
    st.integers(2000, 9000),
    st.sampled_from([0, SMALL_BYTES_MAX, SMALL_BYTES_MAX + 1, 3 * UNIT, ARENA // 2, ARENA]),
)
seconds = st.sampled_from([0.0, 0.1, 1.0, 7.0])
keys = st.sampled_from(KEYS)


class CacheMachine(RuleBasedStateMachine):
    """Values, links and holds in plain dicts. Whatever is still there must be right."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        slabs = SlabAllocator(ARENA, unit_bytes=UNIT)
        self.cache = WatchedCache(
            memoryview(bytearray(ARENA)), slabs, policy="lru", small_max=SMALL_MAX, clock=self.clock
        )
        self.cache.machine = self
        self.values: dict[bytes, bytes] = {}
        self.ends: dict[bytes, int] = {}  # the wall-clock millisecond when a TTL ends
        self.kept: dict[bytes, float] = {}  # promised or pinned until
        self.landings: list[tuple[bytes, Landing, bytes]] = []
        self.borrowed: list[tuple[Slot, bytes]] = []
        self.leases: list[tuple[Lease, list[bytes], list[bytes]]] = []  # its keys, their bytes
        self.writers: list[Lease] = []
        self.quarantine: list[tuple[float, Slot, bytes]] = []  # until, and what is written there
        self.number = 0

    # -- what the model knows -------------------------------------------------------------------

    def may_evict(self, key: bytes) -> None:
        entry = self.cache.entries[key]
        assert self.kept.get(key, 0.0) <= self.clock.now, f"{key!r} was promised or pinned"
        behind = [each for each in self.cache.entries.values() if each.parent_key == key]
        assert not behind, f"{key!r} has {behind[0].key!r} behind it"
        held = [slot for slot, _ in self.borrowed]
        held += [slot for lease, _, _ in self.leases for slot in lease.slots]
        assert entry.slot not in held, f"{key!r} is being read"
        self.forget(key)

    def forget(self, key: bytes) -> None:
        for known in (self.values, self.ends, self.kept):
            known.pop(key, None)

    def new_bytes(self, nbytes: int) -> bytes:
        self.number += 1
        return (b"<%d>" % self.number * (nbytes // 3 + 1))[:nbytes]

    def stored(self, key: bytes, data: bytes, ttl: float) -> None:
        self.values[key] = data
        self.ends.pop(key, None)
        if ttl:
            self.ends[key] = self.clock.wall_ms + int(ttl * 1000)

    def expire(self) -> None:
        for key in [key for key, end in self.ends.items() if end <= self.clock.wall_ms]:
            self.forget(key)

    def how(self, data: Any, key: bytes, ttl: float) -> Put:
        is_page = data.draw(st.booleans())
        parent = data.draw(st.sampled_from([None, b"", *KEYS])) if is_page else None
        return Put(
            "kvpage" if is_page else "string",
            expires_ms=self.clock.wall_ms + int(ttl * 1000) if ttl else 0,
            priority=data.draw(st.sampled_from([0, 0, 0, 1, -1])),
            parent=parent,
        )

    def all_or_nothing(self, nbytes: int, before: set[bytes]) -> None:
        """Nothing may change for a put that fails, unless the budget was lowered."""
        slabs = self.cache.slabs
        if slabs.used_bytes <= slabs.budget_bytes and nbytes > SMALL_BYTES_MAX:
            assert set(self.cache.entries) == before

    # -- rules ------------------------------------------------------------------------------------

    @rule(key=keys, nbytes=sizes, ttl=seconds, data=st.data())
    def put(self, key: bytes, nbytes: int, ttl: float, data: Any) -> None:
        content = self.new_bytes(nbytes)
        how = self.how(data, key, ttl)
        if how.kind == "kvpage":
            content = content or b"x"
        before = set(self.cache.entries)
        try:
            self.cache.put(key, content, how)
        except OutOfMemory:
            self.all_or_nothing(max(nbytes, SMALL_BYTES_MAX * (how.kind == "string")), before)
        else:
            self.stored(key, content, ttl)

    @rule(key=keys, nbytes=sizes)
    def reserve(self, key: bytes, nbytes: int) -> None:
        before = set(self.cache.entries)
        try:
            landing = self.cache.reserve(nbytes)
        except OutOfMemory:
            self.all_or_nothing(nbytes, before)
        else:
            self.landings.append((key, landing, self.new_bytes(nbytes)))

    @precondition(lambda self: self.landings)
    @rule(data=st.data(), ttl=seconds)
    def land(self, data: Any, ttl: float) -> None:
        position = data.draw(st.integers(0, len(self.landings) - 1))
        key, landing, content = self.landings[position]
        stop = data.draw(st.integers(landing.filled, landing.nbytes))
        if stop > landing.filled:
            landing.write(content[landing.filled : stop])
        if landing.is_full:
            del self.landings[position]
            how = self.how(data, key, ttl)
            self.cache.commit(key, landing, how)
            self.stored(key, content, ttl)
        elif data.draw(st.booleans()):
            del self.landings[position]
            self.cache.abandon(landing)

    @rule(key=keys)
    def read(self, key: bytes) -> None:
        entry = self.cache.use(key)
        assert (entry is None) == (key not in self.values)
        if entry is not None:
            assert self.cache.copy(entry) == self.values[key]

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        entry = self.cache.find(key)
        if entry is not None:
            self.cache.delete(entry)
            self.forget(key)

    @rule(key=keys, ttl=seconds)
    def expire_at(self, key: bytes, ttl: float) -> None:
        entry = self.cache.find(key)
        if entry is not None:
            self.cache.expire_at(entry, self.clock.wall_ms + int(ttl * 1000) if ttl else 0)
            self.ends.pop(key, None)
            if ttl:
                self.ends[key] = self.clock.wall_ms + int(ttl * 1000)

    @rule(key=keys, span=seconds, is_pin=st.booleans())
    def keep(self, key: bytes, span: float, is_pin: bool) -> None:
        entry = self.cache.find(key)
        if entry is not None:
            until = self.clock.now + span
            if is_pin:
                entry.pinned_until = until
            else:
                self.cache.promise(entry, until)
            self.kept[key] = max(entry.pinned_until, entry.held_until)

    @rule(key=keys)
    def borrow(self, key: bytes) -> None:
        entry = self.cache.find(key)
        if entry is not None and entry.slot is not None:
            self.cache.borrow(entry.slot)
            self.borrowed.append((entry.slot, self.values[key]))

    @precondition(lambda self: self.borrowed)
    @rule(data=st.data())
    def restore(self, data: Any) -> None:
        position = data.draw(st.integers(0, len(self.borrowed) - 1))
        self.cache.restore(self.borrowed.pop(position)[0])

    @rule(wanted=st.lists(keys, max_size=4), owner=st.integers(1, 2), span=seconds)
    def lease(self, wanted: list[bytes], owner: int, span: float) -> None:
        found = [entry for key in wanted if (entry := self.cache.find(key)) is not None]
        entries = [entry for entry in found if entry.slot is not None]
        lease = self.cache.lease(owner, entries, self.clock.now + span)
        names = [entry.key for entry in entries]
        self.leases.append((lease, names, [self.values[name] for name in names]))

    @rule(key=keys, nbytes=sizes, owner=st.integers(1, 2), span=seconds)
    def lease_room(self, key: bytes, nbytes: int, owner: int, span: float) -> None:
        before = set(self.cache.entries)
        try:
            deadline = self.clock.now + span
            lease = self.cache.lease_room(owner, key, nbytes, deadline)
        except OutOfMemory:
            self.all_or_nothing(nbytes, before)
        else:
            self.writers.append(lease)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), is_aborted=st.booleans())
    def commit(self, data: Any, is_aborted: bool) -> None:
        lease = self.writers.pop(data.draw(st.integers(0, len(self.writers) - 1)))
        if lease.is_overdue:
            with pytest.raises(LeaseGone):
                self.cache.leases.get(lease.owner, lease.number)
            assert not self.cache.leases.end(lease.owner, lease.number)
        elif is_aborted:
            assert self.cache.leases.end(lease.owner, lease.number)
        else:
            slot = self.cache.leases.take_over(lease)
            content = self.new_bytes(slot.payload_bytes)
            self.cache.payload(slot)[:] = content
            landing = self.cache.adopt(slot)
            self.cache.seal(lease.key, landing, hash64(content), PAGE)
            self.stored(lease.key, content, 0)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        lease, _, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        assert self.cache.leases.end(lease.owner, lease.number)
        assert not self.cache.leases.end(lease.owner, lease.number)

    @rule(owner=st.integers(1, 2))
    def drop_owner(self, owner: int) -> None:
        self.cache.drop_owner(owner)
        self.leases = [each for each in self.leases if each[0].owner != owner]
        for lease in [each for each in self.writers if each.owner == owner]:
            self.writers.remove(lease)
            if lease.is_overdue:
                # It may write there until the end of the quarantine, and nobody may notice.
                slot = lease.slots[0]
                self.cache.payload(slot)[:] = b"!" * slot.payload_bytes
                until = self.clock.now + self.cache.leases.quarantine_s
                self.quarantine.append((until, slot, b"!" * slot.payload_bytes))

    @rule(span=st.sampled_from([0.05, 1.0, 8.0, 61.0]))
    def advance(self, span: float) -> None:
        self.clock.advance(span)
        self.expire()
        now = self.clock.now
        due = [lease for lease in self.writers if lease.deadline <= now and not lease.is_overdue]
        assert sorted(self.cache.lapse()) == sorted(lease.owner for lease in due)
        assert all(lease.is_overdue for lease in due)
        self.leases = [each for each in self.leases if each[0].deadline > now]
        self.quarantine = [each for each in self.quarantine if each[0] > now]

    @rule(count=st.integers(1, 3))
    def expire_due(self, count: int) -> None:
        before = len(self.cache.entries)
        assert self.cache.expire_due(count) == before - len(self.cache.entries)

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        for key in list(self.values):
            self.forget(key)

    @rule(name=st.sampled_from(POLICIES))
    def use_policy(self, name: str) -> None:
        self.cache.room.use_policy(name, iter(self.cache.entries.values()))

    @rule(share=st.sampled_from([0.3, 0.7, 1.0, 1.0]))
    def change_budget(self, share: float) -> None:
        slabs, room = self.cache.slabs, self.cache.room
        slabs.budget_bytes = int(share * slabs.capacity_bytes)
        room.small_max = int(share * SMALL_MAX)
        room.shrink()
        evictable = [
            entry
            for entry in self.cache.entries.values()
            if not entry.children and not room.is_held(entry)
        ]
        if any(entry.slot for entry in evictable):
            assert slabs.used_bytes <= slabs.budget_bytes
        if any(not entry.slot for entry in evictable):
            assert room.small_bytes <= room.small_max

    @invariant()
    def agrees(self) -> None:
        cache = self.cache
        cache.check()
        present = {key: entry for key in KEYS if (entry := cache.find(key)) is not None}
        assert present.keys() == self.values.keys()
        for key, entry in present.items():
            assert cache.copy(entry) == self.values[key]
            if entry.slot is not None:
                header = read_header(cache.arena[entry.slot.offset :])
                assert header.checksum == hash64(self.values[key])
        for slot, content in self.borrowed:
            assert cache.payload(slot) == content
        for lease, _, contents in self.leases:
            assert [bytes(cache.payload(slot)) for slot in lease.slots] == contents
        for _, slot, content in self.quarantine:
            assert cache.payload(slot) == content
        assert cache.leases.quarantined == len(self.quarantine)
        assert cache.in_flight() == (len(self.landings), len({slot for slot, _ in self.borrowed}))

    def teardown(self) -> None:
        """Nothing is in use once everybody has let go."""
        for _, landing, _ in self.landings:
            self.cache.abandon(landing)
        for slot, _ in self.borrowed:
            self.cache.restore(slot)
        for owner in (1, 2):
            self.cache.drop_owner(owner)
        self.clock.advance(self.cache.leases.quarantine_s)
        self.cache.lapse()
        self.cache.flush()
        self.cache.check()
        assert (self.cache.slabs.used_bytes, self.cache.room.small_bytes) == (0, 0)


def test_the_cache_agrees_with_a_dict_that_may_forget() -> None:
    run_state_machine_as_test(
        CacheMachine, settings=settings(max_examples=150, stateful_step_count=50, deadline=None)
    )


def test_a_write_lease_is_for_one_slot() -> None:
    cache, clock = make_cache()
    lease = cache.lease_room(1, b"k", 100, clock.now + 1)
    assert (lease.mode, len(lease.slots), lease.key) == (Mode.WRITE, 1, b"k")
