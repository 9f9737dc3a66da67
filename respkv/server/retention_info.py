"""The fields of INFO on retention: who keeps how much, and what became of wishes.

Namespaces and tenants are named by clients, so their number is bounded here, the largest first, and
what would break a line or a field of their names is escaped as in a URL.
"""

from heapq import nlargest
from typing import TYPE_CHECKING
from urllib.parse import quote

from respkv.engine.spaces import Account, Space

if TYPE_CHECKING:
    from respkv.server.state import Server

NAMESPACES_MAX = 100
TENANTS_MAX = 100
NAME_CHARS_MAX = 80


def retention_fields(server: "Server") -> dict[str, object]:
    """Return the fields of quotas, pins and hints."""
    cache, counts = server.cache, server.hints.counts
    accounts, mover = cache.accounts, server.mover
    sessions = cache.requests.sessions()
    fields: dict[str, object] = {
        "kv_volatile": cache.index.num_volatile,
        "kv_pinned": len(cache.pins),
        "kv_pinned_bytes": cache.pins.nbytes,
        "kv_sessions": len(sessions),
        "kv_sessions_ended": sum(each.is_ended for each in sessions),
        "kv_sessions_expected": sum(each.expected_at > cache.clock.now for each in sessions),
        "kv_wishes_accepted": counts["accepted"],
        "kv_wishes_clipped": counts["clipped"],
        "kv_wishes_rejected": counts["rejected"],
        "kv_demotions_waiting": 0 if mover is None else len(mover.demotions),
        "kv_quota_evictions": accounts.num_evicted,
        "kv_quota_evicted_bytes": accounts.evicted_bytes,
        "kv_quota_refusals": accounts.num_refused,
        "kv_spaces": len(accounts.spaces),
    }
    spaces = nlargest(NAMESPACES_MAX, accounts.spaces.values(), key=_rank)
    fields |= {f"kv_namespace_{_name(space.name)}": _space(space) for space in spaces}
    tenants = (
        account
        for space in accounts.spaces.values()
        for account in space.accounts.values()
        if account.tenant
    )
    for account in nlargest(TENANTS_MAX, tenants, key=_rank_of_account):
        name = f"kv_tenant_{_name(account.space.name)}/{_name(account.tenant)}"
        fields[name] = (
            f"pages={account.num_pages},bytes={account.nbytes},max_bytes={account.max_bytes}"
        )
    return fields


def _space(space: Space) -> str:
    limits = space.limits
    return (
        f"pages={space.num_pages},bytes={space.nbytes},max_bytes={limits.max_bytes},"
        f"tenant_bytes={limits.tenant_bytes},tenants={len(space.accounts.keys() - {b''})},"
        f"evicted={space.num_evicted},refused={space.num_refused}"
    )


def _rank(space: Space) -> tuple[bool, int]:
    return bool(space.limits), space.nbytes


def _rank_of_account(account: Account) -> tuple[bool, int]:
    return bool(account.max_bytes), account.nbytes


def _name(name: bytes) -> str:
    text = quote(name, safe="")
    return text if len(text) <= NAME_CHARS_MAX else text[:NAME_CHARS_MAX] + "~"
