"""Whose bytes are here: what each namespace and each of its tenants keeps, and how much each may.

A page counts once with the bytes of its payload, wherever it is, in memory or in files, for the
tenant who put it first. It counts from the turn in which it becomes visible, so what is still
arriving does not; room in a quota is made in the turn in which a page is published, before it is,
and a published page never goes over one.

Who is over a quota pays: first the tenant's own pages go, the coldest leaves in front, then others
of the namespace when that is what is full. Victims are chosen before any of them goes, so a put that
has to be refused costs nobody anything. A namespace without a quota pays two additions a page.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from respkv.engine.clock import Clock
from respkv.engine.coldest import Coldest, goes_along
from respkv.engine.entry import Entry
from respkv.engine.history import Reason
from respkv.engine.spaces import OTHERS_MAX, Account, Limits, Plan, Space
from respkv.engine.watch import Watcher
from respkv.errors import QuotaExceeded
from respkv.page import namespace_of

logger = logging.getLogger(__name__)

DOUBT_S = 60.0  # for which what a namespace is sent is asked for its owner before it gets room
DOUBTS_MAX = 4  # full accounts that are asked whether they could make room; each takes 10 us

Saved = tuple[bytes, bytes | None, int, int]  # namespace, tenant, its limit, the tenants' default


class Accounts(Watcher):
    """The spaces of a cache by name.

    is_held: whether a page may not go, though nobody pinned it.
    lose:    removes a page and its key, with all copies.
    """

    def __init__(self, clock: Clock, entries: Mapping[bytes, Entry]) -> None:
        self.entries = entries
        self.spaces: dict[bytes, Space] = {}
        self.num_evicted = 0
        self.evicted_bytes = 0
        self.num_refused = 0
        self.is_held: Callable[[Entry], bool] = lambda entry: False
        self.lose: Callable[[Entry], None] = lambda entry: None
        self._clock = clock
        self._num_limited = 0

    def find(self, namespace: bytes, tenant: bytes = b"") -> Account | None:
        """Return the account of a tenant that has pages, or None."""
        space = self.spaces.get(namespace)
        return None if space is None else space.accounts.get(tenant)

    def reset_counters(self) -> None:
        """Count evictions and refusals from zero."""
        self.num_evicted = self.evicted_bytes = self.num_refused = 0
        for space in self.spaces.values():
            space.num_evicted = space.num_refused = 0

    def limits_of(self, namespace: bytes) -> Limits:
        """Return the limits of a namespace; not to be changed."""
        space = self.spaces.get(namespace)
        return _NO_LIMITS if space is None else space.limits

    # -- told by the cache --------------------------------------------------------------------

    def stored(self, entry: Entry, *, is_new: bool) -> None:
        """Count a page for its tenant."""
        if entry.account is None:
            self._count(entry)

    def restored(self, entry: Entry) -> None:
        """Count a page that a file had."""
        if entry.account is None:
            self._count(entry)

    def removed(self, entry: Entry, reason: Reason) -> None:
        """Count a page no more."""
        self.uncount(entry)

    def cleared(self) -> None:
        """Count nothing; limits stay."""
        for space in list(self.spaces.values()):
            space.accounts.clear()
            space.nbytes = space.num_pages = 0
            self._drop_if_idle(space)

    def uncount(self, entry: Entry) -> None:
        """Take the bytes of a page, as they were counted, from its account."""
        account, entry.account = entry.account, None
        if account is None:
            return
        account.nbytes -= entry.nbytes
        account.num_pages -= 1
        account.space.nbytes -= entry.nbytes
        account.space.num_pages -= 1
        assert account.nbytes >= 0
        if account.coldest is not None:
            account.coldest.remove(entry)
        if entry.parent is not None and entry.parent.account is not None:
            coldest = entry.parent.account.coldest
            if coldest is not None:
                coldest.unpark(entry.parent)
        if not account.num_pages:
            account.space.accounts.pop(account.tenant, None)
            self._drop_if_idle(account.space)

    def requeue(self, entry: Entry) -> None:
        """Look anew at when a page goes: its pin, priority, children or session changed."""
        account: Account | None = entry.account
        if account is not None and account.coldest is not None and not goes_along(entry):
            account.coldest.add(entry)

    # -- quotas -------------------------------------------------------------------------------

    def make_room(
        self,
        namespace: bytes,
        tenant: bytes,
        nbytes: int,
        keep: Collection[Entry] = (),
        *,
        is_trial: bool = False,
    ) -> None:
        """Let ``nbytes`` more of a tenant fit under its quotas, evicting for them.

        keep:   pages that must not go for it, as the one that the new page stands behind.
        is_trial: nobody goes yet; it is only refused if it would be.
        Raises QuotaExceeded when they cannot fit; nothing has gone then.
        """
        if not self._num_limited:
            return
        space = self.spaces.get(namespace)
        if space is None:
            return
        own_over, whole_over = space.over(tenant, nbytes)
        if own_over > 0 or whole_over > 0:
            plan, turn = self._new_plan(keep), space.turn
            error = self._plan_put(plan, space, tenant, nbytes)
            if is_trial and not error:
                plan.end(is_final=False)
                space.turn = turn
            else:
                self._carry_out(plan, space, error)

    def check_put(
        self,
        key: bytes,
        tenant: bytes,
        nbytes: int,
        parent: Entry | None,
        *,
        is_trial: bool = False,
    ) -> None:
        """Let a page fit that is about to be published, beside the one it is put behind.

        The value that the key has now stays until the new one takes its place.
        is_trial: nobody goes yet; it is only refused if it would be.
        """
        keep = () if parent is None else (parent,)
        self.make_room(namespace_of(key), tenant, nbytes, keep, is_trial=is_trial)

    def is_in_doubt(self, namespace: bytes, nbytes: int) -> bool:
        """Whether a put of so many bytes may be refused, of whose owner nothing is known yet.

        It may where one was refused of late, and where the namespace is full, or one of its tenants,
        and too much of that may not go. Of many tenants none is asked. Nothing changes.
        """
        space = self.spaces.get(namespace) if self._num_limited else None
        if space is None or not space.limits.is_any:
            return False
        most, tenants_most = space.limits.max_bytes, space.limits.tenant_bytes
        if self._clock.now < space.refused_until or 0 < most < nbytes or 0 < tenants_most < nbytes:
            return True
        if len(space.accounts) > OTHERS_MAX:
            return False
        every = list(space.accounts.values())
        asked = [
            ([each], each.nbytes + nbytes - each.max_bytes) for each in every if each.max_bytes
        ]
        asked = [(accounts, over) for accounts, over in asked if over > 0]
        del asked[DOUBTS_MAX:]
        if most:
            asked.append((every, space.nbytes + nbytes - most))
        return any(self._can_not_free(accounts, over) for accounts, over in asked)

    def set_limits(self, namespace: bytes, limits: Limits, *, is_forced: bool = False) -> None:
        """Put the limits of a namespace in force, evicting what is over them.

        is_forced: at start: what may not go stays, and nothing more is added.
        Raises QuotaExceeded when too much of it may not go; the limits are as before then, and
        nothing has gone.
        """
        space = self.spaces.get(namespace)
        if space is None:
            space = self.spaces[namespace] = Space(namespace)
        before = space.limits
        self._put_in_force(space, limits)
        plan = self._new_plan()
        error = self._plan_limits(plan, space)
        try:
            self._carry_out(plan, space, "" if is_forced else error)
        except QuotaExceeded:
            self._put_in_force(space, before)
            raise
        finally:
            self._drop_if_idle(space)
        if error:
            logger.warning("%s", error)

    def enforce(self) -> None:
        """Evict what is over a limit, as far as it may go. For what was found at start."""
        for space in list(self.spaces.values()):
            if space.limits.is_any:
                self.set_limits(space.name, space.limits, is_forced=True)

    def saved(self) -> list[Saved]:
        """Return all limits, to be kept over a restart."""
        rows: list[Saved] = []
        for name, space in sorted(self.spaces.items()):
            limits = space.limits
            if limits:
                rows.append((name, None, limits.max_bytes, limits.tenant_bytes))
                rows += [(name, tenant, own, 0) for tenant, own in sorted(limits.tenants.items())]
        return rows

    def restore(self, rows: Iterable[Saved]) -> None:
        """Put limits in force that were saved."""
        found: dict[bytes, Limits] = {}
        for name, tenant, own, tenant_bytes in rows:
            limits = found.setdefault(name, Limits())
            if tenant is None:
                limits.max_bytes, limits.tenant_bytes = own, tenant_bytes
            else:
                limits.tenants[tenant] = own
        for name, limits in found.items():
            self.set_limits(name, limits, is_forced=True)

    def check(self, entries: Iterable[Entry]) -> None:
        """Assert that every page is counted once, and nothing else."""
        counted: dict[Account, list[Entry]] = {}
        for entry in entries:
            if entry.kind == "kvpage":
                account: Account = entry.account
                assert account is self.find(namespace_of(entry.key), entry.tenant)
                counted.setdefault(account, []).append(entry)
            else:
                assert entry.account is None
        for space in self.spaces.values():
            accounts = space.accounts.values()
            assert space.nbytes == sum(each.nbytes for each in accounts)
            assert space.num_pages == sum(each.num_pages for each in accounts)
            for account in accounts:
                pages = counted.pop(account)
                assert account.nbytes == sum(entry.nbytes for entry in pages)
                assert account.num_pages == len(pages)
                assert (account.coldest is not None) == space.limits.is_any
                if account.coldest is not None:
                    alone = {entry for entry in pages if not goes_along(entry)}
                    assert alone <= set(account.coldest) <= set(pages)
        assert not counted
        assert self._num_limited == sum(each.limits.is_any for each in self.spaces.values())

    # -- inside -------------------------------------------------------------------------------

    def _count(self, entry: Entry) -> None:
        name = namespace_of(entry.key)
        space = self.spaces.get(name)
        if space is None:
            space = self.spaces[name] = Space(name)
        account = space.accounts.get(entry.tenant)
        if account is None:
            account = space.accounts[entry.tenant] = Account(space, entry.tenant)
            if space.limits.is_any:
                account.coldest = Coldest()
        entry.account = account
        account.nbytes += entry.nbytes
        account.num_pages += 1
        space.nbytes += entry.nbytes
        space.num_pages += 1
        self.requeue(entry)

    def _drop_if_idle(self, space: Space) -> None:
        if not space.accounts and not space.limits:
            self.spaces.pop(space.name, None)

    def _put_in_force(self, space: Space, limits: Limits) -> None:
        was_limited, space.limits = space.limits.is_any, limits
        self._num_limited += limits.is_any - was_limited
        if limits.is_any == was_limited:
            return
        for account in space.accounts.values():
            account.coldest = Coldest() if limits.is_any else None
        if limits.is_any and space.accounts:
            for entry in self.entries.values():
                if entry.account is not None and entry.account.space is space:
                    self.requeue(entry)

    def _can_not_free(self, accounts: Sequence[Account], nbytes: int) -> bool:
        plan = self._new_plan()
        freed = plan.doom(accounts, nbytes)
        plan.end(is_final=False)
        return freed < nbytes

    def _new_plan(self, keep: Collection[Entry] = ()) -> Plan:
        return Plan(self._clock.now, self.is_held, keep)

    def _carry_out(self, plan: Plan, space: Space, error: str) -> None:
        """Evict who is doomed; if there is an error, nobody. Raises QuotaExceeded with it."""
        going = plan.end(is_final=not error)
        if error:
            space.num_refused += 1
            space.refused_until = self._clock.now + DOUBT_S
            self.num_refused += 1
            raise QuotaExceeded(error)
        for entry in going:
            if entry.position >= 0:
                space.num_evicted += 1
                self.num_evicted += 1
                self.evicted_bytes += entry.nbytes
                self.lose(entry)

    @staticmethod
    def _plan_put(plan: Plan, space: Space, tenant: bytes, nbytes: int) -> str:
        """Choose who goes so that ``nbytes`` more of a tenant fit; return why they cannot."""
        account = space.accounts.get(tenant)
        used = 0 if account is None else account.nbytes
        own_max, whole_max = space.limits.of(tenant), space.limits.max_bytes
        own_over, whole_over = space.over(tenant, nbytes)
        if nbytes > (own_max or nbytes):
            return _refusal(space, tenant, own_max, used, nbytes)
        if nbytes > (whole_max or nbytes):
            return _refusal(space, b"", whole_max, space.nbytes, nbytes)
        freed = 0
        if account is not None:
            freed = plan.doom([account], max(own_over, whole_over))
        if freed < own_over:
            return _refusal(space, tenant, own_max, used, nbytes)
        if freed < whole_over:
            others = [each for each in space.accounts.values() if each is not account]
            for some in space.in_turn(others):
                freed += plan.doom(some, whole_over - freed)
                if freed >= whole_over:
                    break
            if freed < whole_over:
                return _refusal(space, b"", whole_max, space.nbytes, nbytes)
        return ""

    @staticmethod
    def _plan_limits(plan: Plan, space: Space) -> str:
        """Choose who goes so that what is there fits; return why it cannot."""
        error = ""
        for account in space.accounts.values():
            own_max = account.max_bytes
            over = account.nbytes - own_max if own_max else 0
            if plan.doom([account], over) < over:
                error = _refusal(space, account.tenant, own_max, account.nbytes, 0)
        whole_max = space.limits.max_bytes
        over = space.nbytes - plan.freed - whole_max if whole_max else 0
        if over > 0 and plan.doom(list(space.accounts.values()), over) < over:
            error = _refusal(space, b"", whole_max, space.nbytes, 0)
        return error


def _refusal(space: Space, tenant: bytes, limit: int, used: int, nbytes: int) -> str:
    """Say which quota is in the way, what is used of it and what can be done."""
    namespace, owner = _shown(space.name), f"namespace {_shown(space.name)}"
    words = f"KV.QUOTA {namespace}"
    if tenant:
        owner = f"tenant {_shown(tenant)} of {owner}"
        words += f" TENANT {_shown(tenant)}"
    if nbytes > limit:
        return (
            f"{owner} may keep {limit} bytes, and a put of {nbytes} never fits; raise the quota "
            f"with {words} MAXBYTES"
        )
    more = f", {nbytes} more do not fit" if nbytes else ""
    return (
        f"{owner} may keep {limit} bytes and has {used}{more}: what is there is pinned, leased, "
        f"just promised to a reader, or has pages behind it that must stay; unpin or delete some, "
        f"or raise the quota with {words} MAXBYTES"
    )


def _shown(name: bytes) -> str:
    text = repr(name.decode(errors="replace"))
    return text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + "..."


SHOWN_MAX = 80
_NO_LIMITS = Limits()
