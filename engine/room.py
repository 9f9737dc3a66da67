"""Room for one more value: which slot it gets, and who must go for it.

Values live in two places. Small ones stay on the heap, under a budget of their own; the others
live in slots of the arena. Entries queue for eviction by place: one policy per size class of slots
and one for the heap. Evicting within a class frees a slot of the right size at once, which is the
steady state of a cache of equal pages. When another class is colder, or the class has no slab yet,
whole slabs move: the cheapest contiguous run of slabs is cleared and cut anew. (memcached's slab
rebalancer has the same aim; it moves one slab at a time in the background, here the put that needs
the room does it, so that a new page size never starves behind an old one.)
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import inf

from respkv.engine.clock import Clock
from respkv.engine.copies import Copies
from respkv.engine.entry import ENTRY_BYTES, Entry
from respkv.engine.eviction import EVICT, HELD, PARENT, UNWRITTEN, Policy, Verdict, make_policy
from respkv.engine.nodes import page_of, right_behind, with_descendants
from respkv.engine.survival import Survival
from respkv.errors import OutOfMemory
from respkv.tiers.slab import Slab, SlabAllocator, Slot

SMALL = 0  # the class of values on the heap
ASK_AGAIN_S = 0.5
GUESSES_MAX = 8
SLOTS_GUESSED = 8
CLEAN_WEIGHT, SPARED_WEIGHT = 0.25, 8.0  # of bytes that can be read again, or written first
MUCH_COLDER = 2.0  # a class whose next victim waited so many times longer has to give


class Room:
    """Slots and heap bytes, and the order in which entries leave them.

    evict: takes an entry's bytes out of memory and calls ``remove`` here; its slot is free then. If
           that loses it, all goes that goes with it (nodes.py).
    lose:  does the same and removes its key as well, whatever copies there are.
    small_max: bytes that keys and values on the heap may take, index entries included.
    survival: what the policies know of requests.
    """

    def __init__(
        self,
        slabs: SlabAllocator,
        policy: str,
        *,
        small_max: int,
        clock: Clock,
        copies: Copies,
    ) -> None:
        self.slabs = slabs
        self.policy = policy
        self.small_max = small_max
        self.small_bytes = 0
        self.slabs_cleared = 0
        self.evict: Callable[[Entry], None] = self.remove
        self.lose: Callable[[Entry], None] = self.remove
        self.survival = Survival()
        self._clock = clock
        self._copies = copies
        self._policies: dict[int, Policy] = {}
        self._asked: dict[int, float] = {}

    def insert(self, entry: Entry) -> None:
        """Queue a newly resident entry for eviction, or one that became a leaf again."""
        self._policy_of(entry).insert(entry)

    def remove(self, entry: Entry) -> None:
        """Take an entry out of its queue."""
        self._policy_of(entry).remove(entry)

    def take(self, nbytes: int, *, may_lose: bool = True) -> Slot:
        """Return a slot for ``nbytes``, held once, after evicting as much as that takes.

        may_lose: whether, as the last resort, values may go that a file tier has still to take.
        Raises OutOfMemory when it can never fit, or when all that could go is pinned or in use.
        """
        slot = self.slabs.take(nbytes)
        return slot if slot is not None else self._take_from_others(nbytes, may_lose)

    def take_small(self, nbytes: int) -> None:
        """Count ``nbytes`` more on the heap, after evicting small values over the budget.

        Raises OutOfMemory when all of them are pinned, or when it can never fit.
        """
        if nbytes > self.small_max:
            raise OutOfMemory(
                f"a small value of {nbytes} bytes with its key never fits: "
                f"small-value-memory is {self.small_max}"
            )
        policy = self._policies.get(SMALL)
        while self.small_bytes + nbytes > self.small_max:
            victim = self._victim(policy) if policy is not None else None
            if victim is None:
                raise OutOfMemory(
                    f"small values: {self.small_bytes} of {self.small_max} bytes are pinned or "
                    "held; raise small-value-memory"
                )
            self.evict(victim)
        self.small_bytes += nbytes

    def give_back_small(self, nbytes: int) -> None:
        """Count ``nbytes`` less on the heap."""
        self.small_bytes -= nbytes
        assert self.small_bytes >= 0

    def shrink(self) -> None:
        """Evict until the budgets hold again after they were lowered; stop at what is pinned."""
        while self.slabs.used_bytes > self.slabs.budget_bytes:
            victim = self._coldest_victim()
            if victim is None:
                break
            self.evict(victim)
        small = self._policies.get(SMALL)
        while small is not None and self.small_bytes > self.small_max:
            victim = self._victim(small)
            if victim is None:
                break
            self.evict(victim)

    def verdict(self, entry: Entry) -> Verdict:
        """Say whether an entry may leave memory now."""
        if entry.records:  # it is found again, so who stands behind it does not matter
            return HELD if self.is_held(entry) else EVICT
        answer = self.final_verdict(entry)
        if answer is EVICT and self._copies.is_on and self._copies.spares(entry):
            self._copies.hurry(entry)
            return UNWRITTEN
        return answer

    def final_verdict(self, entry: Entry) -> Verdict:
        """Say whether an entry may go if nothing else can."""
        if entry.children and not entry.records:
            return PARENT
        if (entry.parts or entry.part) and not entry.records:
            return self._verdict_of_all(page_of(entry))
        return HELD if self.is_held(entry) else EVICT

    def is_any_held(self, page: Entry) -> bool:
        """Whether a page, or a part that would be lost with it, has to stay."""
        if not page.parts:
            return self.is_held(page)
        now = self._clock.now
        return any(each.held_until > now or self.is_held(each) for each in (page, *page.parts))

    def _verdict_of_all(self, page: Entry) -> Verdict:
        if page.children:
            return PARENT
        return HELD if self.is_any_held(page) else EVICT

    def is_held(self, entry: Entry) -> bool:
        """Whether somebody was promised that the entry stays, or is reading it now."""
        now = self._clock.now
        if entry.pinned_until > now or (entry.held_until > now and not entry.records):
            return True  # a promise is that it will be found, and in a file it is
        if entry.slot is not None and entry.slot.holders > 1:
            return True
        # What is to survive is not lost before it is written; what was loaded is there to be read.
        is_unsafe = not entry.records or self._copies.is_awaited(entry)
        return (entry.level > 0 and is_unsafe) or entry in self._copies.kept

    def next_victim(self, nbytes: int) -> Entry | None:
        """Return who would leave for a value of this size, among those of its class."""
        if nbytes > self.slabs.payload_bytes_max:
            return None
        policy = self._policies.get(self.slabs.class_of(nbytes))
        return None if policy is None else policy.victim(self.verdict, self._clock.now)

    def use_policy(self, name: str, entries: Iterator[Entry]) -> None:
        """Change the policy; ``entries`` are all that there are."""
        self.policy = name
        self._policies.clear()
        resident = [entry for entry in entries if not entry.is_cold]
        for entry in sorted(resident, key=lambda entry: entry.touched):
            entry.queue, entry.mark = None, 0.0
            self._policy_of(entry).insert(entry)

    def clear(self) -> None:
        """Forget every queue, when nothing is resident any more."""
        self._policies.clear()

    def check(self, entries: list[Entry]) -> None:
        """Assert that each entry waits in its queue, and that the bytes add up."""
        self.slabs.check()
        by_class: dict[int, list[Entry]] = {}
        for entry in entries:
            by_class.setdefault(self._class_of(entry), []).append(entry)
        for payload_bytes, policy in self._policies.items():
            policy.check(by_class.get(payload_bytes, []))
        assert by_class.keys() <= self._policies.keys()
        small = by_class.get(SMALL, [])
        assert self.small_bytes == sum(small_cost(entry.key, entry.nbytes) for entry in small)

    def _take_from_others(self, nbytes: int, may_lose: bool) -> Slot:
        if nbytes > self.slabs.payload_bytes_max:
            raise OutOfMemory(
                f"a value of {nbytes} bytes never fits: the arena takes at most "
                f"{self.slabs.payload_bytes_max}; raise maxmemory"
            )
        own = self.slabs.class_of(nbytes)
        if self._is_cold_enough(own) and (slot := self._evict_one(own, nbytes)) is not None:
            return slot
        if (slot := self._clear_slabs(nbytes)) is not None:
            return slot
        if (slot := self._evict_one(own, nbytes)) is not None:
            return slot
        if may_lose and self._copies.is_on:
            slot = self._evict_one(own, nbytes, final=True) or self._clear_slabs(nbytes, final=True)
            if slot is not None:
                return slot
        raise OutOfMemory(
            f"no room for {nbytes} bytes: all of the arena's {self.slabs.capacity_bytes} bytes "
            "that could hold them are pinned, leased or in flight"
        )

    def _victim(self, policy: Policy) -> Entry | None:
        """Return who leaves memory next; what has still to be written only if nobody else can."""
        now = self._clock.now
        if self._copies.is_on and not self._copies.can_write:
            policy.release()  # nothing is gained by waiting
        return policy.victim(self.verdict, now) or policy.last_resort(self.final_verdict)

    def _evict_one(self, payload_bytes: int, nbytes: int, *, final: bool = False) -> Slot | None:
        policy = self._policies.get(payload_bytes)
        if policy is None:
            return None
        if self._copies.is_on and not self._copies.can_write:
            policy.release()
        if final:
            victim = policy.last_resort(self.final_verdict)
        else:
            victim = policy.victim(self.verdict, self._clock.now)
        if victim is None:
            return None
        self.evict(victim)
        return self.slabs.take(nbytes)

    def _clear_slabs(self, nbytes: int, *, final: bool = False) -> Slot | None:
        slabs = self._slabs_to_clear(nbytes)
        if slabs is None:
            return None
        if self._copies.is_on and not final and self._hurry(slabs):
            return None
        self.slabs_cleared += len(slabs)
        for slab in slabs:
            for slot in list(slab.used):
                if slot.owner is not None:
                    self._clear(slot.owner)
        return self.slabs.take(nbytes)

    def _hurry(self, slabs: list[Slab]) -> bool:
        """Have what has still to be written in some slabs written; False if there is nothing."""
        spared = [
            slot.owner
            for slab in slabs
            for slot in slab.used
            if slot.owner is not None and self._copies.spares(slot.owner)
        ]
        for entry in spared:
            self._copies.hurry(entry)
        return bool(spared)

    def _weight(self, entry: Entry) -> float:
        if entry.records:
            return CLEAN_WEIGHT
        return SPARED_WEIGHT if self._copies.is_on and self._copies.spares(entry) else 1.0

    def _slabs_to_clear(self, nbytes: int) -> list[Slab] | None:
        """Choose slabs by a look at some of their pages, then make sure of those chosen.

        Looking at every page of a large arena would take seconds, so that is the last resort.
        """
        stuck: dict[Entry, bool] = {}
        spoilt: set[Slab] = set()
        for _ in range(GUESSES_MAX):
            slabs = self.slabs.slabs_to_clear(nbytes, partial(self._guess, spoilt))
            if slabs is None:
                return None  # what a guess takes for held is held
            wrong = [slab for slab in slabs if self._cost(stuck, slab) == inf]
            if not wrong:
                return slabs
            spoilt.update(wrong)
        return self.slabs.slabs_to_clear(nbytes, partial(self._cost, stuck))

    def _guess(self, spoilt: set[Slab], slab: Slab) -> float:
        """Estimate ``_cost`` from a few pages; inf for a slab that was found to be ``spoilt``."""
        if slab in spoilt:
            return inf
        step = max(1, len(slab.slots) // SLOTS_GUESSED)
        slots = [slot for slot in slab.slots[::step] if slot.holders] or list(slab.used)
        cost = 0.0
        for slot in slots:
            entry: Entry | None = slot.owner
            if entry is None or self.is_held(entry):
                return inf
            cost += self._weight(entry) / (1.0 + self._clock.now - entry.touched)
        return cost * slab.used_bytes / len(slots)

    def _cost(self, stuck: dict[Entry, bool], slab: Slab) -> float:
        """What clearing a slab would lose: the sum of its bytes, each by how recently it was used.

        By bytes, not by pages, or one large page just put would go for many small cold ones.

        stuck: what ``_is_stuck`` said so far, so that a chain is walked once and not for each page.
        """
        cost = 0.0
        for slot in slab.used:
            entry: Entry | None = slot.owner
            if entry is None or self._is_stuck(entry, stuck):
                return inf
            cost += self._weight(entry) / (1.0 + self._clock.now - entry.touched)
        return cost * slab.slot_bytes

    def _is_stuck(self, entry: Entry, stuck: dict[Entry, bool]) -> bool:
        """Whether an entry is held, or one behind it that would go with it."""
        if entry.records:
            return self.is_held(entry)
        page = page_of(entry)
        if page is entry and not page.children and not page.parts:
            return self.is_held(page)
        path = [page]
        while path:
            last = path[-1]
            unknown = [each for each in right_behind(last) if each not in stuck]
            if unknown:
                path += unknown
            else:
                stuck[last] = self.is_held(last) or any(map(stuck.get, right_behind(last)))
                path.pop()
        return stuck[page]

    def _clear(self, entry: Entry) -> None:
        if entry.records:
            self.evict(entry)
            return
        for doomed in reversed(with_descendants(page_of(entry))):
            self.lose(doomed)

    def _is_cold_enough(self, own: int) -> bool:
        """Whether a class should evict of its own: no other one is colder by far.

        Clearing slabs looks at every page, so what is a little colder is left alone.
        """
        policy = self._policies.get(own)
        if policy is None:
            return False
        priority, age = policy.age(self._clock.now)
        colder = (priority, age * MUCH_COLDER)
        others = (self._age(name) for name in self._policies if name not in (SMALL, own))
        return all(other <= colder for other in others)

    def _age(self, payload_bytes: int) -> tuple[float, float]:
        """How cold a class is. One whose entries were all held is asked again now and then."""
        policy, now = self._policies[payload_bytes], self._clock.now
        age = policy.age(now)
        is_all_held = len(policy) and age == (-inf, -inf)
        if is_all_held and now - self._asked.get(payload_bytes, -inf) >= ASK_AGAIN_S:
            self._asked[payload_bytes] = now
            policy.victim(self.verdict, now)
            age = policy.age(now)
        return age

    def _coldest_victim(self) -> Entry | None:
        """Return who may go from the coldest class of slots that has somebody who may."""
        now = self._clock.now
        classes = sorted(
            filter(None, self._policies), key=lambda name: self._policies[name].age(now)
        )
        for name in reversed(classes):
            victim = self._policies[name].victim(self.verdict, now)
            if victim is not None:
                return victim
        for name in reversed(classes):
            victim = self._policies[name].last_resort(self.final_verdict)
            if victim is not None:
                return victim
        return None

    def _class_of(self, entry: Entry) -> int:
        return SMALL if entry.slot is None else entry.slot.slab.class_bytes

    def _policy_of(self, entry: Entry) -> Policy:
        payload_bytes = self._class_of(entry)
        policy = self._policies.get(payload_bytes)
        if policy is None:
            policy = self._policies[payload_bytes] = make_policy(self.policy, self.survival)
        return policy


def small_cost(key: bytes, nbytes: int) -> int:
    """Bytes that a value on the heap takes, its key and entry included."""
    return len(key) + nbytes + ENTRY_BYTES
