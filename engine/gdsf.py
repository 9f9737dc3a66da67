"""GDSF: what costs most to compute again for each byte it takes, and is used most, stays longest.

The cost of a page is what prefill would pay for it: each token passes all weights once, and attends
to all tokens before it. The first part is the same for every token, the second grows with its depth,
so of two pages used alike the deeper one is worth more. Only the ratio of both parts matters here;
it is that of Llama-3.1-8B: 2 x 8.03e9 parameters against 4 x 32 layers x 4096 wide for each token of
depth, equal at about 30,600 tokens. Larger models have a larger such depth, up to 100,000 for 70B.

Alternative left aside: the model's own numbers. A schema knows layers and heads, not parameters.

Source: Cherkasova, Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy,
HP Laboratories 1998.
"""

from respkv.engine.entry import Entry
from respkv.engine.queues import Ranked

LINEAR_FLOPS = 2 * 8.03e9  # for each token
DEPTH_FLOPS = 4 * 32 * 4096  # for each token, for each token before it
TOKEN_BYTES = (
    131_072  # of a token's K and V in 16 bits; what a plain value of unknown cost stands for
)


def flops_per_byte(entry: Entry) -> float:
    """Return what computing an entry again costs for each byte that keeping it takes."""
    if not entry.tokens:
        return LINEAR_FLOPS / TOKEN_BYTES
    before = entry.depth + entry.tokens / 2
    return entry.tokens * (LINEAR_FLOPS + DEPTH_FLOPS * before) / max(entry.nbytes, 1)


class Gdsf(Ranked):
    """Lowest value first, with the ageing of greedy dual. ``mark``: hits when it was ranked.

    An entry's rank is uses x cost / bytes, plus the rank of the last victim at that time.
    """

    def _rank(self, entry: Entry) -> float:
        entry.mark = entry.hits
        return self.shared.inflation + (entry.hits + 1) * flops_per_byte(entry)

    def _is_stale(self, entry: Entry, rank: float) -> bool:
        return entry.hits != entry.mark

    def note_evicted(self, entry: Entry, place: float) -> None:
        self.shared.inflation = max(self.shared.inflation, place)
