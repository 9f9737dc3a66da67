"""What is in memory alone: the values that file tiers have still to take, oldest first.

There are two queues, because small values on the heap and those in the arena have budgets of their
own and neither may wait behind the other.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from respkv.engine.admission import Admission
from respkv.engine.burials import Burials
from respkv.engine.clock import Clock
from respkv.engine.entry import ENTRY_BYTES, Entry
from respkv.engine.journeys import Dirt, Writing
from respkv.engine.placement import Watermarks
from respkv.engine.tier import Tier


class Backlog(Burials):
    """The dirty, and what is being written of them.

    on_room: called when there is no need any more to wait with values.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.is_on = False
        self.payload_bytes_max = self._payload_bytes_any = -1  # what some tier takes, and each one
        self.dirty_large: OrderedDict[Entry, Dirt] = OrderedDict()
        self.dirty_small: OrderedDict[Entry, Dirt] = OrderedDict()
        self.queued_bytes = self.queued_small_bytes = 0  # of those in them
        self.num_queued = 0  # how many ever were
        self.writing_bytes = 0  # of those on their way, both kinds
        self.hurried_bytes = 0  # of those that eviction has passed over
        self.writing: dict[Entry, Writing] = {}
        self.lost_from = 0  # which tier had the last copy of the entry that is lost now
        self.given_up: dict[Entry, None] = {}  # in memory, and reclaim has dropped their copies
        self.admission = Admission(clock)
        self.marks, self.small_marks = Watermarks(), Watermarks()
        self.on_room: Callable[[], None] = lambda: None

    def use(self, tiers: Iterable[Tier]) -> None:
        """Keep copies in these tiers from now on, fastest first."""
        self.tiers = tuple(tiers)
        self.is_on = bool(self.tiers)
        most = [tier.payload_bytes_max for tier in self.tiers] or [-1]
        self.payload_bytes_max, self._payload_bytes_any = max(most), min(most)

    def dirty_of(self, entry: Entry) -> OrderedDict[Entry, Dirt]:
        """Return the queue that an entry in memory is in while it is dirty."""
        return self.dirty_small if entry.slot is None else self.dirty_large

    @property
    def num_dirty(self) -> int:
        """How many entries wait to be written."""
        return len(self.dirty_small) + len(self.dirty_large)

    @property
    def can_write(self) -> bool:
        """Whether some tier takes values now."""
        return any(tier.health.state == "ok" for tier in self.tiers)

    @property
    def is_behind(self) -> bool:
        """Whether larger values should wait, because too much in memory has no copy yet."""
        return self.queued_bytes + self.writing_bytes > self.marks.high and self.can_write

    def spares(self, entry: Entry) -> bool:
        """Whether an entry is better evicted later, because a tier can still take its value."""
        is_dirty = entry in self.dirty_of(entry) or entry in self.writing or entry in self.given_up
        if not is_dirty and entry in self.admission.left_out:
            is_dirty = self.admission.admits(entry)  # it was used since
        return is_dirty and self.can_write

    def leave_out(self, entry: Entry) -> None:
        """Have a dirty entry not written as it is now: it is not worth that."""
        was_behind = self.is_behind
        dirt = self.take_out(entry)
        assert dirt is not None
        self.admission.left_out[entry] = None
        self.admission.note(dirt.nbytes, is_admitted=False)
        if was_behind and not self.is_behind:
            self.on_room()

    def take_along(self, entry: Entry) -> None:
        """Have the pages in front of one that is being written written too, and its parts."""
        admission = self.admission
        if admission.mode == "all":
            return
        for part in entry.parts or ():
            self._insist(part)
        front = entry.parent
        while front is not None and not front.records and front not in admission.insisted:
            self._insist(front)
            front = front.parent

    def _insist(self, entry: Entry) -> None:
        if not entry.records:
            self.admission.insisted.add(entry)
            if entry in self.admission.left_out:
                self._queue(entry)

    def hurry(self, entry: Entry) -> None:
        """Have an entry written soon: it would be evicted if there were a copy."""
        if entry in self.given_up or entry in self.admission.left_out:
            self._queue(entry)
        dirty = self.dirty_of(entry)
        dirt = dirty.get(entry)
        if dirt is not None and dirt.touched >= 0:
            dirty[entry] = dirt._replace(touched=-1.0)
            dirty.move_to_end(entry, last=False)
            self.hurried_bytes += dirt.nbytes
            self.on_work()

    def recall(self) -> None:
        """Queue what was given up or left out: this is the last time that it can be written."""
        for entry in [*self.given_up, *self.admission.left_out]:
            self._queue(entry)

    def queue(self, entry: Entry) -> None:
        """Queue an entry that became dirty. What is being written is not its value any more."""
        self.admission.put(entry)
        self._queue(entry)

    def _queue(self, entry: Entry) -> None:
        self.given_up.pop(entry, None)
        self.admission.left_out.pop(entry, None)
        writing = self.writing.get(entry)
        if writing is not None:
            writing.is_void = True
            self.forget_write(writing)
        self.num_queued += 1
        if entry.nbytes > self._payload_bytes_any:
            self._count_too_large(entry.nbytes)
            if entry.nbytes > self.payload_bytes_max:
                return
        slot = entry.slot
        if slot is None:
            nbytes = len(entry.key) + entry.nbytes + ENTRY_BYTES
            self.queued_small_bytes += nbytes
            is_due = self.queued_small_bytes > self.small_marks.high
        else:
            nbytes = slot.slab.slot_bytes
            self.queued_bytes += nbytes
            is_due = self.queued_bytes > self.marks.high
        self.dirty_of(entry)[entry] = Dirt(nbytes, slot is None, entry.touched)
        if is_due:
            self.on_work()

    def _count_too_large(self, nbytes: int) -> None:
        for tier in self.tiers:
            tier.stats.too_large += nbytes > tier.payload_bytes_max

    def take_out(self, entry: Entry) -> Dirt | None:
        """Take an entry out of its queue, before its value changes or goes."""
        dirt = self.dirty_of(entry).pop(entry, None)
        self.admission.forget(entry)
        if dirt is None:
            self.given_up.pop(entry, None)
            return None
        if dirt.is_small:
            self.queued_small_bytes -= dirt.nbytes
        else:
            self.queued_bytes -= dirt.nbytes
        if dirt.touched < 0:
            self.hurried_bytes -= dirt.nbytes
        return dirt

    def forget_write(self, writing: Writing) -> None:
        """Count a value no longer as one that is being written."""
        if self.writing.get(writing.entry) is not writing:
            return
        was_behind = self.is_behind
        del self.writing[writing.entry]
        self.writing_bytes -= 0 if writing.dirt is None else writing.dirt.nbytes
        if was_behind and not self.is_behind:
            self.on_room()
