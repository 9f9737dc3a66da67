"""Quotas: known cases, and a machine that holds the accounts against sums over what is there."""

from contextlib import suppress
from typing import Any

import anyio
import hypothesis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from respkv.engine.accounts import DOUBT_S
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.history import Reason
from respkv.engine.mover import Mover
from respkv.engine.spaces import OTHERS_MAX, Limits
from respkv.engine.watch import Watcher
from respkv.errors import OutOfMemory, QuotaExceeded
from respkv.page import namespace_of
from respkv.tiers.record import Level
from tests.engine.fake_tier import FakeTier
from tests.engine.files import make_cold, opened
from tests.fakes import ManualClock, make_cache

KIB = 1024


def page(
    tenant: bytes = b"", *, parent: bytes | None = None, priority: int = 0, pin: float = 0.0
) -> Put:
    return Put("kvpage", priority=priority, parent=parent, tenant=tenant, pinned_until=pin)


def keys_of(cache: Cache) -> set[bytes]:
    return set(cache.entries)


def limit(cache: Cache, max_bytes: int = 0, tenant_bytes: int = 0, **tenants: int) -> None:
    own = {name.encode(): nbytes for name, nbytes in tenants.items()}
    cache.accounts.set_limits(b"ns", Limits(max_bytes, tenant_bytes, own))


def test_a_page_counts_once_for_its_namespace_and_for_who_put_it() -> None:
    cache, _ = make_cache()
    cache.put(b"ns:a", b"x" * 1000, page(b"t"))
    cache.put(b"ns:b", b"x" * 500, page())
    cache.put(b"other:a", b"x" * 300, page(b"t"))
    cache.put(b"ns:s", b"a string counts for nobody")
    account = cache.accounts.find(b"ns", b"t")
    assert account is not None
    assert (account.nbytes, account.num_pages) == (1000, 1)
    assert cache.accounts.spaces[b"ns"].nbytes == 1500
    cache.put(b"ns:a", b"y" * 700, page(b"u"))
    assert cache.accounts.find(b"ns", b"t") is None
    assert cache.accounts.spaces[b"ns"].nbytes == 1200
    cache.put(b"ns:a", b"a string now")
    assert cache.accounts.spaces[b"ns"].nbytes == 500
    cache.delete(cache.entries[b"ns:b"])
    assert b"ns" not in cache.accounts.spaces
    cache.flush()
    assert not cache.accounts.spaces
    cache.check()


def test_a_put_over_a_quota_evicts_what_was_used_longest_ago() -> None:
    cache, clock = make_cache()
    limit(cache, 3000)
    for name in b"abc":
        clock.advance(1)
        cache.put(b"ns:%c" % name, b"x" * 1000, page())
    clock.advance(1)
    cache.use(b"ns:a")
    cache.put(b"ns:d", b"x" * 1000, page())
    assert keys_of(cache) == {b"ns:a", b"ns:c", b"ns:d"}
    assert cache.history.find(b"ns:b") == "quota"
    assert (cache.accounts.num_evicted, cache.accounts.evicted_bytes) == (1, 1000)
    cache.check()


def test_leaves_go_before_the_pages_that_they_stand_behind() -> None:
    cache, clock = make_cache()
    limit(cache, 3000)
    parent: bytes | None = None
    for name in b"abc":
        cache.put(b"ns:%c" % name, b"x" * 1000, page(parent=parent))
        parent = b"ns:%c" % name
        clock.advance(1)
    cache.put(b"ns:x", b"x" * 1500, page())
    assert keys_of(cache) == {b"ns:a", b"ns:x"}
    cache.check()


def test_a_low_priority_goes_before_an_old_use() -> None:
    cache, clock = make_cache()
    limit(cache, 3000)
    cache.put(b"ns:old", b"x" * 1000, page())
    clock.advance(1)
    cache.put(b"ns:low", b"x" * 1000, page(priority=-1))
    cache.put(b"ns:high", b"x" * 1000, page(priority=1))
    cache.put(b"ns:b", b"x" * 1000, page())
    assert keys_of(cache) == {b"ns:old", b"ns:high", b"ns:b"}
    cache.describe(cache.entries[b"ns:high"], page(priority=-2))
    cache.put(b"ns:c", b"x" * 1000, page())
    assert keys_of(cache) == {b"ns:old", b"ns:b", b"ns:c"}


def test_a_tenant_over_its_quota_loses_its_own_pages_and_no_one_elses() -> None:
    cache, clock = make_cache()
    limit(cache, 0, 2000)
    cache.put(b"ns:theirs", b"x" * 1000, page(b"other"))
    cache.put(b"ns:nobodys", b"x" * 5000, page())
    for name in b"abc":
        clock.advance(1)
        cache.put(b"ns:%c" % name, b"x" * 1000, page(b"t"))
    assert keys_of(cache) == {b"ns:theirs", b"ns:nobodys", b"ns:b", b"ns:c"}


def test_a_full_namespace_takes_from_who_puts_and_only_then_from_others() -> None:
    cache, clock = make_cache()
    limit(cache, 3000)
    cache.put(b"ns:theirs", b"x" * 1000, page(b"other"))
    clock.advance(1)
    cache.put(b"ns:a", b"x" * 1000, page(b"t"))
    cache.put(b"ns:b", b"x" * 1000, page(b"t"))
    cache.put(b"ns:c", b"x" * 1000, page(b"t"))
    assert b"ns:theirs" in cache.entries
    for name in (b"ns:b", b"ns:c"):
        if name in cache.entries:
            cache.pin(cache.entries[name], clock.now + 10)
    for name in (b"ns:a",):
        if name in cache.entries:
            cache.pin(cache.entries[name], clock.now + 10)
    cache.put(b"ns:d", b"x" * 1000, page(b"t"))
    assert b"ns:theirs" not in cache.entries


def test_a_page_larger_than_its_quota_is_refused_and_nothing_goes() -> None:
    cache, _ = make_cache()
    limit(cache, 3000, 2000)
    cache.put(b"ns:a", b"x" * 2000, page(b"t"))
    with pytest.raises(QuotaExceeded, match=r"tenant 't' .* may keep 2000 bytes.* 2500 never fits"):
        cache.put(b"ns:b", b"x" * 2500, page(b"t"))
    with pytest.raises(QuotaExceeded, match=r"namespace 'ns' may keep 3000 .*KV.QUOTA"):
        cache.put(b"ns:b", b"x" * 3500, page())
    assert keys_of(cache) == {b"ns:a"}
    assert cache.accounts.num_refused == 2
    cache.check()


def test_when_nothing_may_go_the_put_is_refused_until_something_may() -> None:
    cache, clock = make_cache()
    limit(cache, 3000)
    a = cache.put(b"ns:a", b"x" * 1500, page(pin=clock.now + 5))
    b = cache.put(b"ns:b", b"x" * 1000, page())
    cache.promise(b, clock.now + 3)
    with pytest.raises(QuotaExceeded, match="has 2500, 1000 more do not fit"):
        cache.put(b"ns:c", b"x" * 1000, page())
    assert a.slot is not None
    cache.borrow(a.slot)
    clock.advance(4)
    with pytest.raises(QuotaExceeded):
        cache.put(b"ns:c", b"x" * 2800, page())
    assert keys_of(cache) == {b"ns:a", b"ns:b"}
    clock.advance(2)
    cache.put(b"ns:c", b"x" * 1000, page())  # b, whose promise is over
    with pytest.raises(QuotaExceeded):
        cache.put(b"ns:d", b"x" * 2000, page())
    cache.restore(a.slot)
    cache.put(b"ns:d", b"x" * 2000, page())
    assert keys_of(cache) == {b"ns:c", b"ns:d"} or keys_of(cache) == {b"ns:d"}
    cache.check()


def test_a_page_behind_which_the_new_one_stands_stays() -> None:
    cache, clock = make_cache()
    limit(cache, 2000)
    cache.put(b"ns:a", b"x" * 1000, page())
    clock.advance(1)
    cache.put(b"ns:x", b"x" * 1000, page())
    clock.advance(1)
    cache.put(b"ns:b", b"x" * 1000, page(parent=b"ns:a"))
    assert keys_of(cache) == {b"ns:a", b"ns:b"}
    with pytest.raises(QuotaExceeded):
        cache.put(b"ns:c", b"x" * 1000, page(parent=b"ns:b"))


def test_a_page_is_not_given_up_for_its_tenant_while_others_stand_behind_it() -> None:
    cache, _ = make_cache()
    limit(cache, 0, 1000)
    cache.put(b"ns:a", b"x" * 1000, page(b"t"))
    cache.put(b"ns:b", b"x" * 1000, page(b"u", parent=b"ns:a"))
    with pytest.raises(QuotaExceeded, match="tenant 't'"):
        cache.put(b"ns:c", b"x" * 1000, page(b"t"))
    cache.put(b"ns:d", b"x" * 1000, page(b"u"))  # in place of b
    cache.put(b"ns:c", b"x" * 1000, page(b"t"))  # in place of a, which is a leaf now
    assert keys_of(cache) == {b"ns:c", b"ns:d"}
    cache.check()


def test_a_page_goes_with_its_parts_and_never_without_the_bound_ones() -> None:
    cache, clock = make_cache()
    limit(cache, 4000)
    old, new = b"ns:" + b"a" * 64, b"ns:" + b"b" * 64
    cache.put(old, b"x" * 1000, page())
    clock.advance(1)
    bound = cache.put(old + b".g.local", b"x" * 1000, page(parent=old))
    cache.put(old + b".logits", b"x" * 500, page(parent=old))
    cache.put(new, b"x" * 1000, page())
    assert cache.accounts.spaces[b"ns"].nbytes == 3500
    bound.touched = 0.0  # it goes when its page goes, however long it was not used
    cache.pin(cache.entries[old + b".logits"], clock.now + 5)
    cache.put(b"ns:c", b"x" * 1500, page())  # new goes: a pinned part holds its page
    assert keys_of(cache) == {old, old + b".g.local", old + b".logits", b"ns:c"}
    clock.advance(6)
    cache.put(b"ns:d", b"x" * 100, page())
    assert keys_of(cache) <= {old, old + b".g.local", b"ns:c", b"ns:d"}
    cache.put(b"ns:e", b"x" * 2000, page())
    assert keys_of(cache) == {b"ns:c", b"ns:d", b"ns:e"}
    cache.check()


def test_a_bound_part_without_its_page_goes_for_a_quota_like_any_page() -> None:
    cache, clock = make_cache()
    limit(cache, 3000)
    first, last = b"ns:" + b"a" * 64, b"ns:" + b"b" * 64
    for key in (first, last):
        cache.put(key + b".g.local", b"x" * 1000, page(parent=key))
        clock.advance(1)
    cache.put(first, b"x" * 1000, page())  # from now on the first goes with its page
    clock.advance(1)
    cache.put(b"ns:c", b"x" * 1000, page())
    assert keys_of(cache) == {first, first + b".g.local", b"ns:c"}
    cache.put(b"ns:d", b"x" * 1000, page())
    assert keys_of(cache) == {b"ns:c", b"ns:d"}
    cache.check()


def test_a_page_is_a_leaf_again_when_the_string_in_place_of_its_child_has_gone() -> None:
    cache, clock = make_cache()
    limit(cache, 2000)
    cache.put(b"ns:root", b"x" * 1000, page())
    cache.put(b"ns:leaf", b"x" * 500, page(parent=b"ns:root"))
    clock.advance(1)
    cache.put(b"ns:leaf", b"a string now")
    assert cache.entries[b"ns:root"].children is None
    cache.put(b"ns:b", b"x" * 2000, page())
    assert keys_of(cache) == {b"ns:leaf", b"ns:b"}
    cache.check()


def test_a_string_in_place_of_a_part_stands_alone() -> None:
    cache, _ = make_cache()
    key = b"ns:" + b"a" * 64
    cache.put(key, b"x" * 1000, page())
    cache.put(key + b".logits", b"x" * 1000, page(parent=key))
    cache.put(key + b".logits", b"a string now")
    cache.delete(cache.entries[key])
    assert keys_of(cache) == {key + b".logits"}
    cache.check()


def test_where_tenants_are_many_some_are_looked_at_and_all_if_need_be() -> None:
    cache, clock = make_cache()
    number = 4 * OTHERS_MAX
    limit(cache, 100 * number)
    for each in range(number):
        cache.put(b"ns:%d" % each, b"x" * 100, page(b"t%d" % each))
        clock.advance(1)
    looks: set[Entry] = set()

    def note(entry: Entry) -> bool:
        looks.add(entry)
        return False

    cache.accounts.is_held = note
    cache.put(b"ns:a", b"x" * 100, page(b"new"))
    assert b"ns:0" not in cache.entries, "the coldest of those who are looked at goes"
    assert len(looks) == OTHERS_MAX
    cache.put(b"ns:b", b"x" * 100, page(b"newer"))
    assert len(looks) == 2 * OTHERS_MAX, "then it is the turn of others"
    cache.put(b"ns:c", b"x" * 100 * number, page(b"newest"))
    assert keys_of(cache) == {b"ns:c"}
    cache.check()


def test_a_lower_quota_holds_at_once_or_is_refused() -> None:
    cache, clock = make_cache()
    for name in b"abc":
        cache.put(b"ns:%c" % name, b"x" * 1000, page(b"t"))
        clock.advance(1)
    limit(cache, 2000)
    assert keys_of(cache) == {b"ns:b", b"ns:c"}
    cache.pin(cache.entries[b"ns:b"], clock.now + 9)
    with pytest.raises(QuotaExceeded, match="may keep 500 bytes and has 2000"):
        limit(cache, 0, 500)
    assert keys_of(cache) == {b"ns:b", b"ns:c"}
    assert cache.accounts.limits_of(b"ns").max_bytes == 2000
    limit(cache, 0, 500, t=0)
    assert keys_of(cache) == {b"ns:b", b"ns:c"}
    limit(cache)
    cache.put(b"ns:d", b"x" * 9000, page(b"t"))
    assert len(cache.entries) == 3
    cache.check()


def test_limits_are_saved_and_come_back() -> None:
    cache, _ = make_cache()
    limit(cache, 9000, 500, t=700, u=0)
    rows = cache.accounts.saved()
    assert rows == [(b"ns", None, 9000, 500), (b"ns", b"t", 700, 0), (b"ns", b"u", 0, 0)]
    other, _ = make_cache()
    other.put(b"ns:a", b"x" * 600, page(b"t"))
    other.put(b"ns:b", b"x" * 600, page(b"v"))
    other.accounts.restore(rows)
    assert keys_of(other) == {b"ns:a"}
    assert other.accounts.saved() == rows


@pytest.mark.anyio
async def test_what_files_hold_counts_and_counts_again_after_a_restart() -> None:
    cache, clock = make_cache()
    limit(cache, 4000)
    tier = FakeTier()
    async with opened(cache, tier) as mover:
        for name in b"abc":
            cache.put(b"ns:%c" % name, b"x" * 1000, page())
            clock.advance(1)
        await make_cold(cache, mover)
        assert cache.accounts.spaces[b"ns"].nbytes == 3000
        cache.put(b"ns:d", b"x" * 2000, page())
        assert keys_of(cache) == {b"ns:b", b"ns:c", b"ns:d"}
    again, _ = make_cache()
    limit(again, 2000)
    async with opened(again, tier):
        assert again.accounts.spaces[b"ns"].nbytes <= 2000
        again.check()


acts = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "cold", "delete", "limit", "wait", "restart"]),
        st.integers(0, 11),
        st.sampled_from([b"", b"t", b"u"]),
        st.integers(1, 6).map(lambda n: n * KIB),
    ),
    max_size=25,
)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(acts)
def test_sums_and_quotas_hold_in_files_and_through_restarts(acts: list[Any]) -> None:
    """Pages that are written, demoted, evicted and found again, each for the tenant who put it."""
    tier = FakeTier()
    limits = Limits()
    owners: dict[bytes, set[bytes]] = {}

    async def live(acts: list[Any]) -> list[Any]:
        """Act until the next restart; return what is left to do."""
        cache, clock = make_cache()
        cache.accounts.restore([(b"ns", None, limits.max_bytes, limits.tenant_bytes)])
        async with opened(cache, tier) as mover:
            check(cache)
            while acts:
                (what, number, tenant, nbytes), *acts = acts
                if what == "restart":
                    break
                await act(cache, mover, what, number, tenant, nbytes)
                clock.advance(1)
                check(cache)
        return acts

    async def act(
        cache: Cache, mover: Mover, what: str, number: int, tenant: bytes, nbytes: int
    ) -> None:
        key = b"ns:" + b"%064x" % number
        entry = cache.find(key)
        if what == "put" and cache.has_page(key, nbytes) is None:
            level = Level.DURABLE if number % 2 else None
            parent = b"ns:" + b"%064x" % (number // 2) if number > 1 else None
            owners.setdefault(key, set()).add(tenant)
            with suppress(QuotaExceeded):
                cache.put(
                    key, b"x" * nbytes, Put("kvpage", parent=parent, tenant=tenant, level=level)
                )
        elif what == "cold":
            await make_cold(cache, mover)
        elif what == "delete" and entry is not None:
            cache.delete(entry)
        elif what == "limit":
            with suppress(QuotaExceeded):
                cache.accounts.set_limits(b"ns", Limits(4 * nbytes, 3 * nbytes))
                limits.max_bytes, limits.tenant_bytes = 4 * nbytes, 3 * nbytes

    def check(cache: Cache) -> None:
        cache.check()
        space = cache.accounts.spaces.get(b"ns")
        used = 0 if space is None else space.nbytes
        for entry in cache.entries.values():
            assert entry.tenant in owners[entry.key]
        assert used == sum(entry.nbytes for entry in cache.entries.values())
        assert used <= (limits.max_bytes or used)
        for account in () if space is None else space.accounts.values():
            assert account.nbytes <= (account.max_bytes or account.nbytes)

    left = acts
    while left:
        left = anyio.run(live, left)


class _Seen(Watcher):
    """Which pages went for a quota during a call."""

    def __init__(self) -> None:
        self.gone: list[Entry] = []

    def removed(self, entry: Entry, reason: Reason) -> None:
        if reason == "quota":
            assert not entry.children, f"{entry.key!r} has pages behind it"
            self.gone.append(entry)


NAMESPACES, TENANTS = (b"n", b"m"), (b"", b"t", b"u")
KEYS = [b"%b:%c" % (namespace, name) for namespace in NAMESPACES for name in b"abcdefgh"]
keys = st.sampled_from(KEYS)
tenants = st.sampled_from(TENANTS)
sizes = st.integers(1, 8).map(lambda n: n * KIB)
quotas = st.sampled_from([0, 0, 4 * KIB, 9 * KIB, 16 * KIB, 30 * KIB])
spans = st.sampled_from([0.5, 2.0, 20.0])


class AccountMachine(RuleBasedStateMachine):
    """Sums over all entries are the model; what a quota evicts is judged when it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.clock = make_cache(unit_bytes=8 * KIB)
        self.seen = _Seen()
        self.cache.watchers.add(self.seen)
        self.borrowed: list[Any] = []

    def pages(self, namespace: bytes, tenant: bytes | None = None) -> list[Entry]:
        return [
            entry
            for entry in self.cache.entries.values()
            if entry.kind == "kvpage"
            and namespace_of(entry.key) == namespace
            and tenant in (None, entry.tenant)
        ]

    def used(self, namespace: bytes, tenant: bytes | None = None) -> int:
        return sum(entry.nbytes for entry in self.pages(namespace, tenant))

    def may_go(self, entry: Entry, but: Entry | None) -> bool:
        now = self.clock.now
        is_held = entry.slot is not None and entry.slot.holders > 1
        is_promised = max(entry.held_until, entry.pinned_until) > now
        return not (is_held or is_promised or entry.children or entry is but)

    @rule(key=keys, tenant=tenants, nbytes=sizes, data=st.data())
    def put(self, key: bytes, tenant: bytes, nbytes: int, data: Any) -> None:
        namespace = namespace_of(key)
        there = [None, *(each for each in KEYS if namespace_of(each) == namespace)]
        parent = data.draw(st.sampled_from(there))
        how = page(tenant, parent=parent, priority=data.draw(st.sampled_from([0, 0, 1, -1])))
        limits = self.cache.accounts.limits_of(namespace)
        over_own = self.used(namespace, tenant) + nbytes > (limits.of(tenant) or 1 << 40)
        over_all = self.used(namespace) + nbytes > (limits.max_bytes or 1 << 40)
        self.seen.gone.clear()
        before = dict(self.cache.entries)
        self.clock.advance(0.001)
        try:
            landing = self.cache.reserve(nbytes)
        except OutOfMemory:
            return
        left = dict(self.cache.entries)
        landing.write(b"x" * nbytes)
        try:
            self.cache.commit(key, landing, how)
        except QuotaExceeded:
            assert over_own or over_all or before.keys() != left.keys()
            assert self.cache.entries == left
            self.cache.abandon(landing)
            return
        gone = self.seen.gone
        assert not gone or over_own or over_all
        assert all(namespace_of(entry.key) == namespace for entry in gone)
        foreign = [entry for entry in gone if entry.tenant != tenant]
        if foreign:
            assert over_all
            parent_entry = self.cache.entries.get(parent or b"")
            own = self.pages(namespace, tenant)
            new = self.cache.entries[key]
            assert not [e for e in own if e is not new and self.may_go(e, parent_entry)]

    @rule(namespace=st.sampled_from(NAMESPACES), whole=quotas, each=quotas, own=quotas)
    def limit(self, namespace: bytes, whole: int, each: int, own: int) -> None:
        limits = Limits(whole, each, {b"u": own} if own else {})
        before = dict(self.cache.entries)
        try:
            self.cache.accounts.set_limits(namespace, limits)
        except QuotaExceeded:
            assert self.cache.entries == before

    @rule(key=keys)
    def use(self, key: bytes) -> None:
        self.clock.advance(0.01)
        self.cache.use(key)

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        entry = self.cache.find(key)
        if entry is not None:
            self.cache.delete(entry)

    @rule(key=keys)
    def become_a_string(self, key: bytes) -> None:
        self.cache.put(key, b"s")

    @rule(key=keys, span=spans)
    def expire(self, key: bytes, span: float) -> None:
        entry = self.cache.find(key)
        if entry is not None:
            self.cache.expire_at(entry, self.clock.wall_ms + int(span * 1000))

    @rule(key=keys, span=spans, is_pin=st.booleans())
    def keep(self, key: bytes, span: float, is_pin: bool) -> None:
        entry = self.cache.find(key)
        if entry is not None and is_pin:
            self.cache.pin(entry, self.clock.now + span)
        elif entry is not None:
            self.cache.promise(entry, self.clock.now + span)

    @rule(key=keys)
    def unpin(self, key: bytes) -> None:
        entry = self.cache.find(key)
        if entry is not None:
            self.cache.pin(entry, 0.0)

    @rule(key=keys)
    def borrow(self, key: bytes) -> None:
        entry = self.cache.find(key)
        if entry is not None and entry.slot is not None:
            self.cache.borrow(entry.slot)
            self.borrowed.append(entry.slot)

    @rule()
    def give_back(self) -> None:
        while self.borrowed:
            self.cache.restore(self.borrowed.pop())

    @rule(span=spans)
    def wait(self, span: float) -> None:
        self.clock.advance(span)
        self.cache.expire_due(100)

    @rule()
    def flush(self) -> None:
        self.cache.flush()

    @invariant()
    def sums_are_right_and_no_quota_is_exceeded(self) -> None:
        self.cache.check()
        accounts = self.cache.accounts
        for namespace in NAMESPACES:
            limits = accounts.limits_of(namespace)
            used = self.used(namespace)
            assert used == (
                accounts.spaces[namespace].nbytes if namespace in accounts.spaces else 0
            )
            assert used <= (limits.max_bytes or used)
            for tenant in TENANTS:
                own = self.used(namespace, tenant)
                found = accounts.find(namespace, tenant)
                assert own == (0 if found is None else found.nbytes)
                assert own <= (limits.of(tenant) or own)
        entries = self.cache.entries.values()
        pinned = [each.nbytes for each in entries if each.pinned_until > self.clock.now]
        assert (self.cache.pins.nbytes, len(self.cache.pins)) == (sum(pinned), len(pinned))

    def teardown(self) -> None:
        self.give_back()


def test_accounts_agree_with_what_is_there_through_everything() -> None:
    run_state_machine_as_test(
        AccountMachine, settings=settings(max_examples=60, stateful_step_count=60, deadline=None)
    )


def test_a_manual_clock_is_what_pins_follow() -> None:
    cache, clock = make_cache()
    assert isinstance(clock, ManualClock)
    entry = cache.put(b"ns:a", b"x" * 1000, page(pin=clock.now + 5))
    assert (cache.pins.nbytes, cache.pins.nbytes_but(entry)) == (1000, 0)
    clock.advance(6)
    assert (cache.pins.nbytes, len(cache.pins)) == (0, 0)


def test_a_refused_put_takes_no_room_in_memory_from_others() -> None:
    cache, clock = make_cache(256 * KIB)
    limit(cache, t=100 * KIB)
    cache.put(b"ns:pinned", b"x" * 50 * KIB, page(b"t", pin=clock.now + 60))
    number = 0
    while (slot := cache.slabs.take(50 * KIB)) is not None:
        cache.slabs.give_back(slot)
        cache.put(b"other:%d" % number, b"x" * 50 * KIB, page())
        number += 1
    before = keys_of(cache)
    for nbytes in (60 * KIB, 120 * KIB):  # too much beside what is pinned; too much at all
        with pytest.raises(QuotaExceeded):
            cache.put(b"ns:more", b"x" * nbytes, page(b"t"))
    assert keys_of(cache) == before
    cache.put(b"ns:more", b"x" * 50 * KIB, page(b"t"))
    assert len(before - keys_of(cache)) == 1
    cache.check()


def test_what_may_be_refused_is_in_doubt_before_its_owner_is_known() -> None:
    cache, clock = make_cache()
    accounts = cache.accounts
    assert not accounts.is_in_doubt(b"ns", 1 << 40)
    limit(cache, 6000, t=2000, u=2000)
    assert accounts.is_in_doubt(b"ns", 7000)  # more than anybody may keep
    cache.put(b"ns:a", b"x" * 2000, page(b"t"))
    cache.put(b"ns:b", b"x" * 2000, page(b"u"))
    cache.put(b"ns:c", b"x" * 1500, page())
    assert not accounts.is_in_doubt(b"ns", 1000)  # each could make room
    cache.promise(cache.entries[b"ns:b"], clock.now + 5)
    assert accounts.is_in_doubt(b"ns", 1000)  # it may be u's
    clock.advance(6)
    assert not accounts.is_in_doubt(b"ns", 1000)
    with pytest.raises(QuotaExceeded):
        cache.put(b"ns:d", b"x" * 2001, page(b"t"))
    assert accounts.is_in_doubt(b"ns", 10)  # others may be refused as well
    clock.advance(DOUBT_S)
    assert not accounts.is_in_doubt(b"ns", 10)
    assert keys_of(cache) == {b"ns:a", b"ns:b", b"ns:c"}
    cache.check()


def test_of_many_tenants_none_is_asked_whether_a_put_fits() -> None:
    cache, clock = make_cache()
    limit(cache, 0, 100)
    for number in range(OTHERS_MAX + 1):
        cache.put(b"ns:%d" % number, b"x" * 100, page(b"%d" % number, pin=clock.now + 60))
    assert not cache.accounts.is_in_doubt(b"ns", 100)
    cache.delete(cache.entries[b"ns:0"])
    assert cache.accounts.is_in_doubt(b"ns", 100)
