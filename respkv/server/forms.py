"""The forms in which a page is answered: as it came, as numbers of another type, or as it is stored.

``AS dtype`` converts in a worker thread. ``AS raw`` hands out an encoded page
(kernels/container.py): what a file has, checked but not decoded, so that a reader with a GPU decodes
there and the socket carries fewer bytes; of a page in memory, its bytes behind a head, uncopied.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import anyio
import anyio.to_thread

from respkv.engine.entry import Entry
from respkv.engine.namespaces import Schema
from respkv.errors import CacheError, CommandError
from respkv.kernels.container import MIXED_ID, raw_head, read_head, select_layers
from respkv.server.arguments import shown
from respkv.server.loads import is_cold
from respkv.wire import reply

if TYPE_CHECKING:
    from respkv.server.session import Session

RAW: Final = "raw"
AHEAD_MAX: Final = 8  # pages of one command that are read or converted at a time
FLOATS: Final = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")
Layers = tuple[int, int]


class _Resident(Enum):
    """What stands for a page that is in memory, and is sent from there."""

    RESIDENT = 0


RESIDENT: Final = _Resident.RESIDENT
# An answer on its way: its bytes, where it is, or that there is none.
Page: TypeAlias = bytes | memoryview | Literal[_Resident.RESIDENT] | None


@dataclass(frozen=True, slots=True)
class Form:
    """How pages are asked for.

    layers:  the first one and how many; None: all.
    seconds: how long is waited; None: until they are there.
    dtype:   of the numbers, RAW for the stored form; "": as they came.
    """

    layers: Layers | None = None
    seconds: float | None = None
    dtype: str = ""


def form_of(word: bytes) -> str:
    """Return what follows AS. Raises CommandError."""
    name = word.decode(errors="replace").lower()
    if name not in (RAW, *FLOATS):
        accepted = ", ".join((RAW, *FLOATS))
        raise CommandError(f"AS {shown(word)}: accepted are {accepted}")
    return name


def schema_of(session: "Session", entry: Entry, word: str) -> Schema:
    """Return the schema that a page fits. Raises CommandError when there is none, naming ``word``."""
    schema = session.cache.namespaces.of_key(entry.key) if entry.kind == "kvpage" else None
    if schema is None:
        raise CommandError(f"{word} needs a page whose namespace has a schema (KV.SCHEMA SET)")
    if entry.nbytes != schema.geometry.page_bytes:  # put before its namespace had this schema
        raise CommandError(f"{word} needs a page that fits the schema of its namespace")
    return schema


async def send_one(session: "Session", key: bytes, form: Form) -> None:
    """Answer with a page in a form that may need work.

    Cancelled: nothing is held.
    """
    with session.until_lost():
        _send(session, key, form, await _prepare(session, key, form))


async def send_many(session: "Session", keys: Sequence[bytes], form: Form) -> None:
    """Answer with an array of pages in a form, each sent when the one before has room.

    Those behind it are prepared meanwhile, as many as there is a share of memory for. A page that
    cannot be had in this form, or not in time, is absent.
    Cancelled: nothing is held; the answer is cut off.
    """
    deadline = None if form.seconds is None else anyio.current_time() + form.seconds
    ahead: deque[_Ahead] = deque()
    todo = deque(keys)
    try:
        with session.until_lost():
            session.out.append(reply.array_header(len(keys)))
            async with anyio.create_task_group() as tasks:
                while todo or ahead:
                    while todo and (next_one := _take_share(session, todo[0], ahead)) is not None:
                        todo.popleft()
                        ahead.append(next_one)
                        tasks.start_soon(next_one.run, form, deadline)
                    first = ahead.popleft()
                    await first.done.wait()
                    _send(session, first.key, form, first.page)
                    first.give_back()
                    await session.make_room()
    finally:
        for each in ahead:
            each.give_back()


def _take_share(session: "Session", key: bytes, ahead: "Sequence[_Ahead]") -> "_Ahead | None":
    """Return the next page to prepare; None: there is no memory for it. The first needs no share."""
    entry, budget = session.cache.find(key), session.server.budget
    share = 0 if entry is None or not ahead else entry.nbytes
    used = sum(each.share for each in ahead)
    if len(ahead) == AHEAD_MAX or used + share > budget.each_max or not budget.take(share):
        return None
    return _Ahead(session, key, share)


class _Ahead:
    """One page on its way into its form; holds a share of the memory until that is given back."""

    def __init__(self, session: "Session", key: bytes, share: int) -> None:
        self.key = key
        self.share = share
        self.page: Page = None
        self.done = anyio.Event()
        self._session = session

    async def run(self, form: Form, deadline: float | None) -> None:
        left = None if deadline is None else max(0.0, deadline - anyio.current_time())
        try:
            self.page = await _prepare(self._session, self.key, replace(form, seconds=left))
        except CacheError:
            self.page = None
        finally:
            self.done.set()

    def give_back(self) -> None:
        self._session.server.budget.give_back(self.share)
        self.share = 0


async def _prepare(session: "Session", key: bytes, form: Form) -> Page:
    """Return a page in its form; RESIDENT: it is in memory, and is sent from there as it is."""
    entry = session.cache.find(key)
    if entry is None:
        return None
    schema = schema_of(session, entry, "AS")
    page: Page = None
    with anyio.move_on_after(form.seconds):
        if form.dtype == RAW:
            page = await _stored(session, entry, schema, form.layers)
        else:
            page = await _converted(session, entry, schema, form)
    return page


def _send(session: "Session", key: bytes, form: Form, page: Page) -> None:
    """Answer with what was prepared, and count it."""
    session.server.clock.refresh()
    stats, entry = session.cache.stats, session.cache.find(key)
    if page is RESIDENT and (entry is None or is_cold(entry)):
        page = None  # it went in between, as it may before any get
    stats.page_hits += page is not None
    stats.page_misses += page is None
    stats.hits += page is not None
    stats.misses += page is None
    if page is None:
        session.send_nil()
        return
    if entry is not None:
        entry.touched = session.cache.clock.now
        entry.hits += 1
    if page is not RESIDENT:
        stats.bytes_out += len(page)
        session.send_value(page)
        return
    assert entry is not None
    assert entry.slot is not None
    schema = schema_of(session, entry, "AS")
    head, start, stop = _head_of(schema, form.layers)
    session.send_slot(entry.slot, start, stop, head=head)


async def _stored(session: "Session", entry: Entry, schema: Schema, layers: Layers | None) -> Page:
    """Return an encoded page: from a file as it is there, else from memory."""
    mover = session.server.mover
    _head_of(schema, layers)  # raises before anything is read
    if mover is not None and is_cold(entry):
        if any(record.codec >= MIXED_ID for record in entry.records):
            found = await mover.read_stored(entry)
            if found is not None and found[0] >= MIXED_ID:
                return _some_layers(found[1], layers)
        return await _from_memory(session, entry, partial(_with_head, schema, layers))
    return RESIDENT


def _some_layers(encoded: bytes | memoryview, layers: Layers | None) -> bytes | memoryview:
    if layers is None:
        return encoded
    view = memoryview(encoded)
    head, start, stop = select_layers(read_head(view), *layers)
    return b"".join((head, view[start:stop]))


def _with_head(schema: Schema, layers: Layers | None, payload: memoryview) -> bytes:
    head, start, stop = _head_of(schema, layers)
    return b"".join((head, payload[start:stop]))


def _head_of(schema: Schema, layers: Layers | None) -> tuple[bytes, int, int]:
    """Return the head of a raw page, and the range of its bytes. Raises CommandError."""
    shape = schema.geometry
    if layers is None:
        return raw_head(shape), 0, shape.page_bytes
    start, stop = layer_range(schema, *layers)
    return raw_head(replace(shape, layers=layers[1])), start, stop


def layer_range(schema: Schema, first: int, count: int) -> tuple[int, int]:
    """Return the byte range of some layers of a page. Raises CommandError when there is none."""
    try:
        return schema.geometry.layer_range(first, count)
    except ValueError as error:
        raise CommandError(str(error)) from None


async def _converted(session: "Session", entry: Entry, schema: Schema, form: Form) -> Page:
    """Return the numbers of a page, or of some layers, as another type."""
    source, target = schema.geometry.dtype, form.dtype
    if source not in FLOATS:
        raise CommandError(f"AS {target}: pages of {source} are codes, not numbers to convert")
    _, start, stop = _head_of(schema, form.layers)
    # It needs numpy, which a server whose clients never ask for it is spared.
    from respkv.kernels.dtypes import convert

    def work(payload: memoryview) -> memoryview:
        return convert(payload[start:stop], source, target)

    return await _from_memory(session, entry, work)


async def _from_memory(
    session: "Session", entry: Entry, work: Callable[[memoryview], bytes | memoryview]
) -> Page:
    """Bring a page into memory if it is not there, and return what a thread makes of its bytes."""
    cache, mover = session.cache, session.server.mover
    load = mover.start_load(entry) if mover is not None and is_cold(entry) else None
    try:
        if load is not None:
            await load.wait()
            if load.error is not None and is_cold(entry):
                raise load.error
        slot = entry.slot
        if slot is None:
            return None if entry.value is None else work(memoryview(entry.value))
        cache.borrow(slot)
        try:
            threads = session.server.form_threads
            return await anyio.to_thread.run_sync(work, cache.payload(slot), limiter=threads)
        finally:
            cache.restore(slot)
    finally:
        if load is not None and mover is not None:
            mover.release(load)
