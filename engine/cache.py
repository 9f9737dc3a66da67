"""The cache: keys to bytes in one arena, every method synchronous.

A hit in memory is served by these short functions, without a mailbox and without an await: measured,
a mailbox round trip costs 3 to 11 us and a whole Redis command has to take about 10. One event loop
makes each call atomic, so there is no lock and no half-changed state to see.

A put is two steps with the filling in between: ``reserve`` finds a slot (evicting for it), the
caller fills ``landing.memory``, ``commit`` writes header and checksum and makes the key visible in
one step; ``abandon`` gives the slot back, and nobody ever saw the value. Who holds slots meanwhile
is in memory.py; what file tiers keep, in copies.py. Without file tiers ``has_files`` is False and
nothing of that is looked at.
"""

from respkv.engine.clock import Clock
from respkv.engine.entry import PLAIN, SMALL_BYTES_MAX, Entry, Put
from respkv.engine.history import Reason
from respkv.engine.integrity import check_copies, check_holders
from respkv.engine.landing import Landing
from respkv.engine.leases import Lease, LeaseTable, Mode
from respkv.engine.namespaces import TAG_BYTES, Schema, tag_of
from respkv.engine.nodes import touch_parts
from respkv.engine.prefix import longest_run
from respkv.engine.residents import Residents
from respkv.errors import CommandError
from respkv.page import KEY_BYTES_MAX, part_of
from respkv.tiers.meta import is_content_addressed
from respkv.tiers.record import Level
from respkv.tiers.slab import SlabAllocator, Slot

FLUSHED_NOTED_MAX = 10_000  # a flush must not stall the loop with explanations


class Cache(Residents):
    """Every key, and who reads or writes what is behind it.

    default_level: of puts that do not say what they must survive.
    """

    def __init__(
        self, arena: memoryview, slabs: SlabAllocator, *, policy: str, small_max: int, clock: Clock
    ) -> None:
        super().__init__(arena, slabs, policy=policy, small_max=small_max, clock=clock)
        self.default_level = Level.MEMORY
        self.leases = LeaseTable(self._give_back)
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
        if self.gpu.is_on:
            self.gpu.read(entry)
        return entry

    def match(self, keys: list[bytes], until: float, *, session: bytes = b"") -> list[Entry]:
        """Use the longest run of present pages from the start, cold ones too; keep it until then.

        session: the conversation that asks; empty: none that is known.
        """
        ended_by_ms = self.clock.wall_ms if self.index.num_volatile else 0
        run = longest_run(self.entries, keys, ended_by_ms)
        self.use_run(run, until)
        if run and run[-1].kind == "kvpage":
            self.requests.matched(run, len(keys) * run[0].tokens, self.clock.now, session)
            if self.copies.num_cold:
                self.on_match(run)
        return run

    def use_run(self, run: list[Entry], until: float) -> None:
        """Use pages that a client is told about, and keep them until then."""
        now = self.clock.now
        if until >= self._promised_until:  # nobody was promised more
            for entry in run:
                entry.touched = now
                entry.hits += 1
                entry.held_until = until
        else:
            for entry in run:
                entry.touched = now
                entry.hits += 1
                entry.held_until = max(until, entry.held_until)
        if self.index.has_parts:
            for entry in run:
                touch_parts(entry, now)
        self._promised_until = max(self._promised_until, until)
        self.stats.matches += 1
        self.stats.matched_pages += len(run)

    # -- writing ------------------------------------------------------------------------------

    def reserve(self, nbytes: int, *, may_lose: bool = True, is_last: bool = True) -> Landing:
        """Find a slot for a value of ``nbytes``, evicting for it. Raises OutOfMemory.

        may_lose: whether a value may go for it that a file tier has still to take.
        is_last:  that it fails is what the client is told, and counted; else it is tried again.
        """
        return self.adopt(self._take(nbytes, may_lose=may_lose, is_last=is_last))

    def commit(self, key: bytes, landing: Landing, how: Put = PLAIN) -> Entry:
        """Make a full landing the value of a key, in one step."""
        return self.seal(key, landing, landing.checksum(), how)

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
        """Commit a landing whose bytes were checksummed elsewhere.

        Raises QuotaExceeded when its owner may not keep so much; the landing is as it was then.
        """
        self.check_key(key, landing.nbytes)
        self._check_put(key, landing.nbytes, how)
        self._close(landing)
        return self.publish(key, landing.slot, landing.nbytes, checksum, how)

    def put(self, key: bytes, value: bytes, how: Put = PLAIN) -> Entry:
        """Store a value that is already in memory.

        Raises OutOfMemory and QuotaExceeded; the old value stays then.
        """
        if len(value) <= SMALL_BYTES_MAX and how.kind == "string":
            return self.put_small(key, value, how)
        self.check_key(key, len(value))
        slot = self.slabs.take(len(value))
        if slot is None:  # nobody makes room for what its owner may not keep
            self._check_put(key, len(value), how, is_trial=True)
            slot = self._take(len(value))
        landing = self.adopt(slot)
        landing.write(value)
        try:
            return self.commit(key, landing, how)
        finally:
            self.abandon(landing)

    def _check_put(self, key: bytes, nbytes: int, how: Put, *, is_trial: bool = False) -> None:
        if how.kind == "kvpage":
            parent = self.entries.get(how.parent) if how.parent else None
            self.accounts.check_put(key, how.tenant, nbytes, parent, is_trial=is_trial)

    def put_small(self, key: bytes, value: bytes, how: Put) -> Entry:
        """Store a value of at most SMALL_BYTES_MAX bytes on the heap."""
        nbytes = len(value)
        entry = self.entries.get(key)
        if entry is None or entry.value is None or entry.nbytes != nbytes:
            entry = self._make_small(key, nbytes, self._level(how, None))
        elif self.has_files and (entry.records or entry.level):
            self.copies.replaced(entry, self._level(how, None), by_string=True)
        entry.value = value
        entry.touched = self.clock.now
        self.stats.bytes_in += nbytes
        if how is not PLAIN or entry.expires_ms or entry.priority:
            self._describe(entry, how, None)
        if self.has_files:
            self.copies.stored(entry, self._level(how, None))
        return entry

    def publish(self, key: bytes, slot: Slot, nbytes: int, checksum: int, how: Put) -> Entry:
        """Write a filled slot's header and make it the value of a key, in one step.

        The slot's one holder passes from the caller to the index.
        """
        schema = self.namespaces.of_key(key) if how.kind == "kvpage" else None
        # Not the one of when the slot was taken: the value that is committed last is the newest.
        generation = slot.generation = self.slabs.next_generation()
        self._write_header(slot, key, schema, generation, checksum)
        entry = self.entries.get(key)
        is_new = entry is None or entry.kind != how.kind
        if entry is not None and not is_new and entry.branch[:TAG_BYTES] != tag_of(schema):
            self._remove_parts(entry, "schema")
            self.watchers.removed(entry, "schema")  # what this key was under another schema
            entry.branch = entry.token_ids = b""
            is_new = True
        if entry is None:
            entry = Entry(key, how.kind, nbytes, self.clock.now)
            entry.slot, slot.owner = slot, entry
            self.index.insert(entry)
            self.room.insert(entry)
        else:
            self._replace(entry, how.kind, nbytes, slot, self._level(how, schema))
        entry.generation = generation
        entry.tenant = how.tenant
        self._describe(entry, how, schema)
        self.stats.bytes_in += nbytes
        if self.has_files:
            self.copies.stored(entry, self._level(how, schema))
        if how.kind == "kvpage" and self.watchers:
            self.watchers.stored(entry, is_new=is_new)
            if how.session:
                self.requests.belongs(entry, how.session)
        return entry

    def has_page(self, key: bytes, nbytes: int) -> Entry | None:
        """Return the page that a put of ``nbytes`` would only write again, or None.

        A key with a page's id names its content under one schema, so what is there is what would
        come.
        """
        if not is_content_addressed(key, "kvpage"):
            return None
        entry = self.find(key)
        if entry is None or entry.kind != "kvpage" or entry.nbytes != nbytes:
            return None
        schema = self.namespaces.of_key(key)
        return entry if entry.branch[:TAG_BYTES] == tag_of(schema) else None

    def describe(self, entry: Entry, how: Put) -> None:
        """Apply put options to a page that is already there; its level is raised, never lowered."""
        schema = self.namespaces.of_key(entry.key)
        before = _told(entry)
        had_tokens = bool(entry.token_ids)
        self._describe(entry, how, schema)
        if entry.token_ids and not had_tokens:
            self.watchers.stored(entry, is_new=False)
        if how.session and (entry.request is None or entry.request.session is None):
            self.requests.belongs(entry, how.session)  # it may be another's, and is shared then
        if how.pinned_until:
            self.pins.note(entry)
        if before != _told(entry):
            self.accounts.requeue(entry)
        if self.has_files:
            level = self._level(how, schema)
            if level > entry.level:
                self.copies.want(entry, level)
            elif before != _told(entry):
                self.copies.changed(entry)

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
        self.gpu.leases.drop_owner(owner, self.clock.now)

    # -- keeping and forgetting ---------------------------------------------------------------

    def delete(self, entry: Entry, reason: Reason = "deleted") -> None:
        """Remove an entry. Its bytes stay for those who are reading them."""
        if reason == "deleted":
            self.stats.deleted += 1
        self._remove(entry, reason)

    def expire_at(self, entry: Entry, wall_ms: int) -> None:
        """Set when an entry's TTL ends; 0 for never."""
        if wall_ms != entry.expires_ms:
            self.index.expire_at(entry, wall_ms)
            self.copies.changed(entry)

    def pin(self, entry: Entry, until: float) -> None:
        """Keep an entry from eviction until then; 0 ends that."""
        entry.pinned_until = until
        self.pins.note(entry)
        self.accounts.requeue(entry)
        self.copies.changed(entry)

    def prioritize(self, entry: Entry, priority: int) -> None:
        """Give a page another priority."""
        if priority != entry.priority:
            entry.priority = priority
            self.accounts.requeue(entry)
            self.copies.changed(entry)

    def lapse(self) -> list[int]:
        """End leases past their deadline; return the owners of overdue writers."""
        before = len(self.leases) + len(self.gpu.leases)
        overdue = self.leases.lapse(self.clock.now)
        self.gpu.leases.lapse(self.clock.now)
        left = len(self.leases) + len(self.gpu.leases)
        self.stats.lapsed += before - left + len(overdue)
        return overdue

    def flush(self, *, frees: bool = True) -> None:
        """Remove everything. Readers keep what they are reading.

        frees: whether file tiers are told of each copy; otherwise they have to be cleared.
        """
        removed = self.index.clear()
        self.gpu.clear()
        self.watchers.cleared()
        for entry in removed[-FLUSHED_NOTED_MAX:]:
            self.history.note(entry.key, "flushed")
        if self.has_files:
            if frees:
                for entry in removed:
                    self.copies.removed(entry, "flushed")
            self.copies.flushed(removed)
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

    def check(self) -> None:
        """Assert that slots, index and leases agree to the last count."""
        self.index.check()
        self.leases.check()
        entries = self.entries.values()
        self.room.check([entry for entry in entries if not entry.is_cold])
        check_copies(self.copies, entries)
        check_holders(self.slabs, entries, self.leases, self._landings, self._borrowed)
        self.gpu.check()
        self.accounts.check(entries)
        self.stats.checks += 1

    # -- inside -------------------------------------------------------------------------------

    def _describe(self, entry: Entry, how: Put, schema: Schema | None) -> None:
        if how.kind == "kvpage":
            entry.part = part_of(entry.key)
        expires_ms = 0 if entry.part is not None and how.parent else how.expires_ms
        if expires_ms is not None and expires_ms != entry.expires_ms:
            self.index.expire_at(entry, expires_ms)  # a part goes when its page does
        entry.priority = how.priority
        if how.pinned_until:
            entry.pinned_until = how.pinned_until
        if how.kind == "kvpage":
            entry.tokens = how.tokens or (0 if schema is None else schema.geometry.tokens)
            entry.namespace = b"" if schema is None else schema.namespace
            if how.token_ids:
                entry.branch, entry.token_ids = how.branch, how.token_ids
            elif not entry.branch:
                entry.branch = tag_of(schema)
            if how.parent is not None:
                leaf = self.index.link(entry, how.parent)
                if leaf is not None:
                    self.accounts.requeue(leaf)
                    self._requeue_leaf(leaf)
                if entry.part is not None and not entry.is_cold:
                    self.room.insert(entry)  # another page may let it go
            if how.depth is not None:
                entry.depth = how.depth
            elif entry.parent is not None:
                entry.depth = entry.parent.depth + entry.parent.tokens

    def _level(self, how: Put, schema: Schema | None) -> Level:
        if how.level is not None:
            return how.level
        if schema is not None and schema.level is not None:
            return schema.level
        return self.default_level


def _told(entry: Entry) -> tuple[object, ...]:
    """Return what files know of a page and a put may change."""
    kept = entry.expires_ms, entry.priority, entry.pinned_until
    return (*kept, entry.tokens, entry.parent_key, entry.depth, entry.token_ids)
