"""Which entries there are, and where their bytes are: how they come, move and go.

An entry's bytes leave memory in two ways. A clean one is demoted: it stays in the index and its copy
in a file is found. A dirty one is lost with its key. So only losing has to care for the pages that
stand behind it, and for the parts that go with it (nodes.py).
"""

from collections.abc import Callable, Sequence
from itertools import chain, islice

from respkv.engine.accounts import Accounts
from respkv.engine.clock import Clock
from respkv.engine.copies import Copies
from respkv.engine.entry import Entry, Kind
from respkv.engine.gpu_copies import GpuCopies
from respkv.engine.history import History, Reason
from respkv.engine.index import Index
from respkv.engine.landing import Landing
from respkv.engine.memory import Memory
from respkv.engine.namespaces import Namespaces, Schema
from respkv.engine.nodes import descendants, page_of, with_descendants
from respkv.engine.pins import Pins
from respkv.engine.requests import Requests
from respkv.engine.room import Room, small_cost
from respkv.engine.stats import Stats
from respkv.engine.watch import Watchers
from respkv.errors import OutOfMemory
from respkv.tiers.format import Header, hash64, read_header, write_header
from respkv.tiers.record import Level, Record
from respkv.tiers.slab import SlabAllocator, Slot

RAW = 0  # the codec of bytes as they came
RELATIVES_MAX = 256  # pages behind one that are looked at before they are lost with it
COLD_LOOKS = 64  # entries among which the one used longest ago is forgotten


class Residents(Memory):
    """The index, the room in memory, and the copies beyond it.

    has_files: whether there are file tiers; without them ``copies`` is not asked.
    on_match:  called with the pages of each match while some pages are in files alone.
    """

    def __init__(
        self, arena: memoryview, slabs: SlabAllocator, *, policy: str, small_max: int, clock: Clock
    ) -> None:
        super().__init__(arena, slabs)
        self.clock = clock
        self.index = Index()
        self.entries = self.index.entries  # the hot path looks a key up without a call
        self.namespaces = Namespaces()
        self.history = History()
        self.stats = Stats()
        self.copies = Copies(clock)
        self.gpu = GpuCopies(clock, self.namespaces)
        self.requests = Requests(clock)
        self.room = Room(slabs, policy, small_max=small_max, clock=clock, copies=self.copies)
        self.room.survival = self.requests.survival
        self.room.evict, self.room.lose = self._evict, self._lose
        self.copies.lose, self.copies.requeue = self._lose_copy, self.room.insert
        self.copies.on_room = lambda: self.on_room()
        self.watchers = Watchers()
        self.watchers.add(self.requests)
        self.accounts, self.pins = Accounts(clock, self.entries), Pins(clock)
        self.accounts.is_held, self.accounts.lose = self.room.is_any_held, self._lose_to_quota
        self.watchers.add(self.accounts)
        self.watchers.add(self.pins)
        self.has_files = False
        self.on_match: Callable[[Sequence[Entry]], None] = lambda run: None
        self._cold_hand = 0

    @property
    def num_cold(self) -> int:
        """How many entries have to be loaded before they can be read."""
        return self.copies.num_cold

    def expire_due(self, count_max: int) -> int:
        """Remove up to ``count_max`` entries whose TTL has ended; return how many there were."""
        count = 0
        # One by one: an entry may have several tickets, and the rest are void once it has gone.
        for entry in self.index.due(self.clock.wall_ms, count_max):
            self._expire(entry)
            count += 1
        return count

    def renew(self, entry: Entry) -> None:
        """Give a value in a slot a new generation: logs were told to forget the one it has."""
        assert entry.slot is not None
        schema = self.namespaces.of_key(entry.key) if entry.kind == "kvpage" else None
        checksum = read_header(self.header(entry.slot)).checksum
        entry.generation = self.slabs.next_generation()
        self._write_header(entry.slot, entry.key, schema, entry.generation, checksum)

    def raise_entry(self, entry: Entry, landing: Landing, record: Record) -> None:
        """Put a cold entry back into memory: the bytes of a copy fill a landing."""
        assert entry.is_cold
        slot = landing.slot
        self._close(landing)
        schema = self.namespaces.of_key(entry.key) if entry.kind == "kvpage" else None
        self._write_header(slot, entry.key, schema, record.generation, record.checksum)
        self.copies.raised(entry)
        entry.slot, slot.owner = slot, entry
        self.room.insert(entry)
        if self.gpu.is_on:
            self.gpu.raised(entry)
        if entry.kind == "kvpage" and self.watchers:
            self.watchers.raised(entry)

    def raise_small(self, entry: Entry, value: bytes) -> bool:
        """Put a cold small value back onto the heap; False if it went while room was made."""
        assert entry.is_cold
        cost = small_cost(entry.key, entry.nbytes)
        self.room.take_small(cost)
        if entry.position < 0 or not entry.is_cold:
            self.room.give_back_small(cost)
            return False
        self.copies.raised(entry)
        entry.value = value
        self.room.insert(entry)
        return True

    def overwrite_small(self, keys: Sequence[bytes], values: Sequence[bytes]) -> int:
        """Replace small values by others of the same size, up to the first that needs more than that.

        Returns how many were replaced, each as by ``put_small``.
        """
        if self.has_files:
            return 0
        now, count, nbytes = self.clock.now, 0, 0
        for entry, value in zip(map(self.entries.get, keys), values, strict=True):
            if (
                entry is None
                or entry.value is None
                or entry.nbytes != len(value)
                or entry.expires_ms
                or entry.priority
            ):
                break
            entry.value = value
            entry.touched = now
            nbytes += len(value)
            count += 1
        self.stats.bytes_in += nbytes
        return count

    def demote(self, entry: Entry) -> None:
        """Drop a clean entry's bytes from memory; those who are reading them go on."""
        assert entry.records
        self.room.remove(entry)
        self._let_go(entry)
        self.copies.demoted(entry)
        if entry.kind == "kvpage" and self.watchers:
            self.watchers.demoted(entry)
        if self.copies.num_cold > self.copies.cold_max:
            self.forget_cold()

    def forget_cold(self) -> None:
        """Remove the cold leaf used longest ago among some, so that the index stays bounded."""
        coldest: Entry | None = None
        for _ in range(COLD_LOOKS):
            self._cold_hand += 1
            entry = self.index.at(self._cold_hand)
            if entry is None:
                continue
            entry = page_of(entry)
            while entry.children:
                entry = min(entry.children, key=_touched)  # who stands behind it goes first
            if not self._may_be_forgotten(entry):
                continue
            if coldest is None or entry.touched < coldest.touched:
                coldest = entry
        if coldest is not None:
            self._lose_all(coldest)

    # -- inside -------------------------------------------------------------------------------

    def _may_be_forgotten(self, leaf: Entry) -> bool:
        is_any_cold = leaf.is_cold or any(part.is_cold for part in leaf.parts or ())
        return is_any_cold and not self.room.is_any_held(leaf)

    def _take(self, nbytes: int, *, may_lose: bool = True, is_last: bool = True) -> Slot:
        try:
            return self.room.take(nbytes, may_lose=may_lose)
        except OutOfMemory:
            self.stats.oom += is_last
            raise

    def _make_small(self, key: bytes, nbytes: int, level: Level) -> Entry:
        """Return the entry of a key with room on the heap for a value of another size."""
        self.room.take_small(small_cost(key, nbytes))
        entry = self.entries.get(key)  # not before: making room may have evicted it
        if entry is not None:
            self._replace(entry, "string", nbytes, None, level)
            return entry
        entry = Entry(key, "string", nbytes, self.clock.now)
        self.index.insert(entry)
        self.room.insert(entry)
        return entry

    def _replace(
        self, entry: Entry, kind: Kind, nbytes: int, slot: Slot | None, level: Level
    ) -> None:
        is_cold = entry.is_cold
        if entry.kind == "kvpage" != kind and self.watchers:
            self.watchers.removed(entry, "deleted")
        self.accounts.uncount(entry)
        if kind == "string":
            if entry.parts:
                self._remove_parts(entry, "deleted")
            self._unlink(entry)
            entry.branch = entry.token_ids = b""
        if self.gpu.is_on:
            self.gpu.drop(entry)
        if self.has_files:
            self.copies.replaced(entry, level, by_string=kind == "string")
        if not is_cold:
            self.room.remove(entry)
            self._let_go(entry)
        entry.kind, entry.nbytes, entry.slot, entry.value = kind, nbytes, slot, None
        if slot is not None:
            slot.owner = entry
        entry.touched = self.clock.now
        self.room.insert(entry)
        if entry.pinned_until:
            self.pins.note(entry)

    def _write_header(
        self, slot: Slot, key: bytes, schema: Schema | None, generation: int, checksum: int
    ) -> None:
        header = Header(
            codec=RAW,
            flags=0,
            namespace=0 if schema is None else schema.fingerprint_hash,
            key_hash=hash64(key),
            generation=generation,
            payload_bytes=slot.payload_bytes,
            checksum=checksum,
        )
        write_header(self.header(slot), header)

    def _let_go(self, entry: Entry) -> None:
        if entry.slot is None:
            entry.value = None
            self.room.give_back_small(small_cost(entry.key, entry.nbytes))
        else:
            slot, entry.slot = entry.slot, None
            slot.owner = None
            self._give_back(slot)

    def _remove(self, entry: Entry, reason: Reason) -> None:
        if entry.parts:
            self._remove_parts(entry, reason)
        is_cold = entry.is_cold
        if entry.kind == "kvpage" and self.watchers:
            self.watchers.removed(entry, reason)
        elif entry.pinned_until:
            self.pins.removed(entry, reason)
        if not is_cold:
            self.room.remove(entry)
        leaf = self.index.remove(entry)
        if self.gpu.is_on:
            self.gpu.drop(entry)
        if self.has_files:
            self.copies.removed(entry, reason)
        if not is_cold:
            self._let_go(entry)
        if leaf is not None:
            self._requeue_leaf(leaf)
        self.history.note(entry.key, reason)

    def _remove_parts(self, entry: Entry, reason: Reason) -> None:
        for part in tuple(entry.parts or ()):
            self._remove(part, reason)

    def _unlink(self, entry: Entry) -> None:
        """Take a page out of its chain: it becomes a string, and its page is free to go again."""
        leaf = self.index.link(entry, b"")
        entry.part = None
        if leaf is not None:
            self._requeue_leaf(leaf)

    def _requeue_leaf(self, leaf: Entry) -> None:
        """Queue a page that has become a leaf, and the parts that had to wait for that."""
        for each in leaf, *(leaf.parts or ()):
            if not each.is_cold:
                self.room.insert(each)

    def _evict(self, entry: Entry) -> None:
        """Take an entry's bytes out of memory: with its key, unless there is a copy in a file."""
        if entry.records:
            self.stats.demoted += 1
            self.demote(entry)
        else:
            self._lose_all(page_of(entry) if entry.part else entry)

    def _lose_all(self, page: Entry) -> None:
        """Lose a page and its parts."""
        if page.parts:
            for part in tuple(page.parts):
                self._lose(part)
        self._lose(page)

    def _lose(self, entry: Entry) -> None:
        self.stats.evicted += 1
        self.stats.evicted_bytes += entry.nbytes
        if self.has_files:
            self.stats.evicted_dirty += self.copies.spares(entry)
            self.copies.admission.lost(entry)
        self._remove(entry, "evicted")

    def _lose_to_quota(self, entry: Entry) -> None:
        self.stats.evicted += 1
        self.stats.evicted_bytes += entry.nbytes
        self._remove(entry, "quota")

    def _lose_copy(self, entry: Entry, reason: Reason) -> None:
        """Remove a cold entry whose last copy went, and never leave a hole when there was a choice."""
        page = page_of(entry)
        others = chain((page,), descendants(page))
        behind = islice((each for each in others if each is not entry), RELATIVES_MAX)
        if reason != "evicted" or any(each.level or self.room.is_held(each) for each in behind):
            self._remove(entry, reason)  # it may come again; who stands behind it cannot
            return
        for doomed in reversed(with_descendants(page)):
            self._lose(doomed)

    def _expire(self, entry: Entry) -> None:
        self.stats.expired += 1
        self._remove(entry, "expired")


def _touched(entry: Entry) -> float:
    return entry.touched
