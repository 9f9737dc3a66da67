"""The cache: keys to bytes in one arena, every method synchronous.

A hit in memory is served by these short functions, without a mailbox and without an await: measured,
a mailbox round trip costs 3 to 11 us and a whole Redis command has to take about 10. One event loop
makes each call atomic, so there is no lock and no half-changed state to see.

A put is two steps with the filling in between: ``reserve`` finds a slot (evicting for it), the
caller fills ``landing.memory``, ``commit`` writes header and checksum and makes the key visible in
one step; ``abandon`` gives the slot back, and nobody ever saw the value. Slots are counted: the
index holds one count, and so does each reader, so an overwritten, deleted or evicted value stays
where it is until its last reader is done.
"""

from collections.abc import Callable

from respkv.engine.clock import Clock
from respkv.engine.entry import PLAIN, SMALL_BYTES_MAX, Entry, Kind, Put
from respkv.engine.history import History, Reason
from respkv.engine.index import Index
from respkv.engine.integrity import check_holders
from respkv.engine.landing import Landing
from respkv.engine.leases import Lease, LeaseTable, Mode
from respkv.engine.namespaces import Namespaces, Schema
from respkv.engine.prefix import longest_run
from respkv.engine.room import Room, small_cost
from respkv.engine.stats import Stats
from respkv.errors import CommandError, OutOfMemory
from respkv.page import KEY_BYTES_MAX, PAGE_ID_BYTES
from respkv.tiers.format import HEADER_BYTES, Header, hash64, write_header
from respkv.tiers.slab import SlabAllocator, Slot

RAW = 0  # the codec of bytes as they came
FLUSHED_NOTED_MAX = 10_000  # a flush must not stall the loop with explanations
PAGE_ID_DIGITS = 2 * PAGE_ID_BYTES


class Cache:
    """Everything that is resident, and who reads or writes it.

    arena:      the memory of the CPU tier; ``slabs`` says what is where in it.
    on_room:    called when bytes that were in use come free, for those who wait for room.
    """

    def __init__(
        self, arena: memoryview, slabs: SlabAllocator, *, policy: str, small_max: int, clock: Clock
    ) -> None:
        self.arena = arena
        self.slabs = slabs
        self.clock = clock
        self.index = Index()
        self.entries = self.index.entries  # the hot path looks a key up without a call
        self.room = Room(slabs, policy, small_max=small_max, clock=clock, evict=self._evict)
        self.leases = LeaseTable(self._give_back)
        self.namespaces = Namespaces()
        self.history = History()
        self.stats = Stats()
        self.on_room: Callable[[], None] = lambda: None
        self._landings: set[Landing] = set()
        self._borrowed: dict[Slot, int] = {}
        self._promised_until = 0.0

    # -- reading ------------------------------------------------------------------------------

    def find(self, key: bytes) -> Entry | None:
        """Return the live entry of a key, without counting it as a use."""
        entry = self.entries.get(key)
        if entry is not None and entry.expires_ms and entry.expires_ms <= self.clock.wall_ms:
            self._expire(entry)
            return None
        return entry

    def use(self, key: bytes) -> Entry | None:
        """Return the live entry of a key and count a hit, or count a miss."""
        entry = self.find(key)
        if entry is None:
            self.stats.misses += 1
            return None
        entry.touched = self.clock.now
        entry.hits += 1
        self.stats.hits += 1
        return entry

    def match(self, keys: list[bytes], until: float) -> tuple[int, int]:
        """Use the longest run of present pages from the start; keep it until then.

        Returns: how many pages, and their bytes, taking all to be as long as the first.
        """
        ended_by_ms = self.clock.wall_ms if self.index.num_volatile else 0
        run = longest_run(self.entries, keys, ended_by_ms)
        now = self.clock.now
        for entry in run:
            entry.touched = now
            entry.hits += 1
            entry.held_until = until
        self._promised_until = max(self._promised_until, until)
        self.stats.matches += 1
        self.stats.matched_pages += len(run)
        return len(run), len(run) * run[0].nbytes if run else 0

    def payload(self, slot: Slot) -> memoryview:
        """Return the memory of a slot's value. It stays the value's while the slot is held."""
        start = slot.offset + HEADER_BYTES
        return self.arena[start : start + slot.payload_bytes]

    def copy(self, entry: Entry) -> bytes:
        """Return a copy of a value."""
        if entry.slot is None:
            assert entry.value is not None
            return entry.value
        return bytes(self.payload(entry.slot))

    def borrow(self, slot: Slot) -> None:
        """Hold a slot while its bytes are read; ``restore`` ends that."""
        self.slabs.hold(slot)
        self._borrowed[slot] = self._borrowed.get(slot, 0) + 1

    def restore(self, slot: Slot) -> None:
        """Let go of a borrowed slot."""
        count = self._borrowed[slot] - 1
        if count:
            self._borrowed[slot] = count
        else:
            del self._borrowed[slot]
        self._give_back(slot)

    # -- writing ------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> Landing:
        """Find a slot for a value of ``nbytes``, evicting for it. Raises OutOfMemory."""
        landing = Landing(self._take(nbytes), self.arena, nbytes)
        self._landings.add(landing)
        return landing

    def abandon(self, landing: Landing) -> None:
        """Give a landing's slot back unless it was committed; harmless when repeated."""
        if landing.is_open:
            self._close(landing)
            self._give_back(landing.slot)

    def commit(self, key: bytes, landing: Landing, how: Put = PLAIN) -> Entry:
        """Make a full landing the value of a key, in one step."""
        return self.seal(key, landing, landing.checksum(), how)

    def adopt(self, slot: Slot) -> Landing:
        """Take over a slot that a client has filled in place; ``seal`` or ``abandon`` it."""
        landing = Landing(slot, self.arena, slot.payload_bytes)
        self._landings.add(landing)
        return landing

    @staticmethod
    def check_key(key: bytes, nbytes: int) -> None:
        """Raise CommandError for a key that is too long for a value in a slot.

        The key is on the heap; beside a small value it is part of that budget, beside a slot not.
        """
        if len(key) > KEY_BYTES_MAX and nbytes > SMALL_BYTES_MAX:
            raise CommandError(
                f"a value of more than {SMALL_BYTES_MAX} bytes takes a key of at most "
                f"{KEY_BYTES_MAX}, not {len(key)}"
            )

    def seal(self, key: bytes, landing: Landing, checksum: int, how: Put) -> Entry:
        """Commit a landing whose bytes were checksummed elsewhere."""
        self.check_key(key, landing.nbytes)
        self._close(landing)
        return self.publish(key, landing.slot, landing.nbytes, checksum, how)

    def put(self, key: bytes, value: bytes, how: Put = PLAIN) -> Entry:
        """Store a value that is already in memory. Raises OutOfMemory; the old value stays then."""
        if len(value) <= SMALL_BYTES_MAX and how.kind == "string":
            return self.put_small(key, value, how)
        self.check_key(key, len(value))
        landing = self.reserve(len(value))
        landing.write(value)
        return self.commit(key, landing, how)

    def put_small(self, key: bytes, value: bytes, how: Put) -> Entry:
        """Store a value of at most SMALL_BYTES_MAX bytes on the heap."""
        nbytes = len(value)
        entry = self.entries.get(key)
        if entry is None or entry.slot is not None or entry.nbytes != nbytes:
            entry = self._make_small(key, nbytes)
        entry.value = value
        entry.touched = self.clock.now
        self.stats.bytes_in += nbytes
        if how is not PLAIN or entry.expires_ms or entry.priority:
            self._describe(entry, how, None)
        return entry

    def publish(self, key: bytes, slot: Slot, nbytes: int, checksum: int, how: Put) -> Entry:
        """Write a filled slot's header and make it the value of a key, in one step.

        The slot's one holder passes from the caller to the index.
        """
        schema = self.namespaces.of_key(key) if how.kind == "kvpage" else None
        header = Header(
            codec=RAW,
            flags=0,
            namespace=0 if schema is None else schema.fingerprint_hash,
            key_hash=hash64(key),
            generation=slot.generation,
            payload_bytes=nbytes,
            checksum=checksum,
        )
        write_header(self.arena[slot.offset : slot.offset + HEADER_BYTES], header)
        entry = self.entries.get(key)
        if entry is None:
            entry = Entry(key, how.kind, nbytes, self.clock.now)
            entry.slot, slot.owner = slot, entry
            self.index.insert(entry)
            self.room.insert(entry)
        else:
            self._replace(entry, how.kind, nbytes, slot)
        self._describe(entry, how, schema)
        self.stats.bytes_in += nbytes
        return entry

    def has_page(self, key: bytes, nbytes: int) -> Entry | None:
        """Return the page that a put of ``nbytes`` would only write again, or None.

        A key that ends with a page id names its content, so what is there is what would come.
        """
        digits = key[-PAGE_ID_DIGITS:]
        if len(key) <= PAGE_ID_DIGITS or not _HEX.issuperset(digits):
            return None
        entry = self.find(key)
        is_same = entry is not None and entry.kind == "kvpage" and entry.nbytes == nbytes
        return entry if is_same else None

    def describe(self, entry: Entry, how: Put) -> None:
        """Apply put options to a page that is already there."""
        self._describe(entry, how, self.namespaces.of_key(entry.key))

    # -- leases -------------------------------------------------------------------------------

    def lease(self, owner: int, entries: list[Entry], deadline: float) -> Lease:
        """Let a connection read entries in place until ``deadline``; all must be in slots."""
        self.leases.check_may_begin(owner)
        slots = [entry.slot for entry in entries if entry.slot is not None]
        assert len(slots) == len(entries)
        for slot in slots:
            self.slabs.hold(slot)
        return self.leases.begin(owner, Mode.READ, slots, deadline)

    def lease_room(self, owner: int, key: bytes, nbytes: int, deadline: float) -> Lease:
        """Let a connection write a new value in place until ``deadline``. Raises OutOfMemory."""
        self.leases.check_may_begin(owner)
        return self.leases.begin(owner, Mode.WRITE, [self._take(nbytes)], deadline, key)

    def promise(self, entry: Entry, until: float) -> None:
        """Keep an entry that a client was told about until it comes to fetch it."""
        if entry.held_until < until:
            entry.held_until = until
            self._promised_until = max(self._promised_until, until)

    def drop_owner(self, owner: int, *, may_write: bool = False) -> None:
        """Give back all that a connection held; ``may_write`` as in ``LeaseTable``."""
        self.leases.drop_owner(owner, self.clock.now, may_write=may_write)

    # -- keeping and forgetting ---------------------------------------------------------------

    def delete(self, entry: Entry, reason: Reason = "deleted") -> None:
        """Remove an entry. Its bytes stay for those who are reading them."""
        if reason == "deleted":
            self.stats.deleted += 1
        self._remove(entry, reason)

    def expire_at(self, entry: Entry, wall_ms: int) -> None:
        """Set when an entry's TTL ends; 0 for never."""
        self.index.expire_at(entry, wall_ms)

    def expire_due(self, count_max: int) -> int:
        """Remove up to ``count_max`` entries whose TTL has ended; return how many there were."""
        count = 0
        # One by one: an entry may have several tickets, and the rest are void once it has gone.
        for entry in self.index.due(self.clock.wall_ms, count_max):
            self._expire(entry)
            count += 1
        return count

    def lapse(self) -> list[int]:
        """End leases past their deadline; return the owners of overdue writers."""
        before = len(self.leases)
        overdue = self.leases.lapse(self.clock.now)
        self.stats.lapsed += before - len(self.leases) + len(overdue)
        return overdue

    def flush(self) -> None:
        """Remove everything. Readers keep what they are reading."""
        removed = self.index.clear()
        for entry in removed[-FLUSHED_NOTED_MAX:]:
            self.history.note(entry.key, "flushed")
        for entry in removed:
            slot, entry.slot = entry.slot, None
            if slot is not None:
                slot.owner = None
                self._give_back(slot)
        self.room.small_bytes = 0
        self.room.clear()

    def is_waiting_useful(self, nbytes: int) -> bool:
        """Whether ``nbytes`` could fit, and bytes are in use by somebody who will let go soon."""
        if nbytes > self.slabs.payload_bytes_max:
            return False
        in_use = self._landings or self._borrowed or len(self.leases)
        return bool(in_use) or self._promised_until > self.clock.now

    def in_flight(self) -> tuple[int, int]:
        """Count the landings, and the slots that are being sent."""
        return len(self._landings), len(self._borrowed)

    def check(self) -> None:
        """Assert that slots, index and leases agree to the last count."""
        self.index.check()
        self.leases.check()
        self.room.check(list(self.entries.values()))
        entries = self.entries.values()
        check_holders(self.slabs, entries, self.leases, self._landings, self._borrowed)
        self.stats.checks += 1

    # -- inside -------------------------------------------------------------------------------

    def _take(self, nbytes: int) -> Slot:
        try:
            return self.room.take(nbytes)
        except OutOfMemory:
            self.stats.oom += 1
            raise

    def _make_small(self, key: bytes, nbytes: int) -> Entry:
        """Return the entry of a key with room on the heap for a value of another size."""
        self.room.take_small(small_cost(key, nbytes))
        entry = self.entries.get(key)  # not before: making room may have evicted it
        if entry is not None:
            self._replace(entry, "string", nbytes, None)
            return entry
        entry = Entry(key, "string", nbytes, self.clock.now)
        self.index.insert(entry)
        self.room.insert(entry)
        return entry

    def _replace(self, entry: Entry, kind: Kind, nbytes: int, slot: Slot | None) -> None:
        self.room.remove(entry)
        self._let_go(entry)
        entry.kind, entry.nbytes, entry.slot, entry.value = kind, nbytes, slot, None
        if slot is not None:
            slot.owner = entry
        entry.touched = self.clock.now
        self.room.insert(entry)

    def _describe(self, entry: Entry, how: Put, schema: Schema | None) -> None:
        if how.expires_ms is not None and how.expires_ms != entry.expires_ms:
            self.index.expire_at(entry, how.expires_ms)
        entry.priority = how.priority
        if how.kind == "kvpage":
            entry.tokens = how.tokens or (0 if schema is None else schema.geometry.tokens)
            entry.namespace = b"" if schema is None else schema.namespace
            if how.parent is not None:
                leaf = self.index.link(entry, how.parent)
                if leaf is not None:
                    self.room.insert(leaf)

    def _let_go(self, entry: Entry) -> None:
        if entry.slot is None:
            self.room.give_back_small(small_cost(entry.key, entry.nbytes))
        else:
            slot, entry.slot = entry.slot, None
            slot.owner = None
            self._give_back(slot)

    def _remove(self, entry: Entry, reason: Reason) -> None:
        self.room.remove(entry)
        leaf = self.index.remove(entry)
        self._let_go(entry)
        if leaf is not None:
            self.room.insert(leaf)
        self.history.note(entry.key, reason)

    def _evict(self, entry: Entry) -> None:
        self.stats.evicted += 1
        self.stats.evicted_bytes += entry.nbytes
        self._remove(entry, "evicted")

    def _expire(self, entry: Entry) -> None:
        self.stats.expired += 1
        self._remove(entry, "expired")

    def _close(self, landing: Landing) -> None:
        assert landing.is_open
        landing.is_open = False
        landing.memory = landing.memory[:0]
        self._landings.discard(landing)

    def _give_back(self, slot: Slot) -> None:
        self.slabs.give_back(slot)
        if not slot.holders:
            self.on_room()


_HEX = frozenset(b"0123456789abcdef")
