"""Which pages the gpu tier has a copy of, which come next, and which go for them.

The tier is inclusive: each of these pages is in memory or in a file as well. So a copy may go at
any time and nobody misses it, and it goes in the same turn in which its page gets another value,
expires or is removed; a page that only leaves memory keeps it, and comes back from it. There is no
copy of anything but pages whose namespace has a schema: they are tensors, and of few sizes.

Reads are counted here, because an entry's ``hits`` count matches as well, and a worker that matches
and then gets has used a page once.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from math import inf

from respkv.engine.clock import Clock
from respkv.engine.entry import Entry
from respkv.engine.gpu_forms import Forms
from respkv.engine.gpu_tier import GpuTier
from respkv.engine.leases import Lease, LeaseTable, Mode
from respkv.engine.namespaces import Namespaces
from respkv.engine.placement import GpuPromote, is_lifted
from respkv.kernels.page_form import PageForm
from respkv.tiers.slab import Slab, Slot

LEASES_FROM = 1 << 48  # numbers above all that leases of the arena will ever have
READS_KEPT_MAX = 65_536  # entries whose reads are counted, the last ones read
VICTIM_LOOKS = 64  # copies that are looked at, the least recently used first
AT_ONCE = 1 << 30  # as many reads as any setting asks for


class GpuCopy:
    """A page in the gpu tier.

    checksum: of the page as it was put; a raw copy is held against it when it is read.
    """

    __slots__ = ("checksum", "entry", "form", "slot")

    def __init__(self, entry: Entry, slot: Slot, form: PageForm, checksum: int) -> None:
        self.entry = entry
        self.slot = slot
        self.form = form
        self.checksum = checksum


class Lift:
    """A page on its way into the tier. is_void: it has another value by now, or none."""

    __slots__ = ("entry", "is_void")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.is_void = False


class GpuStats:
    """Counters since the start."""

    __slots__ = ("corrupt", "dropped", "evicted", "lifted", "lost", "no_room", "raised", "void")

    def __init__(self) -> None:
        self.lifted = 0  # copies made
        self.dropped = 0  # advice to make one that came while too much was on its way
        self.void = 0  # copies that came too late: the page had changed
        self.no_room = 0  # copies not made because all that could go for them is held
        self.evicted = 0  # copies that went for others
        self.raised = 0  # pages that came back into memory from their copy
        self.corrupt = 0  # copies whose bytes had changed
        self.lost = 0  # copies that went because the tier failed

    def snapshot(self) -> dict[str, int]:
        """Return every counter by name."""
        return {name: getattr(self, name) for name in self.__slots__}


class GpuCopies:
    """The copies, the least recently used first, and leases of them.

    is_on:   whether there is such a tier; if not, nothing else is looked at.
    promote: on which read a page is copied.
    advise:  asks for a copy of a page; False when that was dropped.
    """

    def __init__(self, clock: Clock, namespaces: Namespaces) -> None:
        self.is_on = False
        self.promote: GpuPromote = "never"
        self.advise: Callable[[Entry], bool] = lambda entry: False
        self.stats = GpuStats()
        self.by_entry: OrderedDict[Entry, GpuCopy] = OrderedDict()
        self.lifts: dict[Entry, Lift] = {}
        self.leases = LeaseTable(self.give_back, _next=LEASES_FROM)
        self.bytes = 0  # of the pages, as they are put
        self.num_reading = 0  # slots that the actor holds because they are being read
        self._forms = Forms(namespaces)
        self._clock = clock
        self._reads: OrderedDict[Entry, int] = OrderedDict()
        self._tier: GpuTier | None = None

    @property
    def tier(self) -> GpuTier:
        """The tier, when there is one."""
        assert self._tier is not None, "there is no gpu tier"
        return self._tier

    def use(self, tier: GpuTier, promote: GpuPromote) -> None:
        """Keep copies in a tier from now on."""
        self._tier, self.promote, self.is_on = tier, promote, True

    def find(self, entry: Entry) -> GpuCopy | None:
        """Return the copy of an entry, or None."""
        return self.by_entry.get(entry)

    def form_of(self, entry: Entry) -> PageForm | None:
        """Return how a page is to lie in the tier; None: it is not for this tier."""
        form = self._forms.find(entry)
        return form if form is not None and form.nbytes <= self.tier.slots.nbytes_max else None

    # -- told by the cache --------------------------------------------------------------------

    def read(self, entry: Entry) -> None:
        """Note that a page was read; have it copied if that is often enough."""
        if entry in self.by_entry:
            self.by_entry.move_to_end(entry)
            return
        if self.promote == "never" or entry.kind != "kvpage":
            return
        reads = self._count(entry, self._reads.get(entry, 0) + 1)
        if entry.slot is not None and is_lifted(self.promote, reads):
            self._ask(entry)

    def raised(self, entry: Entry) -> None:
        """Note that a page has come into memory; have it copied if somebody waits for that."""
        if self._reads.get(entry, 0) >= AT_ONCE:
            self._ask(entry)

    def want(self, entry: Entry) -> bool:
        """Have a page copied now, or as soon as it is in memory; False if that was dropped."""
        if entry in self.lifts:
            return True
        if entry in self.by_entry or self.form_of(entry) is None:
            return False
        self._count(entry, AT_ONCE)
        return True if entry.is_cold else self._ask(entry)

    def drop(self, entry: Entry) -> None:
        """Forget the copy of a value that is not the entry's any more."""
        self._reads.pop(entry, None)
        lift = self.lifts.get(entry)
        if lift is not None:
            lift.is_void = True
        copy = self.by_entry.pop(entry, None)
        if copy is not None:
            self._let_go(copy)

    def clear(self) -> None:
        """Forget all copies. Those that are leased stay readable."""
        for lift in self.lifts.values():
            lift.is_void = True
        copies = list(self.by_entry.values())
        self.by_entry.clear()
        self._reads.clear()
        for copy in copies:
            self._let_go(copy)

    def fail(self) -> None:
        """Forget all copies, because the tier's state is suspect."""
        self.stats.lost += len(self.by_entry)
        self.clear()

    # -- told by the actor --------------------------------------------------------------------

    def begin_lift(self, entry: Entry) -> Lift:
        """Note that a page is on its way; ``end_lift`` follows."""
        assert entry not in self.lifts
        lift = self.lifts[entry] = Lift(entry)
        return lift

    def end_lift(self, lift: Lift) -> None:
        """Note that it is not any more."""
        assert self.lifts[lift.entry] is lift
        del self.lifts[lift.entry]

    def attach(self, lift: Lift, slot: Slot, form: PageForm, checksum: int) -> bool:
        """Make a filled slot the copy of a page; False, and nothing done, if it came too late."""
        if lift.is_void or not self.is_on:
            self.stats.void += 1
            return False
        entry = lift.entry
        assert entry.position >= 0
        assert entry not in self.by_entry
        slot.owner = copy = GpuCopy(entry, slot, form, checksum)
        self.by_entry[entry] = copy
        self.bytes += form.geometry.page_bytes
        self._reads.pop(entry, None)
        self.stats.lifted += 1
        return True

    def discard(self, copy: GpuCopy) -> None:
        """Forget one copy, if it has not gone already."""
        if self.by_entry.get(copy.entry) is copy:
            self.drop(copy.entry)

    def take(self, nbytes: int) -> Slot | None:
        """Find a slot, dropping copies for it that were not used for long. None: all are held."""
        tier = self.tier
        slot = tier.take(nbytes)
        if slot is not None or tier.state != "ok":
            return slot
        for copy in islice(self.by_entry.values(), VICTIM_LOOKS):
            if tier.slots.is_alike(copy.slot, nbytes) and not self._is_held(copy):
                self._evict(copy)
                return tier.take(nbytes)
        # Slots of other sizes are in the way, or what went unused for longest is held.
        for slab in tier.slots.slabs_to_clear(nbytes, self._cost) or ():
            owners: list[GpuCopy] = [used.owner for used in slab.used if used.owner is not None]
            for copy in owners:
                self._evict(copy)
        slot = tier.take(nbytes)
        self.stats.no_room += slot is None
        return slot

    def give_back(self, slot: Slot) -> None:
        """End one hold of a slot."""
        self.tier.slots.give_back(slot)

    # -- leases -------------------------------------------------------------------------------

    def begin_lease(self, owner: int, deadline: float) -> Lease:
        """Begin a lease of nothing; ``add_to_lease`` adds copies. Raises Busy."""
        self.leases.check_may_begin(owner)
        return self.leases.begin(owner, Mode.READ, [], deadline)

    def add_to_lease(self, lease: Lease, entry: Entry) -> GpuCopy | None:
        """Let a lease hold the copy of a page, if there is one. Raises LeaseGone when it is over."""
        self.leases.get(lease.owner, lease.number)
        copy = self.by_entry.get(entry)
        if copy is not None:
            self.tier.slots.hold(copy.slot)
            lease.slots.append(copy.slot)
            self.by_entry.move_to_end(entry)
        return copy

    def check(self) -> None:
        """Assert that slots, copies and leases agree."""
        if not self.is_on:
            return
        self.leases.check()
        self.tier.slots.check()
        leased = self.leases.holders()
        for entry, copy in self.by_entry.items():
            assert copy.entry is entry
            assert copy.slot.owner is copy
            assert entry.position >= 0
            assert entry.records or not entry.is_cold, "a copy is the only one"
            assert copy.slot.holders >= 1 + leased.get(copy.slot, 0)
        owned = {copy.slot for copy in self.by_entry.values()}
        loose = [slot for slot in self.tier.slots.used() if slot not in owned]
        num_flying = sum(slot not in leased for slot in loose)
        assert num_flying <= len(self.lifts) + self.num_reading
        assert self.bytes == sum(entry.nbytes for entry in self.by_entry)

    # -- inside -------------------------------------------------------------------------------

    def _count(self, entry: Entry, reads: int) -> int:
        self._reads[entry] = reads
        self._reads.move_to_end(entry)
        if len(self._reads) > READS_KEPT_MAX:
            self._reads.popitem(last=False)
        return reads

    def _ask(self, entry: Entry) -> bool:
        if entry in self.lifts or entry in self.by_entry or self.form_of(entry) is None:
            return False
        if self.tier.state != "ok":
            return False
        is_sent = self.advise(entry)
        self.stats.dropped += not is_sent
        return is_sent

    def _evict(self, copy: GpuCopy) -> None:
        self.stats.evicted += 1
        self.drop(copy.entry)

    def _let_go(self, copy: GpuCopy) -> None:
        self.bytes -= copy.form.geometry.page_bytes
        copy.slot.owner = None
        self.give_back(copy.slot)

    def _is_held(self, copy: GpuCopy) -> bool:
        """Whether it is being read, is leased, or its page is pinned."""
        return copy.slot.holders > 1 or copy.entry.pinned_until > self._clock.now

    def _cost(self, slab: Slab) -> float:
        """What clearing a slab would lose: its bytes, each by how recently its page was used."""
        cost = 0.0
        for slot in slab.used:
            copy: GpuCopy | None = slot.owner
            if copy is None or self._is_held(copy):
                return inf
            cost += 1.0 / (1.0 + max(0.0, self._clock.now - copy.entry.touched))
        return cost * slab.slot_bytes
