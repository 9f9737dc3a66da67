"""A namespace, its tenants' accounts, their limits, and who would go for one more page.

Pure: nothing here changes the cache. ``Plan`` names victims, and either all of them go or none.
"""

import heapq
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass, field

from respkv.engine.coldest import Coldest, rank_of
from respkv.engine.entry import Entry

OTHERS_MAX = 256  # accounts among which the coldest page goes for somebody else's


class Account:
    """The pages of one tenant of a namespace; those who name no tenant are tenant ``b""``."""

    __slots__ = ("coldest", "nbytes", "num_pages", "space", "tenant")

    def __init__(self, space: "Space", tenant: bytes) -> None:
        self.space = space
        self.tenant = tenant
        self.nbytes = 0
        self.num_pages = 0
        self.coldest: Coldest | None = None  # only where there is a quota

    @property
    def max_bytes(self) -> int:
        """What the tenant may keep; 0: as much as its namespace."""
        return self.space.limits.of(self.tenant)


@dataclass
class Limits:
    """What a namespace may keep; 0 is no limit.

    tenant_bytes: of each tenant that has none of its own in ``tenants``.
    """

    max_bytes: int = 0
    tenant_bytes: int = 0
    tenants: dict[bytes, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.max_bytes or self.tenant_bytes or self.tenants)

    @property
    def is_any(self) -> bool:
        """Whether somebody is limited by them."""
        return bool(self.max_bytes or self.tenant_bytes or any(self.tenants.values()))

    def of(self, tenant: bytes) -> int:
        """Return the limit of a tenant; 0 for none."""
        return self.tenants.get(tenant, self.tenant_bytes) if tenant else 0

    def copy(self) -> "Limits":
        """Return limits that may be changed."""
        return Limits(self.max_bytes, self.tenant_bytes, dict(self.tenants))


class Space:
    """A namespace: its tenants' accounts and their sum."""

    __slots__ = (
        "accounts",
        "limits",
        "name",
        "nbytes",
        "num_evicted",
        "num_pages",
        "num_refused",
        "refused_until",
        "turn",
    )

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.limits = Limits()
        self.accounts: dict[bytes, Account] = {}
        self.nbytes = 0
        self.num_pages = 0
        self.num_evicted = 0
        self.num_refused = 0
        self.refused_until = 0.0  # monotonic: a put was refused of late, and others may be
        self.turn = 0

    def in_turn(self, accounts: Sequence[Account]) -> Iterator[Sequence[Account]]:
        """Yield so many accounts at a time as may be compared for one put, each time others first."""
        self.turn = start = self.turn % max(1, len(accounts))
        rotated = (*accounts[start:], *accounts[:start])
        for first in range(0, len(rotated), OTHERS_MAX):
            self.turn += OTHERS_MAX
            yield rotated[first : first + OTHERS_MAX]

    def over(self, tenant: bytes, nbytes: int) -> tuple[int, int]:
        """By how much ``nbytes`` more would pass the tenant's limit, and the namespace's."""
        account = self.accounts.get(tenant)
        used = 0 if account is None else account.nbytes
        own_max, whole_max = self.limits.of(tenant), self.limits.max_bytes
        own_over = used + nbytes - own_max if own_max else 0
        return own_over, self.nbytes + nbytes - whole_max if whole_max else 0


class Plan:
    """Which pages go, chosen one after the other; those in front may be gone already in thought.

    keep:    pages that must stay.
    is_held: whether a page must stay for another reason; that it is pinned is looked at here.
    """

    def __init__(
        self, now: float, is_held: Callable[[Entry], bool], keep: Collection[Entry] = ()
    ) -> None:
        self.doomed: dict[Entry, None] = {}
        self.freed = 0
        self._now = now
        self._keep = keep
        self._is_held = is_held
        self._asked: dict[Coldest, None] = {}

    def doom(self, accounts: Sequence[Account], nbytes: int) -> int:
        """Choose pages of some accounts until ``nbytes`` are free or nobody may go; return how many."""
        if nbytes <= 0:
            return 0
        freed = 0
        numbers = {account: number for number, account in enumerate(accounts)}
        heads: list[tuple[_Rank, int, Account]] = []
        for account, number in numbers.items():
            self._push(heads, number, account)
        while freed < nbytes and heads:
            _, number, account = heapq.heappop(heads)
            entry = self._first(account)
            if entry is None:
                continue
            if heads and heads[0][0] < _rank(entry):  # another account's is colder by now
                self._push(heads, number, account)
                continue
            freed += self._doom(entry, numbers)
            parent = entry.parent
            if parent is not None and parent.account in numbers:
                parent.account.coldest.unpark(parent)
                if parent.account is not account:
                    self._push(heads, numbers[parent.account], parent.account)
            self._push(heads, number, account)
        self.freed += freed
        return freed

    def end(self, *, is_final: bool) -> list[Entry]:
        """Return who goes, each before the page it is behind; nobody unless the plan is final."""
        going = list(self.doomed) if is_final else []
        spared: dict[Coldest, list[Entry]] = {coldest: [] for coldest in self._asked}
        for entry in () if is_final else self.doomed:
            coldest = None if entry.account is None else entry.account.coldest
            if coldest in spared:
                spared[coldest].append(entry)
        for coldest, entries in spared.items():
            coldest.end_plan(entries, self._now)
        return going

    def _doom(self, entry: Entry, scope: Container[Account]) -> int:
        """Note that a page goes, and its parts with it; return what that frees in some accounts."""
        self.doomed[entry] = None
        freed = entry.nbytes
        for part in entry.parts or ():
            if part not in self.doomed:
                self.doomed[part] = None
                freed += part.nbytes if part.account in scope else 0
        return freed

    def _push(
        self, heads: "list[tuple[_Rank, int, Account]]", number: int, account: Account
    ) -> None:
        entry = self._first(account)
        if entry is not None:
            heapq.heappush(heads, (_rank(entry), number, account))

    def _first(self, account: Account) -> Entry | None:
        coldest = account.coldest
        assert coldest is not None
        self._asked[coldest] = None
        return coldest.first(self.doomed, self._must_stay, self._now)

    def _must_stay(self, entry: Entry) -> bool:
        if entry in self._keep or entry.held_until > self._now or self._is_held(entry):
            return True
        parts = entry.parts or ()
        return any(part.pinned_until > self._now or self._must_stay(part) for part in parts)


_Rank = tuple[bool, int, float]


def _rank(entry: Entry) -> _Rank:
    return rank_of(entry, 0)[:3]
