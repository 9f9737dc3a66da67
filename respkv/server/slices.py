"""Puts of very many pages, some of them at a time.

One command may bring tens of thousands of tiny pages, and to plan and publish them all in one turn
takes a second in which nobody else is served. So it is cut into slices of SLICE_PAGES pages, and
others run between them. Each slice does what a put of its own would: it looks whether the page in
front of it is there, which of its pages are there by now, and finds room for the others. So whatever
others did meanwhile, what is stored is a prefix, and an error says from where to go on.

What may refuse a put as a whole, a quota or too many pins, is asked for all of it first, and again by
each slice, because others may have taken the room.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import anyio.lowlevel

from respkv.engine.groups import bound_key
from respkv.errors import PinRefused, SchemaMismatch
from respkv.server.arguments import shown
from respkv.server.keeping import pinned_until
from respkv.server.puts import SequencePut

if TYPE_CHECKING:
    from respkv.server.session import Session

SLICE_PAGES: Final = 256  # some 5 ms


def is_long(put: SequencePut) -> bool:
    """Whether a put is more than one slice."""
    return len(put.payloads) > SLICE_PAGES


def slices_of(put: SequencePut) -> Iterator[SequencePut]:
    """Yield the puts that a put consists of; what belongs to the prompt's end comes with the last."""
    number, page_tokens = len(put.payloads), put.prompt.page_tokens
    if not is_long(put):
        yield put
        return
    for start in range(0, number, SLICE_PAGES):
        first = put.first + start * page_tokens
        yield replace(
            put,
            payloads=put.payloads[start : start + SLICE_PAGES],
            first=first,
            # The page in front is looked for again: with it go all that would stand behind it.
            seen=first // page_tokens - 1 if start else put.seen,
            parts=put.parts if start + SLICE_PAGES >= number else {},
        )


async def pause(session: "Session", put: SequencePut) -> None:
    """Let others run. Raises SchemaMismatch when the schema has gone by then."""
    await anyio.lowlevel.checkpoint()
    session.server.clock.refresh()
    check_schema(session, put)


def check_schema(session: "Session", put: SequencePut) -> None:
    """Raise SchemaMismatch unless a put's namespace has the schema that it had when it began."""
    schema = session.cache.namespaces.find(put.schema.namespace)
    if schema is None or schema.identity != put.schema.identity:
        name = shown(put.schema.namespace)
        raise SchemaMismatch(f"the schema of namespace {name!r} was deleted meanwhile")


def check_whole(session: "Session", put: SequencePut) -> None:
    """Make room for all of a put where its owner has a quota, and see that all may be pinned.

    The tail may be in a longer page, which its own slice will see; here it does not count.
    Raises QuotaExceeded or PinRefused.
    """
    cache, namespace, page_tokens = session.cache, put.schema.namespace, put.prompt.page_tokens
    first, stop = put.first // page_tokens, put.prompt.num_pages
    nbytes = put.group.piece_bytes(page_tokens)
    has_quota = put.rectangle is None and bool(cache.accounts.limits_of(namespace))
    try:
        pinned_until(session, put.pin_ms if put.payloads else 0, nbytes * (stop - first))
        is_refused = False
    except PinRefused:
        is_refused = True  # unless some of them are pinned already
    if not put.payloads or not (is_refused or has_quota):
        return
    keys = put.prompt.keys(first, stop)
    if put.group.name:
        keys = [bound_key(key, put.group.name) for key in keys]
    theres = [cache.has_page(key, nbytes) for key in keys]
    pinned_until(session, put.pin_ms, nbytes * len(theres), *theres)
    if not has_quota:
        return
    # Room comes neither from the page in front, nor from those that the pages of a group hang on.
    front = [cache.find(put.prompt.key(first - 1))] if first else []
    if None in front:
        return  # there is a gap, as the first slice will say; nobody goes for that
    held_by = map(cache.find, put.prompt.keys(first, stop)) if put.group.name else ()
    keep = {entry for entry in (*theres, *front, *held_by) if entry is not None}
    cache.accounts.make_room(namespace, put.how.tenant, nbytes * theres.count(None), keep)
