"""A cache of blocks with a file tier behind it, to see what is worth a write.

Memory is a ``Shelf``. What leaves it goes to files when the engine's admission takes it, and is gone
otherwise; a hit in files raises the block again, and its copy stays. Files drop what was used longest
ago, and what stands behind it.

The server writes ahead of evictions and reclaims whole segments; here a block is written when it leaves
memory, and files drop one block at a time.
"""

import heapq
from itertools import count

from respkv.engine.admission import Admission, Mode
from respkv.engine.entry import Entry
from respkv.engine.eviction import EVICT, HELD, PARENT, Verdict
from respkv.tiers.record import Level, Record
from respkv.trace.format import Request
from respkv.trace.shelf import Shelf

Item = tuple[float, int, int, Entry]  # last use, minus the depth, a number, entry


class FileShelf(Shelf):
    """Memory of ``blocks_max`` blocks, files of ``files_max``.

    num_written: blocks that were written to files. num_raised: that were hit in files.
    """

    def __init__(
        self, policy: str, blocks_max: int, block_tokens: int, *, files_max: int, admission: Mode
    ) -> None:
        super().__init__(policy, blocks_max, block_tokens)
        self.files_max = files_max
        self.admission = Admission(self.clock)
        self.admission.mode = admission
        self.num_written = 0
        self.num_raised = 0
        self._cold: set[Entry] = set()  # in files alone
        self._num_copies = 0
        self._by_age: list[Item] = []  # those with copies; a use since then is noticed lazily
        self._numbers = count()
        self._used: set[Entry] = set()  # by the request that is served now

    def serve(self, request: Request, *, is_last: bool = False) -> int:
        self._used.clear()
        return super().serve(request, is_last=is_last)

    def check(self) -> None:
        self._used.clear()
        self._trim()
        entries = self.entries.values()
        assert self._cold.issubset(entries)
        assert all(entry.records for entry in self._cold)
        assert self._num_copies == sum(bool(entry.records) for entry in entries) <= self.files_max
        assert len(entries) - len(self._cold) <= self.blocks_max
        self.policy.check([entry for entry in entries if entry not in self._cold])

    def _match(self, request: Request) -> list[Entry]:
        run = super()._match(request)
        self._used.update(run)
        for entry in run:
            if entry in self._cold:
                self.num_raised += 1
                if self._has_room() or self._evict():
                    self._cold.remove(entry)
                    self.policy.insert(entry)
        return run

    def _has_room(self) -> bool:
        return len(self.entries) - len(self._cold) < self.blocks_max

    def _insert(self, entry: Entry, parent: Entry | None) -> None:
        super()._insert(entry, parent)
        self._used.add(entry)
        self.admission.put(entry)

    def _evict(self) -> bool:
        victim = self.policy.victim(self._verdict, self.clock.now)
        if victim is None:
            return False
        self.num_evicted += 1
        if victim.records or self._write(victim):
            self.policy.remove(victim)
            self._cold.add(victim)
            if victim.parent is not None:
                self._queue(victim.parent)
            self._trim()
        else:
            self._lose(victim)
        return True

    def _verdict(self, entry: Entry) -> Verdict:
        self.num_verdicts += 1
        if not entry.records and entry.children and not self._cold.issuperset(entry.children):
            return PARENT
        return HELD if entry in self._used else EVICT

    def _write(self, entry: Entry) -> bool:
        """Write a block, if that is worth it; one behind which others are in files always is."""
        is_admitted = self.files_max > 0 and self.admission.admits(entry)
        self.admission.note(self.block_tokens, is_admitted=is_admitted)
        if is_admitted:
            entry.records = (_copy_of(entry),)
            self.num_written += 1
            self._num_copies += 1
            self._push(entry)
        return is_admitted

    def _push(self, entry: Entry) -> None:
        heapq.heappush(self._by_age, (entry.touched, -entry.depth, next(self._numbers), entry))

    def _trim(self) -> None:
        """Drop copies until files hold no more than they may, those used longest ago first."""
        while self._num_copies > self.files_max:
            touched, _, _, entry = heapq.heappop(self._by_age)
            if not entry.records:
                continue  # it has gone, with one that it stood behind
            if entry.touched != touched:
                self._push(entry)
                continue
            if entry in self._used:  # by a prompt longer than all files
                self._push(entry)
                return
            self.admission.dropped(entry)
            if entry in self._cold:
                for doomed in _with_all_behind(entry):
                    self._lose(doomed)
            else:
                entry.records = ()
                self._num_copies -= 1
                self._queue(entry)

    def _lose(self, entry: Entry) -> None:
        """Remove a block of which nothing is left; all behind it have gone before."""
        self.requests.removed(entry, "evicted")
        self.admission.lost(entry)
        self.admission.forget(entry)
        if entry in self._cold:
            self._cold.remove(entry)
        else:
            self.policy.remove(entry)
        self._num_copies -= bool(entry.records)
        entry.records = ()
        del self.entries[int(entry.key, 16)]
        parent, entry.parent = entry.parent, None
        if parent is not None and parent.children is not None:
            parent.children.discard(entry)
            if not parent.children:
                parent.children = None
            self._queue(parent)

    def _queue(self, entry: Entry) -> None:
        """Let a block be asked again whether it may go, now that those behind it have gone."""
        if entry not in self._cold and int(entry.key, 16) in self.entries:
            self.policy.insert(entry)


def _with_all_behind(entry: Entry) -> list[Entry]:
    """Return a block and all that stand behind it, each before the one it stands behind."""
    found = [entry]
    for each in found:
        found += each.children or ()
    found.reverse()
    return found


def _copy_of(entry: Entry) -> Record:
    return Record(0, 0, 0, 0, 0, 0, 0, 0, Level.MEMORY, entry)
