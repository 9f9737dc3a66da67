"""KV.INFO and KV.EXPLAIN: what is known of a page, and why one is or is not here."""

from collections.abc import Awaitable
from typing import Any, Final

import anyio.lowlevel

from respkv.chain import ALGORITHMS, Prompt, tokens_of
from respkv.engine.entry import Entry
from respkv.engine.sequences import Found
from respkv.errors import SchemaMismatch
from respkv.page import PAGE_ID_BYTES, namespace_of
from respkv.server.arguments import Words, shown
from respkv.server.loads import is_cold
from respkv.server.places import stored_in, tier_of, tiers_of
from respkv.server.prompts import ChainWords, prompt_of
from respkv.server.registry import command
from respkv.server.session import Session
from respkv.wire.parser import Args

STEP = 2000  # keys looked at before others are let in
KEY_SHOWN_MAX = 2 * PAGE_ID_BYTES + 64

DETAILS: Final = {
    "never": "not stored since the server started, or too long ago to be remembered",
    "evicted": "it went to make room in memory or in files; raise maxmemory, or pin it",
    "quota": "it went to keep its tenant or namespace within its quota; raise that with KV.QUOTA",
    "expired": "its TTL ended",
    "deleted": "a client deleted it",
    "flushed": "FLUSHDB or FLUSHALL removed it",
    "schema": "a put was refused because it did not fit the schema of its namespace",
    "corrupt": "its bytes did not match their checksum",
    "lost": "the only copy was in a tier that failed",
    "replaced": "a longer page of the same prompt took its place, and went since",
}


@command("kv.info")
def kv_info(session: Session, args: Args) -> None:
    """Describe a page."""
    entry = session.cache.find(args[1])
    if entry is None:
        session.send_nil()
        return
    places = stored_in(session, entry)
    session.send(
        {
            "key": entry.key,
            "type": entry.kind,
            "namespace": entry.namespace,
            "bytes": entry.nbytes,
            "tokens": entry.tokens,
            "depth": entry.depth,
            "tier": tier_of(session, entry)[0],
            "tiers": list(places),
            "codec": next(iter(places.values())).codec,
            "codecs": {name: place.codec for name, place in places.items()},
            "stored_bytes": {name: place.nbytes for name, place in places.items()},
            "parent": entry.parent_key or None,
            "children": len(entry.children or ()),
            "parts": len(entry.parts or ()),
            "hits": entry.hits,
            "holders": 1 if entry.slot is None else entry.slot.holders,
            **_retention(session, entry),
            **_request(session, entry),
            **_account(entry),
        }
    )


def _retention(session: Session, entry: Entry) -> dict[str, Any]:
    """Describe for how long a page is kept, and why."""
    now, wall_ms = session.cache.clock.now, session.server.clock.wall_ms
    return {
        "level": entry.level.name.lower(),
        "priority": entry.priority,
        "age_ms": int((now - entry.born) * 1000),
        "idle_ms": int((now - entry.touched) * 1000),
        "ttl_ms": entry.expires_ms - wall_ms if entry.expires_ms else -1,
        "pinned_ms": max(0, int((entry.pinned_until - now) * 1000)),
        "held_ms": max(0, int((entry.held_until - now) * 1000)),
    }


def _request(session: Session, entry: Entry) -> dict[str, Any]:
    """Describe the last request that used a page, and what it is expected to do."""
    request = entry.request
    if request is None:
        nothing = {"session": None, "turn": -1, "request_tokens": 0, "request_class": -1}
        return nothing | {"is_ended": 0, "expected_ms": -1}
    expected_s = request.expected_at - session.cache.clock.now
    return {
        "session": None if request.session is None else request.session.name,
        "turn": request.turn,
        "request_tokens": request.num_tokens,
        "request_class": request.kind,
        "is_ended": int(request.is_ended),
        "expected_ms": max(0, int(expected_s * 1000)) if request.expected_at else -1,
    }


def _account(entry: Entry) -> dict[str, Any]:
    """Describe whose bytes a page counts to, and the quotas there."""
    account = entry.account
    if account is None:
        return {"tenant": None}
    space = account.space
    return {
        "tenant": account.tenant or None,
        "tenant_bytes": account.nbytes,
        "tenant_max_bytes": account.max_bytes,
        "namespace_bytes": space.nbytes,
        "namespace_max_bytes": space.limits.max_bytes,
    }


@command("kv.explain")
def kv_explain(session: Session, args: Args) -> None:
    """Tell why a key is or is not here."""
    entry = session.cache.find(args[1])
    if entry is not None:
        state = "cold" if is_cold(entry) else "present"
        tiers = tiers_of(session, entry)
        where = " and ".join(tiers) + (" tier" if len(tiers) == 1 else " tiers")
        session.send([state, f"{entry.kind} of {entry.nbytes} bytes in the {where}"])
        return
    reason = session.cache.history.find(args[1]) or "never"
    schema = session.cache.namespaces.of_key(args[1])
    known = "its namespace has a schema" if schema else "its namespace has no schema"
    session.send([reason, f"{DETAILS[reason]}; {known}"])


@command("kv.seq.explain")
def kv_seq_explain(session: Session, args: Args) -> Awaitable[None] | None:
    """Tell up to where a prompt is stored, and why not further."""
    words, chain = Words(args, 3), ChainWords()
    while words:
        if not chain.take(words.word(), words):
            raise words.unexpected()
    extras = chain.extras()
    try:
        prompt = prompt_of(session, args[1], args[2], extras)
    except SchemaMismatch as error:
        session.send([_why_no_prompt(session, args[1]), str(error), 0])
        return None
    found = session.server.sequences.find(prompt)
    if found.tokens == prompt.num_tokens:
        is_any_cold = any(is_cold(entry) for entry in found.entries)
        text = f"all {found.tokens} tokens are stored, in {len(found.entries)} pages"
        session.send(["cold" if is_any_cold else "present", text, found.tokens])
        return None
    reason, text = _first_missing(session, prompt, found)
    may_look = session.server.config.explain_across_salts
    if reason == "never" and found.tokens == 0 and may_look:
        return _look_for_salt(session, prompt, text)
    session.send([reason, text, found.tokens])
    return None


def _why_no_prompt(session: Session, namespace: bytes) -> str:
    schema = session.cache.namespaces.find(namespace)
    is_known = schema is None or schema.hash_algorithm.decode(errors="replace") in ALGORITHMS
    return "schema" if is_known else "hash"


def _first_missing(session: Session, prompt: Prompt, found: Found) -> tuple[str, str]:
    """Return why the first page behind what matched is not there, and a text that names it."""
    index = found.tokens // prompt.page_tokens
    first = index * prompt.page_tokens
    last = min(first + prompt.page_tokens, prompt.num_tokens)
    is_full = last - first == prompt.page_tokens
    key = prompt.key(index) if is_full else prompt.position_key(prompt.num_tokens)
    reason: str = session.cache.history.find(key) or "never"
    detail = DETAILS[reason]
    pages = session.server.sequences.find_pages(prompt)
    if pages.tokens > found.tokens:
        reason = "group"
        ends = session.server.groups.limits(prompt, pages).items()
        detail = f"{pages.tokens} tokens are stored, but not what all groups of layers need: "
        detail += ", ".join(f"group {shown(name)} serves {end}" for name, end in ends)
    elif session.server.assemblies.find(key) is not None:
        reason = "incomplete"
        detail = "it can be found once all its layers and heads have come, and the page in front"
    elif session.cache.find(key) is not None:
        reason = "schema"
        detail = "it was stored under another schema, or without its tokens"
    shown_key = key[:KEY_SHOWN_MAX].decode(errors="replace")
    what = "page" if is_full else "partial page"
    verb = "can be served" if reason == "group" else "are stored"
    text = f"{found.tokens} of {prompt.num_tokens} tokens {verb}; tokens {first} to {last - 1}"
    return reason, f"{text}, {what} {index}, {shown_key}: {detail}"


async def _look_for_salt(session: Session, prompt: Prompt, text: str) -> None:
    """Answer with whether the first page is stored under other words of the chain.

    It looks at every key, and lets others in between. Cancelled: nothing has changed.
    """
    cache, cursor = session.cache, -1
    wanted = prompt.tokens[: 4 * min(prompt.page_tokens, prompt.num_tokens)]
    reason = "never"
    while cursor:
        cursor, entries = cache.index.scan(max(cursor, 0), STEP)
        if any(_begins_with(entry, prompt.namespace, wanted) for entry in entries):
            reason = "salt"
            text += "; its tokens are stored under another salt, tenant, LoRA adapter or media"
            break
        if cursor:
            await anyio.lowlevel.checkpoint()
    session.send([reason, text, 0])


def _begins_with(entry: Entry, namespace: bytes, wanted: bytes) -> bool:
    """Whether an entry is the first page of a chain and has these tokens."""
    is_first = bool(entry.token_ids) and not entry.parent_key and entry.part is None
    if not is_first or namespace_of(entry.key) != namespace:
        return False
    return tokens_of(entry.token_ids).startswith(wanted)
