"""KV.SEQ.GET: the tokens of a run of pages, layer by layer, from where they lie.

A page is layer-major, so one layer of a prompt is two pieces of each of its pages: the keys, then the
values. The reply is gathered from these, without a copy where they are long, and a worker computes
the first layer while the next is on its way. All pages have to be in memory for that, from the first
byte to the last: those in files are loaded first, and a command that needs more than memory ever
holds is refused. Bytes are answered as the client takes them, like those of KV.MGET.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio

from respkv.chain import Prompt
from respkv.engine.entry import Entry
from respkv.engine.groups import Need, clip
from respkv.engine.namespaces import Group, Kind
from respkv.engine.sequences import Found
from respkv.errors import OutOfMemory
from respkv.page import DTYPE_BYTES
from respkv.server.answers import COPY_BYTES_MAX
from respkv.server.loads import Loading, is_cold
from respkv.tiers.rectangles import Rectangle, cut_heads
from respkv.tiers.slab import Slot
from respkv.wire import reply

if TYPE_CHECKING:
    from respkv.server.session import Session

STEP_BYTES: Final = 1 << 18  # are answered before it is asked whether there is room for more


@dataclass(slots=True)
class Wanted:
    """What of a prompt is asked for.

    first:     the first token. group: of layers; its name is empty for the namespace's own.
    rectangle: which part of the pages; None: all.
    parts:     of the position at its end: logits, hidden.
    seconds:   how long is waited for what is in files; None: until it is in memory.
    """

    prompt: Prompt
    first: int
    group: Group
    rectangle: Rectangle | None
    parts: list[bytes] = field(default_factory=list)
    seconds: float | None = None

    @property
    def num_items(self) -> int:
        """How many bulks follow the parts: a layer each, or one of a state."""
        if self.rectangle is not None:
            return self.rectangle.num_layers
        return 1 if self.group.geometry is None else self.group.geometry.layers


class Place(NamedTuple):
    """Where the bytes of an entry are that are sent."""

    slot: Slot
    need: Need


def send_layers(session: "Session", wanted: Wanted, found: Found) -> "Iterator[None]":
    """Answer with pages in memory, one step after the other."""
    with _answering(session, wanted, found) as places:
        yield from _steps(session, wanted, places)


async def load_and_send(session: "Session", wanted: Wanted, needed: Sequence[Entry]) -> None:
    """Load what is in files alone, then answer.

    Commands that need many pages at once come one after the other (budget.py): if each held those
    that are in memory and waited for the rest, none would get them.

    needed: all entries of the answer, as far as is known now.
    Raises OutOfMemory when memory never holds all of them.
    Cancelled: nothing is held, the answer is cut off.
    """
    if session.is_muted:
        return
    cache, server = session.cache, session.server
    assert server.mover is not None
    if wanted.seconds is None:
        _check_fits(session, needed)
    deadline = inf if wanted.seconds is None else anyio.current_time() + wanted.seconds
    place = server.budget.line_up(sum(entry.nbytes for entry in needed))
    loading, held = Loading(server.mover), list[Slot]()
    try:
        with session.until_lost():
            with anyio.move_on_at(deadline):
                await place.wait()
            if place.is_in:
                needed = entries_needed(session, wanted, server.sequences.find(wanted.prompt))
                held += (entry.slot for entry in needed if entry.slot is not None)
                for slot in held:
                    cache.borrow(slot)
                loading.add(entry for entry in needed if is_cold(entry))
                loading.seconds = deadline - anyio.current_time() if deadline < inf else None
                await loading.wait()
                if wanted.seconds is None:
                    _check_room(loading)
            server.clock.refresh()
            with _answering(session, wanted, server.sequences.find(wanted.prompt)) as places:
                # From here on the pages are held where they are sent from.
                loading.drop()
                place.leave()
                while held:
                    cache.restore(held.pop())
                for _ in _steps(session, wanted, places):
                    await session.make_room()
    finally:
        loading.drop()
        place.leave()
        for slot in held:
            cache.restore(slot)


def entries_needed(session: "Session", wanted: Wanted, found: Found) -> list[Entry]:
    """Return the entries whose bytes the answer takes."""
    entries = [need.entry for need in _needs(session, wanted, found)]
    if found.tokens == wanted.prompt.num_tokens and found.tokens:
        sequences = session.server.sequences
        parts = [sequences.find_part(wanted.prompt, what) for what in wanted.parts]
        entries += [entry for entry in parts if entry is not None]
    return entries


@contextmanager
def _answering(session: "Session", wanted: Wanted, found: Found) -> Iterator[list[Place]]:
    """Begin the answer, and hold its pages until its last byte has left."""
    cache, prompt = session.cache, wanted.prompt
    needs, matched = _in_memory(wanted, found, _needs(session, wanted, found))
    # From here on the slots count: an entry may be demoted or overwritten while it is sent.
    places = [Place(need.entry.slot, need) for need in needs if need.entry.slot is not None]
    assert len(places) == len(needs)
    slots = [place.slot for place in places]
    for slot in slots:
        cache.borrow(slot)
    try:
        num_items = 1 + len(wanted.parts) + wanted.num_items
        session.out += (reply.array_header(num_items), reply.integer(matched))
        for what in wanted.parts:
            _send_part(session, prompt, what, is_hit=matched == prompt.num_tokens)
        _count(session, needs, found, prompt)
        yield places
        session.keep_until_sent(slots)
    finally:
        for slot in slots:
            cache.restore(slot)


def _needs(session: "Session", wanted: Wanted, found: Found) -> list[Need]:
    """Return what is read, in order."""
    return clip(session.server.groups.needs(wanted.prompt, wanted.group, found), wanted.first)


def _in_memory(wanted: Wanted, found: Found, needs: list[Need]) -> tuple[list[Need], int]:
    """Return what comes before the first page that is in files alone, and how many tokens match."""
    for number, need in enumerate(needs):
        if is_cold(need.entry):
            if wanted.group.kind in (Kind.SLIDING, Kind.STATE):
                return [], 0  # a window with a hole is none
            return needs[:number], need.first_token - need.skip
    return needs, found.tokens


def _steps(session: "Session", wanted: Wanted, places: Sequence[Place]) -> Iterator[None]:
    """Append the bulks of all layers to the output, some bytes at a time."""
    shape = wanted.group.geometry
    if shape is None:
        _send_state(session, places)
        return
    rectangle = wanted.rectangle or Rectangle.of(shape, None, None)
    is_cut = not rectangle.has_all_heads(shape)
    head_bytes = shape.dim * DTYPE_BYTES[shape.dtype]
    row, planes = shape.heads * head_bytes, shape.planes
    num_tokens = sum(need.num_tokens for _, need in places)
    layer_bytes = planes * num_tokens * rectangle.num_heads * head_bytes
    ranges = [
        (
            session.cache.payload(slot),
            need.entry.nbytes // (shape.layers * planes),
            need.skip * row,
            (need.skip + need.num_tokens) * row,
        )
        for slot, need in places
    ]
    is_copied = is_cut or all(stop - first <= COPY_BYTES_MAX for _, _, first, stop in ranges)
    size, parts = 0, list[bytes | memoryview]()
    for layer in range(rectangle.first_layer, rectangle.first_layer + rectangle.num_layers):
        parts.append(reply.bulk_prefix(layer_bytes))
        for plane in range(planes * layer, planes * (layer + 1)):
            for memory, plane_bytes, first, stop in ranges:
                start = plane * plane_bytes
                part: bytes | memoryview = memory[start + first : start + stop]
                if is_cut:
                    part = cut_heads(memory[start + first : start + stop], shape, rectangle)
                parts.append(part)
                size += len(part)
                if size >= STEP_BYTES:
                    _send_parts(session, parts, size, is_copied=is_copied)
                    size, parts = 0, []
                    yield
        parts.append(reply.CRLF)
    _send_parts(session, parts, size, is_copied=is_copied)


def _send_parts(
    session: "Session", parts: Sequence[bytes | memoryview], nbytes: int, *, is_copied: bool
) -> None:
    """Answer with parts of bulks, of ``nbytes`` without their frames: as one, or from where they are."""
    if is_copied:
        session.out.append(b"".join(parts))
    else:
        session.out += parts
    session.note_sent(nbytes, in_place=not is_copied)


def _send_state(session: "Session", places: Sequence[Place]) -> None:
    """Answer with the one object that a recurrent layer has, or null."""
    if places:
        session.send_slot(places[0].slot)
    else:
        session.send_nil()


def _send_part(session: "Session", prompt: Prompt, what: bytes, *, is_hit: bool) -> None:
    entry = (
        session.server.sequences.find_part(prompt, what) if is_hit and prompt.num_tokens else None
    )
    send_entry(session, entry)


def send_entry(session: "Session", entry: Entry | None) -> None:
    """Answer with the bytes of a part that are in memory, else with null, and count it as used."""
    if entry is None or entry.slot is None:
        session.send_nil()
        return
    entry.touched = session.cache.clock.now
    entry.hits += 1
    session.send_slot(entry.slot)


def _count(session: "Session", needs: Sequence[Need], found: Found, prompt: Prompt) -> None:
    """Count the pages that are sent as used, and those that were not there as missed."""
    cache = session.cache
    now, gpu = cache.clock.now, cache.gpu
    for need in needs:
        need.entry.touched = now
        need.entry.hits += 1
        if gpu.is_on:
            gpu.read(need.entry)
    missed = max(0, -(-prompt.num_tokens // prompt.page_tokens) - len(found.entries))
    cache.stats.hits += len(needs)
    cache.stats.page_hits += len(needs)
    cache.stats.misses += missed
    cache.stats.page_misses += missed


def _check_fits(session: "Session", needed: Sequence[Entry]) -> None:
    """Raise OutOfMemory when memory never holds all entries at once."""
    nbytes, most = sum(entry.nbytes for entry in needed), session.cache.slabs.budget_bytes
    if nbytes > most:
        raise OutOfMemory(
            f"{len(needed)} pages of {nbytes} bytes together never fit memory, which takes {most}:"
            " get fewer tokens at once, with FROM and a shorter prompt, or raise maxmemory"
        )


def _check_room(loading: Loading) -> None:
    """Raise OutOfMemory if that is why a page is not in memory."""
    for error in loading.errors():
        if isinstance(error, OutOfMemory):
            raise error
