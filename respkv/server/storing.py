"""KV.SEQ.PUT of whole pages.

By the time the command runs all payloads are there, most of them in slots of their own. So a put is
one step: room is found for the small ones first, and then nothing is evicted any more, so the pages
are published in order, each behind its parent. When a payload had no room, those before it are
stored all the same: they are a prefix, and the client goes on from there. A put of very many pages is
several such steps (slices.py).
"""

from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any

from respkv.engine.entry import Entry
from respkv.engine.landing import Landing
from respkv.errors import CacheError, CommandError, SequenceGap
from respkv.server.arguments import value_of
from respkv.server.puts import (
    FIRST_PAYLOAD,
    SequencePut,
    Target,
    check_payloads,
    kept_until,
    pin_end,
    plan,
    refresh,
    send_counts,
    size_of,
    store_part,
    targets_of,
)
from respkv.server.slices import check_whole, is_long, pause, slices_of
from respkv.wire.parser import Args

if TYPE_CHECKING:
    from respkv.server.session import Session


def put_pages(session: "Session", put: SequencePut, args: Args) -> Awaitable[None] | None:
    """Store pages, then what belongs to the end of the prompt; answer with how many.

    args:    of the call. What is stored in later turns is taken out of them, or the session would
             give its slots back at the end of this one.
    Returns: what does the rest, if there are many.
    Raises OutOfMemory, QuotaExceeded; the pages before the one without room are stored.
    """
    check_payloads(put, session.cache.history)
    if is_long(put):
        check_whole(session, put)
        del args[FIRST_PAYLOAD:]
        return _put_slices(session, put)
    stored = _put_step(session, put)
    session.send([stored, len(put.payloads) - stored])
    return None


async def _put_slices(session: "Session", put: SequencePut) -> None:
    """Store pages slice by slice, whether or not the client still waits, and answer.

    Cancelled: pages from the first on are stored, the payloads of the others are given back.
    """
    copies, stored, noted = session.cache.copies, 0, list[tuple[int, int]]()
    try:
        for part in slices_of(put):
            if part.seen > put.seen:
                await pause(session, put)
            since = copies.ticket
            stored += _put_step(session, part)
            noted.append((since, copies.ticket))
    finally:
        for value in (*put.payloads, *put.parts.values()):
            if isinstance(value, Landing):
                session.cache.abandon(value)  # harmless for one that was committed
    send_counts(session, [stored, len(put.payloads) - stored], noted)


def _put_step(session: "Session", put: SequencePut) -> int:
    """Store pages and parts in one step; return how many pages are new."""
    cache, sequences = session.cache, session.server.sequences
    targets: list[Target] = []
    holder = None
    if put.payloads:
        targets = targets_of(put, plan(session, put), session)
    elif (holder := sequences.holder(put.prompt)) is not None:
        cache.promise(holder, kept_until(session))
    for target in targets if put.group.name else ():
        _check_page(target)
    pinned = pin_end(session, put, targets)
    theres = [*(target.there for target in targets), *_parts_there(session, put)]
    _make_room(session, put, targets, theres, holder)
    made: list[Landing] = []
    stored = 0
    try:
        values, failure = _find_room(session, put, theres, made)
        for target, value in zip(targets, values, strict=False):
            stored += _store(session, put, target, value, pinned)
        if failure is None:
            for what, value in zip(put.parts, values[len(targets) :], strict=True):
                store_part(session, put, what, value, holder)
    finally:
        for landing in made:
            cache.abandon(landing)
        sequences.tidy()
    if failure is not None:
        raise failure
    return stored


def _check_page(target: Target) -> None:
    """Raise SequenceGap unless the page is there that one of a group hangs on."""
    if target.piece.there is None:
        raise SequenceGap(
            f"the page from token {target.piece.first_token} on is not here, and its groups hang on"
            f" it; put it first, FROM {target.piece.first_token}"
        )


def _parts_there(session: "Session", put: SequencePut) -> list[Entry | None]:
    """Return which of the parts of a put are there, and keep them while there is room made for it."""
    cache, theres = session.cache, list[Entry | None]()
    for what, payload in put.parts.items():
        key = session.server.sequences.part_key(put.prompt, what)
        theres.append(there := cache.has_page(key, size_of(payload)))
        if there is not None:
            cache.promise(there, kept_until(session))
    return theres


def _make_room(
    session: "Session",
    put: SequencePut,
    targets: Sequence[Target],
    theres: Sequence[Entry | None],
    holder: Entry | None,
) -> None:
    """Evict for what is new so that its owner may keep all of it. Raises QuotaExceeded.

    theres: what is there already of the pages, and then of the parts. holder: the page that parts
            are to hang on when no pages come with them.
    """
    pairs = zip([*put.payloads, *put.parts.values()], theres, strict=True)
    nbytes = sum(size_of(payload) for payload, there in pairs if there is None)
    keep = {there for there in theres if there is not None}
    cache = session.cache
    before = cache.find(targets[0].how.parent or b"") if targets else None
    for entry in (before, holder):
        if entry is not None:
            keep.add(entry)
    cache.accounts.make_room(put.schema.namespace, put.how.tenant, nbytes, keep)


def _find_room(
    session: "Session", put: SequencePut, theres: Sequence[Entry | None], made: list[Landing]
) -> tuple[list[Any], CacheError | None]:
    """Return a landing for all that is not there, as far as there is room, and why not.

    Afterwards nothing is evicted any more. theres: what is there already of the pages, and then of
    the parts. made: what was reserved here is added to it.
    """
    values: list[Any] = []
    for payload, there in zip([*put.payloads, *put.parts.values()], theres, strict=True):
        if there is not None or isinstance(payload, Landing):
            values.append(payload)
            continue
        try:
            landing = session.cache.reserve(len(value_of(payload)))  # or raises why there is none
        except CacheError as error:
            return values, error
        made.append(landing)
        landing.write(payload)
        values.append(landing)
    return values, None


def _store(session: "Session", put: SequencePut, target: Target, value: Any, pinned: float) -> bool:
    """Store a page, pinned until then if that is not 0.0; return whether it is new."""
    cache, there = session.cache, target.there
    if there is None:
        entry = cache.commit(target.key, value, target.how)
        cache.stats.pages_put += 1
    elif there.position < 0:
        raise CommandError("a page left while its copy arrived; put it again", "BUSY")
    else:
        entry = there
        cache.stats.pages_skipped += 1
        refresh(session, put, target, entry)
    if pinned:
        cache.pin(entry, pinned)
    return there is None
