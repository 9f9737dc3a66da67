"""Pages that are put together: rectangles come from several workers, a page is seen once it is whole.

An assembly is a slot for the whole page and a mask of what has come, a bit for each head of each
layer. All connections share them, by the key of the page, so it does not matter who sends what, in
which order, or twice; what one worker sent stays when its connection breaks. Nobody can read what is
not whole. A whole page is published when the page in front of it is there, so a chain has no hole.

Their bytes are bounded, and one that nothing was added to for a while is dropped: a worker that
failed would leave its part in memory for good. The copying is done by the caller, step by step
between other commands (tiers/rectangles.py), so a step looks first whether the assembly still
``needs`` it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.landing import Landing
from respkv.engine.namespaces import TAG_BYTES, tag_of
from respkv.engine.watch import Watcher
from respkv.errors import CacheError, OutOfMemory
from respkv.page import Geometry, namespace_of
from respkv.tiers.rectangles import all_cells

HASH_BYTES = 1 << 20  # no more is hashed at a time

Pin = Callable[[Entry, int], None]


class Assembly:
    """One page on its way.

    parent_key: of the page in front of it; empty: there is none.
    shape:      of the page, with the tokens that it has.
    how:        how it is to be kept: as the last part said, at the highest level that one did.
    pin_ms:     for how long it is to be pinned once it is there.
    failure:    why it, its pin or a part of it could not be had once it was whole.
    is_open:    it was neither published nor dropped.
    is_news:    it was published, perhaps by another put, and none of those who put it said so yet.
    is_ready:   it is whole and hashed.
    """

    __slots__ = (
        "_missing",
        "failure",
        "how",
        "identity",
        "is_news",
        "is_open",
        "is_ready",
        "key",
        "landing",
        "parent_key",
        "parts",
        "pin_ms",
        "shape",
        "touched",
    )

    def __init__(
        self, key: bytes, parent_key: bytes, shape: Geometry, landing: Landing, how: Put
    ) -> None:
        self.key = key
        self.parent_key = parent_key
        self.shape = shape
        self.landing = landing
        self.how = how
        self.pin_ms = 0
        self.failure: CacheError | None = None
        self.identity: object = None
        self.parts: list[tuple[bytes, Landing, Put]] = []
        self.touched = 0.0
        self.is_open = True
        self.is_news = self.is_ready = False
        self._missing = all_cells(shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds in memory."""
        return self.landing.nbytes + sum(part.nbytes for _, part, _ in self.parts)

    @property
    def is_whole(self) -> bool:
        """Whether all of the page has come."""
        return not self._missing

    def needs(self, cells: int) -> bool:
        """Whether some of these cells have still to be written."""
        return self.is_open and bool(self._missing & cells)

    def cover(self, cells: int) -> None:
        """Note that these cells have been written."""
        self._missing &= ~cells

    def hash_steps(self) -> Iterator[None]:
        """Hash the whole page, a part at a time; it is ready afterwards."""
        assert self.is_whole
        landing = self.landing
        while self.is_open and landing.filled < landing.nbytes:
            landing.advance(landing.memory[landing.filled : landing.filled + HASH_BYTES])
            yield
        self.is_ready = self.is_open


class Assemblies(Watcher):
    """All pages that are put together.

    bytes_max: that they may hold together. timeout_s: from one part to the next.
    """

    def __init__(self, cache: Cache, *, bytes_max: int = 0, timeout_s: float = 60.0) -> None:
        self.bytes_max = bytes_max
        self.timeout_s = timeout_s
        self.nbytes = 0
        self.num_dropped = 0
        self._cache = cache
        self._open: dict[bytes, Assembly] = {}
        self._ready: dict[Assembly, None] = {}  # whole ones, in the order in which they became so
        cache.watchers.add(self)

    def __len__(self) -> int:
        return len(self._open)

    def find(self, key: bytes) -> Assembly | None:
        """Return the assembly of a page, or None."""
        return self._open.get(key)

    def begin(
        self, key: bytes, parent_key: bytes, shape: Geometry, how: Put, identity: object
    ) -> Assembly:
        """Return the assembly of a page, a new one if there is none.

        shape:    of the page. identity: of the schema; one that was begun under another is dropped.
        Raises OutOfMemory when there is no slot, or no more may be begun, now; it is not counted.
        """
        now = self._cache.clock.now
        found = self._open.get(key)
        if found is not None and (found.identity, found.shape) != (identity, shape):
            self.drop(found)
            found = None
        if found is None:
            found = Assembly(key, parent_key, shape, self._reserve(shape.page_bytes), how)
            found.identity = identity
            self._open[key] = found
            self.nbytes += found.nbytes
        elif found.how.level is not None and (how.level is None or how.level < found.how.level):
            found.how = replace(how, level=found.how.level)
        else:
            found.how = how
        found.touched = now
        return found

    def add_part(self, assembly: Assembly, key: bytes, payload: bytes | Landing, how: Put) -> None:
        """Have something stored with a page, once that is published. Raises OutOfMemory.

        payload: bytes, or a full landing, which is the assembly's then.
        """
        if not assembly.is_open or any(known == key for known, _, _ in assembly.parts):
            return
        if isinstance(payload, Landing):
            landing = payload
        else:
            landing = self._reserve(len(payload))
            landing.write(payload)
        assembly.parts.append((key, landing, how))
        self.nbytes += landing.nbytes

    def end(self, assembly: Assembly) -> None:
        """Note that a whole page was hashed: it may be published."""
        if assembly.is_ready:
            self._ready[assembly] = None

    def publish(self, pin: Pin | None = None) -> list[Entry]:
        """Make all pages visible that are ready and whose page in front is there; return them.

        A page that its owner may not keep is dropped, and ``failure`` says so to all who put it.

        pin: pins a page for so many milliseconds, or raises PinRefused; the page stays then. None:
             no page is pinned.
        """
        published: list[Entry] = []
        again = True
        while again:
            again = False
            for assembly in list(self._ready):
                if assembly.parent_key and not self._has_parent(assembly):
                    continue
                entry = self._publish(assembly, pin)
                if entry is not None:
                    published.append(entry)
                    again = bool(self._ready)
        return published

    def expire(self) -> None:
        """Drop those that nothing was added to for too long."""
        before = self._cache.clock.now - self.timeout_s
        for assembly in [each for each in self._open.values() if each.touched < before]:
            self.drop(assembly)

    def drop(self, assembly: Assembly) -> None:
        """Give up on a page; what came of it is forgotten."""
        if assembly.is_open:
            self.num_dropped += 1
            self._close(assembly)

    def drop_namespace(self, namespace: bytes) -> None:
        """Give up on all pages of a namespace."""
        for assembly in [
            each for each in self._open.values() if namespace_of(each.key) == namespace
        ]:
            self.drop(assembly)

    def cleared(self) -> None:
        """Give up on all: what was put before a flush is not to be seen after it."""
        for assembly in list(self._open.values()):
            self.drop(assembly)

    def check(self) -> None:
        """Assert that the bytes are those of the assemblies."""
        assert self.nbytes == sum(each.nbytes for each in self._open.values())
        assert all(each.is_open and each.is_ready for each in self._ready)

    # -- inside -------------------------------------------------------------------------------

    def _reserve(self, nbytes: int) -> Landing:
        if self.nbytes + nbytes > self.bytes_max:
            self.expire()
        if self.nbytes + nbytes > self.bytes_max:
            raise OutOfMemory(
                f"{len(self._open)} pages of {self.nbytes} bytes wait for the rest of their layers"
                f" and heads, and {nbytes} more are over assembly-memory, {self.bytes_max}"
            )
        return self._cache.reserve(nbytes, is_last=False)

    def _has_parent(self, assembly: Assembly) -> bool:
        """Whether the page in front is there, under the schema that is in force."""
        parent = self._cache.find(assembly.parent_key)
        if parent is None or parent.kind != "kvpage":
            return False
        schema = self._cache.namespaces.of_key(assembly.key)
        return parent.branch[:TAG_BYTES] == tag_of(schema)

    def _publish(self, assembly: Assembly, pin: Pin | None) -> Entry | None:
        cache, key = self._cache, assembly.key
        there = cache.has_page(key, assembly.landing.nbytes)
        try:
            if there is not None:
                cache.describe(there, assembly.how)
                cache.stats.pages_skipped += 1
            else:
                there = cache.commit(key, assembly.landing, assembly.how)
                cache.stats.pages_put += 1
                assembly.is_news = True
            if pin is not None and assembly.pin_ms:
                assembly.failure = _failure(pin, there, assembly.pin_ms)
            for part_key, landing, how in assembly.parts:
                if cache.has_page(part_key, landing.nbytes) is None:
                    cache.commit(part_key, landing, how)
        except CacheError as error:
            assembly.failure = error
            self.num_dropped += there is None
        finally:
            self._close(assembly)
        return there

    def _close(self, assembly: Assembly) -> None:
        self.nbytes -= assembly.nbytes
        assembly.is_open = assembly.is_ready = False
        del self._open[assembly.key]
        self._ready.pop(assembly, None)
        for landing in (assembly.landing, *(part for _, part, _ in assembly.parts)):
            self._cache.abandon(landing)  # harmless for one that was committed


def _failure(pin: Pin, entry: Entry, ms: int) -> CacheError | None:
    try:
        pin(entry, ms)
    except CacheError as error:
        return error
    return None
