"""Replay a request trace through the eviction policies: token hit rates and time per decision.

    python -m bench.eviction_trace [--trace FILE] [--blocks N ...] [--policy NAME ...] [--plain]

The trace is one JSON object a line, as published with Mooncake (FAST 2025): ``timestamp`` in ms,
``input_length`` in tokens, ``hash_ids`` with one id for each block of 512 tokens, where an id stands
for the whole prefix up to its block. A request hits as many tokens as the blocks at its front that
are resident; then all its blocks are used or stored. Only leaves are evicted, as in the engine,
unless ``--plain`` asks for blocks that know nothing of each other.

A decision is all the policy does for one eviction: choosing and removing the victim, queueing the
newcomer, and queueing the victim's parent when it has become a leaf. It is processor time.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import thread_time

from respkv.engine.entry import Entry
from respkv.engine.eviction import POLICIES, Verdict, make_policy

BLOCK_TOKENS = 512
_NEIGHBOUR = Path("shared", "traces", "conversation_trace.jsonl")


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it came in seconds, its tokens, and the ids of its blocks."""

    now: float
    num_tokens: int
    blocks: list[int]


class Replay:
    """A cache of ``blocks_max`` blocks without bytes.

    is_chained: whether a block stands behind the one before it, so that leaves go first.
    policy_s:   time spent in the policy, and in reading the clock twice for each store.
    """

    def __init__(self, policy: str, blocks_max: int, *, is_chained: bool = True) -> None:
        self.policy = make_policy(policy)
        self.blocks_max = blocks_max
        self.is_chained = is_chained
        self.entries: dict[int, Entry] = {}
        self.num_tokens = 0
        self.hit_tokens = 0
        self.num_stored = 0
        self.num_evicted = 0
        self.num_verdicts = 0
        self.policy_s = 0.0
        self.slowest_s = 0.0
        self._in_use: Entry | None = None

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / self.num_tokens

    def serve(self, request: Request) -> None:
        """Count what of a request is resident, then use or store all its blocks."""
        entries = self.entries
        prefix = 0
        while prefix < len(request.blocks) and request.blocks[prefix] in entries:
            prefix += 1
        self.num_tokens += request.num_tokens
        self.hit_tokens += min(prefix * BLOCK_TOKENS, request.num_tokens)
        self._in_use = None
        for block in request.blocks:
            entry = entries.get(block)
            if entry is None:
                entry = entries[block] = self._store(block, request.now)
            else:
                entry.touched = request.now
                entry.hits += 1
            self._in_use = entry

    def _store(self, block: int, now: float) -> Entry:
        entry = Entry(b"%d" % block, "kvpage", BLOCK_TOKENS, now)
        started = thread_time()
        if len(self.entries) >= self.blocks_max:
            self._evict(now)
        self.policy.insert(entry)
        took = thread_time() - started
        self.num_stored += 1
        self.policy_s += took
        self.slowest_s = max(self.slowest_s, took)
        parent = self._in_use if self.is_chained else None
        if parent is not None:
            entry.parent = parent
            parent.children = parent.children or set()
            parent.children.add(entry)
        return entry

    def _evict(self, now: float) -> None:
        victim = self.policy.victim(self._verdict, now)
        assert victim is not None
        self.policy.remove(victim)
        self.num_evicted += 1
        del self.entries[int(victim.key)]
        parent, victim.parent = victim.parent, None
        if parent is not None and parent.children is not None:
            parent.children.discard(victim)
            if not parent.children:
                parent.children = None
                self.policy.insert(parent)

    def _verdict(self, entry: Entry) -> Verdict:
        self.num_verdicts += 1
        if entry.children:
            return Verdict.PARENT
        return Verdict.HELD if entry is self._in_use else Verdict.EVICT


def find_trace() -> Path | None:
    """Return the trace that RESPKV_TRACE names, or the one beside this repository, if there."""
    beside = Path(__file__).parent.parent.parent / _NEIGHBOUR
    path = Path(os.environ.get("RESPKV_TRACE", beside))
    return path if path.is_file() else None


def read_trace(path: Path) -> Iterator[Request]:
    """Yield the requests of a trace in the order of the file."""
    with path.open() as lines:
        for line in lines:
            record = json.loads(line)
            yield Request(record["timestamp"] / 1000, record["input_length"], record["hash_ids"])


def clock_s() -> float:
    """Measure what reading the clock once takes."""
    started = thread_time()
    for _ in range(10_000):
        thread_time()
    return (thread_time() - started) / 10_000


def main() -> None:
    """Print a table of all the runs asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trace", type=Path, default=find_trace())
    parser.add_argument("--blocks", type=int, nargs="+", default=[1000, 6000, 20000])
    parser.add_argument("--policy", nargs="+", default=POLICIES, choices=POLICIES)
    parser.add_argument("--plain", action="store_true", help="blocks have no parents")
    options = parser.parse_args()
    if options.trace is None:
        parser.error("no trace: give --trace or set RESPKV_TRACE")
    requests = list(read_trace(options.trace))
    clock = clock_s()
    print("policy    blocks  hit rate  evicted  us each  worst us  verdicts each")
    for policy in options.policy:
        for blocks in options.blocks:
            replay = Replay(policy, blocks, is_chained=not options.plain)
            for request in requests:
                replay.serve(request)
            num = max(replay.num_evicted, 1)
            each_us = (replay.policy_s - replay.num_stored * clock) / num * 1e6
            print(
                f"{policy:8} {blocks:7} {replay.hit_rate:9.4f} {replay.num_evicted:8} "
                f"{each_us:8.2f} {replay.slowest_s * 1e6:9.0f} {replay.num_verdicts / num:14.2f}"
            )


if __name__ == "__main__":
    main()
