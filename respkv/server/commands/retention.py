"""KV.QUOTA, KV.HINT, KV.RETAIN, KV.SEQ.RETAIN: how much may be kept, and what is kept how.

A client asks for what it would like; each answer says what is in force and, where that is another
thing, why.
"""

from collections.abc import Awaitable, Sequence
from typing import Any

from respkv.engine.entry import Entry
from respkv.engine.sessions import Answer
from respkv.engine.spaces import Limits
from respkv.errors import CommandError
from respkv.server.arguments import DURATION_MS_MAX, Words, count_ms, shown
from respkv.server.commands.pages import NAME_BYTES_MAX
from respkv.server.keeping import LEVELS, allowed_pin, allowed_ttl
from respkv.server.prompts import SESSION_BYTES_MAX, ChainWords, prompt_of
from respkv.server.registry import command
from respkv.server.session import Session
from respkv.tiers.record import Level
from respkv.wire.parser import Args

NAMESPACE_BYTES_MAX = 256
NAMESPACES_MAX = 4096  # that have quotas
TENANTS_MAX = 65_536  # of a namespace, that have a limit of their own

Wishes = dict[bytes, Any]


# -- quotas -----------------------------------------------------------------------------------


@command("kv.quota")
def kv_quota(session: Session, args: Args) -> Awaitable[None] | None:
    """Set the quotas of a namespace or of a tenant; answer with what is in force and in use."""
    namespace, accounts = args[1], session.cache.accounts
    if len(namespace) > NAMESPACE_BYTES_MAX:
        raise CommandError(f"a namespace has at most {NAMESPACE_BYTES_MAX} bytes")
    words = Words(args, 2)
    tenant, limits, is_change = b"", accounts.limits_of(namespace).copy(), False
    seen: set[bytes] = set()
    while words:
        word = words.word()
        if word in seen:
            raise words.unexpected()
        seen.add(word)
        if word == b"TENANT" and not is_change:  # first, because it says whose MAXBYTES it is
            tenant = words.take()
            most = NAME_BYTES_MAX[b"TENANT"]
            if not 0 < len(tenant) <= most:
                raise CommandError(f"a tenant has 1 to {most} bytes")
        elif word == b"MAXBYTES":
            is_change = True
            _set_max(limits, tenant, words.take())
        elif word == b"TENANTBYTES" and not tenant:
            is_change = True
            limits.tenant_bytes = _bytes_of(words.take(), "TENANTBYTES")
        else:
            raise words.unexpected()
    if len(limits.tenants) > TENANTS_MAX:
        raise CommandError(
            f"{TENANTS_MAX} tenants of {shown(namespace)} have quotas; set one of them to DEFAULT first"
        )
    if is_change and limits != accounts.limits_of(namespace):
        others = (space for name, space in accounts.spaces.items() if name != namespace)
        if limits and sum(bool(space.limits) for space in others) >= NAMESPACES_MAX:
            raise CommandError(
                f"{NAMESPACES_MAX} namespaces have quotas; KV.QUOTA one of them MAXBYTES 0 first"
            )
        accounts.set_limits(namespace, limits)
        if session.server.schema_files is not None:
            return _saved_quota(session, namespace, tenant)
    _send_quota(session, namespace, tenant)
    return None


def _set_max(limits: Limits, tenant: bytes, word: bytes) -> None:
    if tenant and word.upper() == b"DEFAULT":
        limits.tenants.pop(tenant, None)
    elif tenant:
        limits.tenants[tenant] = _bytes_of(word, "MAXBYTES")
    elif word.upper() == b"DEFAULT":
        raise CommandError("MAXBYTES DEFAULT is for a TENANT; MAXBYTES 0 frees a namespace")
    else:
        limits.max_bytes = _bytes_of(word, "MAXBYTES")


def _bytes_of(word: bytes, what: str) -> int:
    return Words([word], 0).count(what)


async def _saved_quota(session: Session, namespace: bytes, tenant: bytes) -> None:
    """Answer once a restart would find the quotas. Cancelled: they are in force, and may be saved.

    Raises TierError when no tier takes them; they are in force all the same.
    """
    files = session.server.schema_files
    assert files is not None
    await files.save()
    _send_quota(session, namespace, tenant)


def _send_quota(session: Session, namespace: bytes, tenant: bytes) -> None:
    accounts = session.cache.accounts
    limits = accounts.limits_of(namespace)
    if tenant:
        account = accounts.find(namespace, tenant)
        session.send(
            {
                "namespace": namespace,
                "tenant": tenant,
                "max_bytes": limits.of(tenant),
                "bytes": 0 if account is None else account.nbytes,
                "pages": 0 if account is None else account.num_pages,
            }
        )
        return
    space = accounts.spaces.get(namespace)
    tenants = set(limits.tenants) | set(() if space is None else space.accounts)
    session.send(
        {
            "namespace": namespace,
            "max_bytes": limits.max_bytes,
            "bytes": 0 if space is None else space.nbytes,
            "pages": 0 if space is None else space.num_pages,
            "tenant_bytes": limits.tenant_bytes,
            "tenants": len(tenants - {b""}),
        }
    )


# -- hints ------------------------------------------------------------------------------------


@command("kv.hint")
def kv_hint(session: Session, args: Args) -> None:
    """Take a hint on a session; answer with what became of it."""
    namespace, name, hints = args[1], args[2], session.server.hints
    words = Words(args, 3)
    word, ms = words.word(), 0
    if word == b"EXPECT":
        ms = count_ms(words.take(), "EXPECT")
    elif word not in (b"END", b"DEMOTE"):
        raise CommandError(f"hint {shown(word)}: accepted are END, EXPECT milliseconds and DEMOTE")
    if words:
        words.take()
        raise words.unexpected()
    if word == b"END":
        answer = hints.end(namespace, name)
        if (prefetcher := session.server.prefetcher) is not None:
            prefetcher.forget(session.cache.requests.entries_of(name, namespace))
    elif word == b"EXPECT":
        answer = hints.expect(namespace, name, ms, session.server.config.expect_max)
        if answer.status != "rejected" and (prefetcher := session.server.prefetcher) is not None:
            pages = session.cache.requests.entries_of(name, namespace)
            prefetcher.expect(pages, session.cache.clock.now + answer.value / 1000)
    else:
        mover = session.server.mover
        answer = hints.demote(namespace, name, None if mover is None else mover.demotions)
    session.send(list(answer))


# -- what is there ----------------------------------------------------------------------------


@command("kv.retain")
def kv_retain(session: Session, args: Args) -> None:
    """Change how a page is kept."""
    words, wishes = Words(args, 2), Wishes()
    while words:
        if not _take_wish(words.word(), words, wishes):
            raise words.unexpected()
    entry = session.cache.find(args[1])
    if entry is None or entry.kind != "kvpage":
        session.send_nil()
        return
    session.send(_retain(session, [entry], wishes))


@command("kv.seq.retain")
def kv_seq_retain(session: Session, args: Args) -> None:
    """Change how the stored pages of a prompt are kept, those of the longest match."""
    words, wishes, chain = Words(args, 3), Wishes(), ChainWords()
    while words:
        word = words.word()
        if not (_take_wish(word, words, wishes) or chain.take(word, words)):
            raise words.unexpected()
    if not wishes:
        raise CommandError("accepted are PX, PIN, PRIORITY, WRITTEN, DURABLE and SESSION")
    prompt = prompt_of(session, args[1], args[2], chain.extras())
    found = session.server.sequences.find(prompt)
    entries = [each for page in found.entries for each in (page, *(page.parts or ()))]
    session.send([found.tokens, _retain(session, entries, wishes)])


def _take_wish(word: bytes, words: Words, wishes: Wishes) -> bool:
    """Read a word of KV.RETAIN and what follows it; False if it is none, or came already."""
    if word in wishes or (word in LEVELS and wishes.keys() & LEVELS.keys()):
        return False
    if word in (b"PX", b"PIN"):
        ms = words.count(word.decode())
        if ms > DURATION_MS_MAX:
            raise CommandError(f"{word.decode()} must be at most {DURATION_MS_MAX}, not {ms}")
        wishes[word] = ms
    elif word == b"PRIORITY":
        wishes[word] = words.integer()
    elif word in LEVELS:
        wishes[word] = LEVELS[word]
    elif word == b"SESSION":
        wishes[word] = words.take()
        if not 1 <= len(wishes[word]) <= SESSION_BYTES_MAX:
            raise CommandError(f"SESSION has 1 to {SESSION_BYTES_MAX} bytes")
    else:
        return False
    return True


def _retain(session: Session, entries: Sequence[Entry], wishes: Wishes) -> list[Any]:
    """Apply wishes to pages; return what became of each."""
    answers: list[Any] = []
    for word, value in wishes.items():
        if word == b"PX":
            answer = _retain_ttl(session, entries, value)
        elif word == b"PIN":
            answer = _retain_pin(session, entries, value)
        elif word == b"PRIORITY":
            answer = _retain_priority(session, entries, value)
        elif word == b"SESSION":
            pages = [entry for entry in entries if entry.part is None]
            for page in pages:
                session.cache.requests.belongs(page, value)
            answer = Answer("accepted", len(pages), "")
        else:
            answer = _retain_level(session, entries, value)
        session.server.hints.count(answer)
        answers.append([word, *answer])
    return answers


def _retain_ttl(session: Session, entries: Sequence[Entry], ms: int) -> Answer:
    answer = allowed_ttl(session, ms)
    expires_ms = session.server.clock.wall_ms + answer.value if answer.value else 0
    for entry in entries:
        if entry.part is None:  # a part goes with its page
            session.cache.expire_at(entry, expires_ms)
    return answer


def _retain_pin(session: Session, entries: Sequence[Entry], ms: int) -> Answer:
    cache = session.cache
    others = cache.pins.nbytes_but(*entries)
    answer = allowed_pin(session, ms, sum(entry.nbytes for entry in entries), others)
    if answer.status != "rejected":
        until = cache.clock.now + answer.value / 1000 if answer.value else 0.0
        for entry in entries:
            cache.pin(entry, until)
    return answer


def _retain_priority(session: Session, entries: Sequence[Entry], priority: int) -> Answer:
    for entry in entries:
        session.cache.prioritize(entry, priority)
    return Answer("accepted", priority, "")


def _retain_level(session: Session, entries: Sequence[Entry], level: Level) -> Answer:
    cache = session.cache
    if session.server.mover is None:
        return Answer("rejected", 0, "this server has no tier that survives a restart")
    if not cache.copies.can_write:
        return Answer("rejected", 0, "no file tier takes values now")
    for entry in entries:
        if level > entry.level:
            cache.copies.want(entry, level)
    return Answer("accepted", int(level), "")
