"""The forms in which a page is answered: as it came, as numbers of another type, or as it is stored.

``AS dtype`` converts in a worker thread. ``AS raw`` hands out an encoded page
(kernels/container.py): what a file has, checked but not decoded, so that a reader with a GPU decodes
there and the socket carries fewer bytes; of a page in memory, its bytes behind a head, uncopied.

What a page is may change whenever something is waited for, so it is looked up again after that, and
its form is made from the schema that it has then.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import anyio
import anyio.to_thread

from respkv.engine.entry import Entry
from respkv.engine.namespaces import shape_of
from respkv.errors import CacheError, CommandError
from respkv.kernels.container import MIXED_ID, raw_head, read_head, select_layers
from respkv.page import DTYPE_BYTES, Geometry, Latents
from respkv.server.arguments import shown
from respkv.server.loads import is_cold
from respkv.tiers.slab import Slot
from respkv.wire import reply

if TYPE_CHECKING:
    from respkv.server.session import Session

RAW: Final = "raw"
AHEAD_MAX: Final = 8  # pages of one command that are read or converted at a time
FLOATS: Final = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")
Layers = tuple[int, int]


class Held(NamedTuple):
    """A page in memory, borrowed until it is sent from there: a range of its bytes behind a head."""

    slot: Slot
    head: bytes
    start: int
    stop: int


# An answer on its way: its bytes, where it is, or that there is none.
Page: TypeAlias = bytes | memoryview | Held | None


@dataclass(frozen=True, slots=True)
class Form:
    """How pages are asked for.

    layers:  the first one and how many; None: all.
    seconds: how long is waited for what is in files alone; None: until it is in memory.
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


def shape_for(session: "Session", entry: Entry, word: str) -> Geometry:
    """Return the shape of a page or tail, or of the page of a group.

    Raises CommandError when it has none, naming ``word``.
    """
    schema = session.cache.namespaces.of_key(entry.key) if entry.kind == "kvpage" else None
    if schema is None:
        raise CommandError(f"{word} needs a page whose namespace has a schema (KV.SCHEMA SET)")
    shape = shape_of(schema, entry.key, entry.nbytes, entry.tokens)
    if shape is None:  # put before its namespace had this schema, or a state, or logits
        raise CommandError(f"{word} needs a page that fits the schema of its namespace")
    return shape


async def send_one(session: "Session", key: bytes, form: Form) -> None:
    """Answer with a page in a form that may need work.

    Cancelled: nothing is held.
    """
    if session.is_muted:
        return
    with session.until_lost():
        _send(session, key, await _prepare(session, key, form))


async def send_many(session: "Session", keys: Sequence[bytes], form: Form) -> None:
    """Answer with an array of pages in a form, each sent when the one before has room.

    Those behind it are prepared meanwhile, as many as there is a share of memory for. A page that
    cannot be read, or not in time, or that has changed meanwhile, is absent.
    Raises CommandError, and nothing is answered, when a page cannot have this form.
    Cancelled: nothing is held; the answer is cut off.
    """
    if session.is_muted:
        return
    for entry in map(session.cache.find, keys):
        if entry is not None:
            _shape_of(session, entry, form)
    deadline = None if form.seconds is None else anyio.current_time() + form.seconds
    ahead: deque[_Ahead] = deque()
    todo = deque(keys)
    try:
        with session.until_lost():
            session.out.append(reply.array_header(len(keys)))
            async with anyio.create_task_group() as tasks:
                while todo or ahead:
                    while todo and (each := _take_share(session, todo[0], form, ahead)) is not None:
                        todo.popleft()
                        ahead.append(each)
                        tasks.start_soon(each.run, form, deadline)
                    await ahead[0].wait()
                    first = ahead.popleft()
                    _send(session, first.key, first.take())
                    first.give_back()
                    await session.make_room()
    finally:
        for each in ahead:
            each.give_back()


def _take_share(
    session: "Session", key: bytes, form: Form, ahead: "Sequence[_Ahead]"
) -> "_Ahead | None":
    """Return the next page to prepare; None: there is no memory for it. The first needs no share."""
    entry, budget = session.cache.find(key), session.server.budget
    share = 0 if entry is None or not ahead else _bytes_needed(session, entry, form)
    used = sum(each.share for each in ahead)
    if len(ahead) == AHEAD_MAX or used + share > budget.each_max or not budget.take(share):
        return None
    return _Ahead(session, key, share)


def _bytes_needed(session: "Session", entry: Entry, form: Form) -> int:
    """Return how much memory a page takes until it is sent: in the arena, or as it is made."""
    schema = session.cache.namespaces.of_key(entry.key)
    shape = None if schema is None else shape_of(schema, entry.key, entry.nbytes, entry.tokens)
    if shape is None or form.dtype == RAW:
        return entry.nbytes
    source, target = DTYPE_BYTES[shape.dtype], DTYPE_BYTES[form.dtype]
    return max(entry.nbytes, entry.nbytes // source * target)


class _Ahead:
    """One page on its way into its form; holds a share of the memory until that is given back."""

    def __init__(self, session: "Session", key: bytes, share: int) -> None:
        self.key = key
        self.share = share
        self._session = session
        self._page: Page = None
        self._done = anyio.Event()

    async def run(self, form: Form, deadline: float | None) -> None:
        left = None if deadline is None else max(0.0, deadline - anyio.current_time())
        try:
            self._page = await _prepare(self._session, self.key, replace(form, seconds=left))
        except CacheError:
            self._page = None
        finally:
            self._done.set()

    async def wait(self) -> None:
        if not self._done.is_set():
            self._session.wire.wake()  # what is there may leave meanwhile
            await self._done.wait()

    def take(self) -> Page:
        page, self._page = self._page, None
        return page

    def give_back(self) -> None:
        page = self.take()
        if isinstance(page, Held):
            self._session.cache.restore(page.slot)
        self._session.server.budget.give_back(self.share)
        self.share = 0


def _send(session: "Session", key: bytes, page: Page) -> None:
    """Answer with what was prepared, and count it."""
    session.server.clock.refresh()
    cache = session.cache
    stats, entry = cache.stats, cache.find(key)
    stats.page_hits += page is not None
    stats.page_misses += page is None
    stats.hits += page is not None
    stats.misses += page is None
    if page is None:
        session.send_nil()
        return
    if entry is not None:
        entry.touched = cache.clock.now
        entry.hits += 1
        if cache.gpu.is_on:
            cache.gpu.read(entry)
    if isinstance(page, Held):
        session.send_slot(page.slot, page.start, page.stop, head=page.head)
        cache.restore(page.slot)
    else:
        stats.bytes_out += len(page)
        session.send_value(page)


async def _prepare(session: "Session", key: bytes, form: Form) -> Page:
    """Return a page in its form.

    Raises CommandError when it cannot have that, TierError when it cannot be read.
    """
    entry = session.cache.find(key)
    if entry is None:
        return None
    shape, mover = _shape_of(session, entry, form), session.server.mover
    if mover is None or not is_cold(entry):
        return await _from_memory(session, key, form)
    if form.seconds == 0:
        mover.advise_prefetch([entry])
        return None
    load = None
    try:
        with anyio.move_on_after(form.seconds) as scope:
            if form.dtype == RAW and any(each.codec >= MIXED_ID for each in entry.records):
                stored = await mover.read_stored(entry)
                if stored is not None and stored[0] >= MIXED_ID:
                    return _some_layers(stored[1], shape, form.layers)
            load = mover.start_load(entry)
            await load.wait()
        if scope.cancelled_caught:
            mover.advise_prefetch([entry])  # it stays for whoever asks next
        elif load is not None and load.error is not None and is_cold(entry):
            raise load.error
        return await _from_memory(session, key, form)
    finally:
        if load is not None:
            mover.release(load)


def _some_layers(
    encoded: bytes | memoryview, shape: Geometry, layers: Layers | None
) -> bytes | memoryview:
    head, view = read_head(encoded), memoryview(encoded)
    if head.geometry != _encoded_shape(shape):
        raise CommandError("AS raw needs a page that was stored in the shape of its namespace")
    if layers is None:
        return encoded
    front, start, stop = select_layers(head, *layers)
    return b"".join((front, view[start:stop]))


async def _from_memory(session: "Session", key: bytes, form: Form) -> Page:
    """Return what is made of a page in memory, and None when it is not there."""
    cache = session.cache
    entry = cache.find(key)
    if entry is None or (slot := entry.slot) is None:
        return None
    shape = _shape_of(session, entry, form)
    source, target = shape.dtype, form.dtype
    start, stop = (0, entry.nbytes) if form.layers is None else layer_range(shape, *form.layers)
    head = _head_of(shape, form.layers) if target == RAW else b""
    cache.borrow(slot)
    if target in (RAW, source):
        return Held(slot, head, start, stop)
    try:
        work = cache.payload(slot)[start:stop], source, target
        threads = session.server.form_threads
        return await anyio.to_thread.run_sync(_convert, *work, limiter=threads)
    finally:
        cache.restore(slot)


def _convert(numbers: memoryview, source: str, target: str) -> memoryview:
    # It needs numpy, which a server whose clients never ask for it is spared.
    from respkv.kernels import dtypes

    return dtypes.convert(numbers, source, target)


def _shape_of(session: "Session", entry: Entry, form: Form) -> Geometry:
    """Return the shape of a page. Raises CommandError unless the page can have a form."""
    shape = shape_for(session, entry, "AS")
    if form.dtype == RAW:
        _encoded_shape(shape)
    elif shape.dtype not in FLOATS:
        raise CommandError(
            f"AS {form.dtype}: pages of {shape.dtype} are codes, not numbers to convert"
        )
    if form.layers is not None:
        layer_range(shape, *form.layers)
    return shape


def _encoded_shape(shape: Geometry) -> Geometry:
    """Return the shape that the head of an encoded page names. Raises CommandError."""
    halves = shape.halves if isinstance(shape, Latents) else shape
    if halves is None:
        raise CommandError(f"AS raw: latents of odd dim {shape.dim} have no encoded form")
    return halves


def _head_of(shape: Geometry, layers: Layers | None) -> bytes:
    """Return the head of a raw page, or of some of its layers. Raises CommandError."""
    shape = _encoded_shape(shape)
    return raw_head(shape if layers is None else replace(shape, layers=layers[1]))


def layer_range(shape: Geometry, first: int, count: int) -> tuple[int, int]:
    """Return the byte range of some layers of a page. Raises CommandError when there is none."""
    try:
        return shape.layer_range(first, count)
    except ValueError as error:
        raise CommandError(str(error)) from None
