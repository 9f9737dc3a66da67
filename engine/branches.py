"""Pages by what is in them: those that may stand for the same place of a prompt, side by side.

A page's id says whether all its tokens are the same. To match inside a page, all pages behind one
parent are kept by their tokens, in order: whichever has the longest beginning in common with a given
page is then one of its two neighbours, found by bisection. Only pages of one ``branch`` are compared
(chain.py): the same parent, and the same salt, tenant and adapter.

The alternative, a radix tree over tokens, finds the same; its nodes would have to be split and merged
with every put and eviction, while an order changes at one place.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

from respkv.chain import common_tokens
from respkv.engine.entry import Entry


class Branches:
    """All pages that came with their tokens, by branch, each branch in the order of their tokens.

    nbytes: of these tokens, and of the names of the branches with each page.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._branches: dict[bytes, list[Entry]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._branches.values()))

    def insert(self, entry: Entry) -> None:
        """Add a page; nothing happens if it is there already."""
        siblings = self._branches.get(entry.branch)
        if siblings is None:
            self._branches[entry.branch] = [entry]
        elif self._find(siblings, entry) is None:
            insort(siblings, entry, key=_token_ids)
        else:
            return
        self.nbytes += _bytes_of(entry)

    def remove(self, entry: Entry) -> None:
        """Take a page out; nothing happens if it is not there."""
        siblings = self._branches.get(entry.branch)
        at = self._find(siblings, entry) if siblings is not None else None
        if at is None:
            return
        assert siblings is not None
        del siblings[at]
        self.nbytes -= _bytes_of(entry)
        if not siblings:
            del self._branches[entry.branch]

    def clear(self) -> None:
        """Forget all pages."""
        self._branches.clear()
        self.nbytes = 0

    def find(self, branch: bytes, token_ids: bytes) -> tuple[Entry | None, int]:
        """Return the page with the longest beginning in common, and how many tokens that is.

        Of two that have the same, the one whose bytes are in memory.
        """
        siblings = self._branches.get(branch)
        if siblings is None:
            return None, 0
        at = bisect_left(siblings, token_ids, key=_token_ids)
        best, longest = None, 0
        for neighbour in siblings[max(0, at - 1) : at + 1]:
            count = common_tokens(neighbour.token_ids, token_ids)
            if count > longest or (
                count and count == longest and best is not None and best.is_cold
            ):
                best, longest = neighbour, count
        return best, longest

    def near(self, branch: bytes, token_ids: bytes, count_max: int) -> list[tuple[Entry, int]]:
        """Return pages that begin as a page does, and for how many tokens; the longest first."""
        siblings = self._branches.get(branch, [])
        after = bisect_left(siblings, token_ids, key=_token_ids)
        before = after - 1
        found: list[tuple[Entry, int]] = []
        while len(found) < count_max:
            left = common_tokens(siblings[before].token_ids, token_ids) if before >= 0 else 0
            is_right = after < len(siblings)
            right = common_tokens(siblings[after].token_ids, token_ids) if is_right else 0
            if not max(left, right):
                break
            if right >= left:
                found.append((siblings[after], right))
                after += 1
            else:
                found.append((siblings[before], left))
                before -= 1
        return found

    def beginnings(self, entry: Entry) -> Iterator[Entry]:
        """Yield the siblings whose tokens are the beginning of a page's tokens, longest first."""
        siblings = self._branches.get(entry.branch, [])
        tokens = entry.token_ids
        while tokens:
            at = bisect_left(siblings, tokens, key=_token_ids)
            # A beginning stands in front of all that has it; what is nearest shares the most.
            if not at:
                return
            before = siblings[at - 1].token_ids
            if tokens.startswith(before):
                yield siblings[at - 1]
                tokens = before
            else:
                tokens = tokens[: _common_bytes(before, tokens)]
                at = bisect_left(siblings, tokens, key=_token_ids)
                if at < len(siblings) and siblings[at].token_ids == tokens:
                    yield siblings[at]

    def continuation(self, entry: Entry) -> Entry | None:
        """Return a sibling whose tokens begin with all those of a page, and go on."""
        siblings = self._branches.get(entry.branch, [])
        at = bisect_right(siblings, entry.token_ids, key=_token_ids)
        if at < len(siblings) and siblings[at].token_ids.startswith(entry.token_ids):
            return siblings[at]
        return None

    def all(self) -> Iterator[Entry]:
        """Yield every page."""
        for siblings in self._branches.values():
            yield from siblings

    def check(self) -> None:
        """Assert that every branch is in order and that none is empty."""
        for branch, siblings in self._branches.items():
            assert siblings
            assert all(entry.branch == branch and entry.token_ids for entry in siblings)
            tokens = [entry.token_ids for entry in siblings]
            assert tokens == sorted(tokens)
            assert len({entry.key for entry in siblings}) == len(siblings)
        assert self.nbytes == sum(map(_bytes_of, self.all()))

    @staticmethod
    def _find(siblings: list[Entry], entry: Entry) -> int | None:
        """Return where a page stands; others may have the same tokens (under an older key)."""
        at = bisect_left(siblings, entry.token_ids, key=_token_ids)
        while at < len(siblings) and siblings[at].token_ids == entry.token_ids:
            if siblings[at] is entry:
                return at
            at += 1
        return None


def _token_ids(entry: Entry) -> bytes:
    return entry.token_ids


def _bytes_of(entry: Entry) -> int:
    return len(entry.token_ids) + len(entry.branch)


def _common_bytes(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other))
    difference = int.from_bytes(one[:length], "big") ^ int.from_bytes(other[:length], "big")
    return length - (difference.bit_length() + 7) // 8
