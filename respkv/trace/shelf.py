"""A cache of blocks without bytes: what the engine decides, on entries without slots.

It drives what the engine has: a policy of ``engine/eviction.py``, and the requests of
``engine/requests.py`` that a policy may ask about. Each request matches the run of resident blocks at
its front, then stores the rest, as KV.MATCH and KV.PUT do; leaves go first. What the server adds
beyond that (sizes, leases, files) is left out.

A decision is all that one eviction takes: what is learned from the match, choosing and removing the
victim, queueing the newcomer, and queueing the victim's parent when it has become a leaf. It is
processor time, from the first eviction on: before that there is nothing to decide. Names of blocks
and the shelf's own index are none of it.
"""

from time import thread_time

from respkv.engine.clock import Clock
from respkv.engine.entry import Entry
from respkv.engine.eviction import EVICT, HELD, PARENT, Verdict, make_policy
from respkv.engine.requests import Requests
from respkv.trace.format import Request

LISTENERS = ("survival",)  # the policies that ask about requests, and that hints reach
_EPOCH_S = 1.0  # the engine takes 0.0 for no time at all


class Shelf:
    """A cache of ``blocks_max`` blocks.

    is_chained: whether blocks know what they stand behind, as in the engine, so that leaves go first.
    policy_s:   time spent in the policy since the cache was full, and in reading the clock twice for
                each of the ``num_timed`` calls of it.
    """

    def __init__(
        self, policy: str, blocks_max: int, block_tokens: int, *, is_chained: bool = True
    ) -> None:
        self.blocks_max = blocks_max
        self.block_tokens = block_tokens
        self.is_chained = is_chained
        self.clock = Clock()
        self.requests = Requests(self.clock)
        self.policy = make_policy(policy, self.requests.survival)
        self.entries: dict[int, Entry] = {}
        self.num_stored = 0
        self.num_evicted = 0
        self.num_verdicts = 0
        self.num_timed = 0
        self.policy_s = 0.0
        self.slowest_s = 0.0
        self._in_use: Entry | None = None
        self._gone: Entry | None = None  # evicted, and still among the entries

    def serve(self, request: Request, *, is_last: bool = False) -> int:
        """Return how many blocks at the front are resident; then use or store all of them.

        is_last: tell the cache that nothing will go on from this request.
        """
        self.clock.now = request.at_s + _EPOCH_S
        run = self._match(request)
        parent = run[-1] if run else None
        blocks = request.stored
        for place in range(len(run), len(blocks)):
            tokens = self.block_tokens
            if place == len(request.blocks) - 1:
                tokens = request.num_tokens - place * self.block_tokens
            entry = self._use(blocks[place], place, tokens, parent)
            if entry is None:
                break  # all that is resident is in use by this request
            parent = entry
        if is_last and parent is not None and parent.request is not None:
            self.requests.end_request(parent.request)
        return len(run)

    @property
    def ghost_bytes(self) -> float:
        """Bytes kept of blocks that are not there, for each that could be."""
        asked = self.requests.ghost_bytes if self.policy.name in LISTENERS else 0
        return (self.policy.ghost_bytes + asked) / self.blocks_max

    @property
    def decision_us(self) -> float:
        """Processor time of an eviction on average; 0.0 when there was none."""
        net_s = max(self.policy_s - self.num_timed * _clock_s(), 0.0)
        return net_s / self.num_evicted * 1e6 if self.num_evicted else 0.0

    def check(self) -> None:
        """Assert that policy and entries agree."""
        self.policy.check(list(self.entries.values()))

    def _match(self, request: Request) -> list[Entry]:
        run: list[Entry] = []
        for block in request.blocks:
            entry = self.entries.get(block)
            if entry is None:
                break
            entry.touched = self.clock.now
            entry.hits += 1
            run.append(entry)
        started = thread_time()
        self.requests.matched(run, request.num_tokens, self.clock.now)
        self._count(started)
        return run

    def _use(self, block: int, place: int, tokens: int, parent: Entry | None) -> Entry | None:
        known = self.entries.get(block)
        if known is not None:  # behind a hole: only where blocks do not know each other
            known.touched = self.clock.now
            known.hits += 1
            return known
        self._in_use = parent
        entry = Entry(b"%064x" % block, "kvpage", self.block_tokens, self.clock.now)
        entry.tokens, entry.depth = tokens, place * self.block_tokens
        started = thread_time()
        has_room = self._has_room() or self._evict()
        if has_room:
            self._insert(entry, parent)
        self._count(started)
        if self._gone is not None:
            del self.entries[int(self._gone.key, 16)]
            self._gone = None
        if not has_room:
            return None
        self.entries[block] = entry
        self.num_stored += 1
        return entry

    def _has_room(self) -> bool:
        return len(self.entries) < self.blocks_max

    def _insert(self, entry: Entry, parent: Entry | None) -> None:
        self.policy.insert(entry)
        if parent is not None and self.is_chained:
            entry.parent, entry.parent_key = parent, parent.key
            parent.children = parent.children or set()
            parent.children.add(entry)
        self.requests.stored(entry, is_new=True)

    def _evict(self) -> bool:
        victim = self.policy.victim(self._verdict, self.clock.now)
        if victim is None:
            return False
        self.requests.removed(victim, "evicted")
        self.policy.remove(victim)
        self.num_evicted += 1
        self._gone = victim
        parent, victim.parent = victim.parent, None
        if parent is not None and parent.children is not None:
            parent.children.discard(victim)
            if not parent.children:
                parent.children = None
                self.policy.insert(parent)
        return True

    def _verdict(self, entry: Entry) -> Verdict:
        self.num_verdicts += 1
        if entry.children:
            return PARENT
        return HELD if entry is self._in_use else EVICT

    def _count(self, started: float) -> None:
        took = thread_time() - started
        if not self.num_evicted:
            return
        self.num_timed += 1
        self.policy_s += took
        self.slowest_s = max(self.slowest_s, took)


def _clock_s() -> float:
    """Measure what reading the clock once takes."""
    started = thread_time()
    for _ in range(10_000):
        thread_time()
    return (thread_time() - started) / 10_000
