"""What each group of layers of a hybrid model needs of a prompt, and up to where all can serve it.

A position can be gone on from only if every layer has what it needs there. Full attention needs
every token before it, a sliding window those of the window, a recurrent layer its state at this very
position. So of the longest run of pages that is here, the last position counts that all groups can
serve: there may be gaps in a sliding group far in front of it, and positions without a state behind
it. (SGLang's and vLLM's hybrid caches decide the same for blocks; here attention alone may end
inside a page, and a state may stand anywhere.)

Pages of groups hang on the pages of the namespace's own geometry, ``<page key>.g.<group>``; a state
hangs on the page that holds its position, and has the id of the position, ``.s.<group>``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from respkv.chain import Prompt
from respkv.engine.branches import Branches
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.history import Reason
from respkv.engine.namespaces import TAG_BYTES, Group, Kind, Schema
from respkv.engine.sequences import Found, Piece
from respkv.engine.watch import Watcher
from respkv.page import Part, group_of, part_key

OTHERS_MAX = 8  # pages that begin alike are asked whether their groups can serve more
Find = Callable[[bytes], Entry | None]


class Need(NamedTuple):
    """What a get reads of one entry.

    first_token, num_tokens: which tokens of the prompt; of a state, its position and 0.
    skip:                    tokens of the entry's piece in front of them.
    """

    entry: Entry
    first_token: int
    num_tokens: int
    skip: int


class States(Watcher):
    """Where in a page states of recurrent layers are, by the branch of the page and the group."""

    def __init__(self) -> None:
        self._places: dict[Entry, tuple[bytes, int]] = {}
        self._offsets: dict[bytes, dict[int, int]] = {}  # tokens into the page: how many entries

    def offsets(self, branch: bytes, group: bytes) -> list[int]:
        """Return after how many tokens of a page there are states, the last first.

        Pages of one branch differ in their tokens, so such a state may be another prompt's.
        """
        counts = self._offsets.get(_place(branch, group))
        return sorted(counts, reverse=True) if counts else []

    def stored(self, entry: Entry, *, is_new: bool) -> None:
        """A state has come."""
        group = _state_of(entry)
        if group is None or not entry.token_ids or entry in self._places:
            return
        place, offset = self._places[entry] = _place(entry.branch, group), entry.tokens
        counts = self._offsets.setdefault(place, {})
        counts[offset] = counts.get(offset, 0) + 1

    def restored(self, entry: Entry) -> None:
        """A state of the last run is here."""
        self.stored(entry, is_new=True)

    def removed(self, entry: Entry, reason: Reason) -> None:
        """A state goes."""
        if entry not in self._places:
            return
        place, offset = self._places.pop(entry)
        counts = self._offsets[place]
        counts[offset] -= 1
        if not counts[offset]:
            del counts[offset]
        if not counts:
            del self._offsets[place]

    def cleared(self) -> None:
        """All have gone."""
        self._places.clear()
        self._offsets.clear()


class Groups:
    """What the groups of every namespace can serve of what is in a cache."""

    def __init__(self, cache: Cache, branches: Branches) -> None:
        self.states = States()
        self._cache = cache
        self._branches = branches
        for entry in cache.entries.values():
            self.states.restored(entry)
        cache.watchers.add(self.states)

    def serve(self, prompt: Prompt, found: Found) -> Found:
        """Cut what was found of a prompt to what all groups of its namespace can serve."""
        schema = self._cache.namespaces.find(prompt.namespace)
        if schema is None or not schema.groups:
            return found
        tokens = serveable(schema, prompt, found, self._cache.find, self.states)
        best = cut(found, tokens, prompt.page_tokens)
        if tokens < found.tokens and not tokens % prompt.page_tokens:
            for other in self._others(prompt, found, tokens):
                count = serveable(schema, prompt, other, self._cache.find, self.states)
                if count > best.tokens:
                    best = cut(other, count, prompt.page_tokens)
        return best

    def _others(self, prompt: Prompt, found: Found, tokens: int) -> Iterator[Found]:
        """Yield what else begins as the page behind some tokens does, which a group may lack."""
        index = tokens // prompt.page_tokens
        rest = found.tokens - tokens
        branch, token_ids = prompt.branch(index), prompt.token_ids(index)
        for page, count in self._branches.near(branch, token_ids, OTHERS_MAX):
            if page is found.entries[index] or self._cache.find(page.key) is not page:
                continue
            count = min(count, rest)
            yield Found(tokens + count, found.pages[:index], page, count)

    def limits(self, prompt: Prompt, found: Found) -> dict[bytes, int]:
        """Return up to which token each group serves what was found, of those that do not serve all."""
        schema = self._cache.namespaces.find(prompt.namespace)
        view = _View(prompt, found, self._cache.find, self.states)
        groups = () if schema is None else schema.groups
        ends = {group.name: view.last(group, found.tokens) for group in groups}
        return {name: end for name, end in ends.items() if end < found.tokens}

    def is_whole(self, page: Entry) -> bool:
        """Whether a page has the pages of all groups that have any."""
        schema = self._cache.namespaces.find(page.namespace)
        groups = () if schema is None else schema.groups
        find = self._cache.find
        return all(group.kind is Kind.STATE or has_page(page, group, find) for group in groups)

    def use(self, prompt: Prompt, found: Found, until: float) -> list[Entry]:
        """Use what all groups need at the position that was found, and keep it until then.

        Returns: the entries, without those of the namespace's own geometry.
        """
        schema, cache = self._cache.namespaces.find(prompt.namespace), self._cache
        used = [
            need.entry
            for group in (() if schema is None else schema.groups)
            for need in needs(prompt, group, found, cache.find)
        ]
        for entry in used:
            entry.touched = cache.clock.now
            cache.promise(entry, until)
        return used

    def needs(self, prompt: Prompt, group: Group, found: Found) -> list[Need]:
        """Return what a get of a group reads, in order, for a prompt of which ``found`` is served."""
        return needs(prompt, group, found, self._cache.find)


# -- finding --------------------------------------------------------------------------------------


def serveable(schema: Schema, prompt: Prompt, found: Found, find: Find, states: States) -> int:
    """Return the last position up to ``found.tokens`` that every group can serve.

    find: returns the live entry of a key.
    """
    view = _View(prompt, found, find, states)
    tokens, before = found.tokens, -1
    while tokens != before:
        before = tokens
        for group in schema.groups:
            tokens = view.last(group, tokens)
    return tokens


def cut(found: Found, tokens: int, page_tokens: int) -> Found:
    """Return what was found up to a position."""
    if tokens >= found.tokens:
        return found
    num_pages, rest = divmod(tokens, page_tokens)
    holder = found.entries[num_pages] if rest else None
    return Found(tokens, found.pages[:num_pages], holder, rest)


def needs(prompt: Prompt, group: Group, found: Found, find: Find) -> list[Need]:
    """Return what a get of a group reads for the ``found.tokens`` tokens that it serves, in order.

    The group with the empty name is that of the namespace's own geometry.
    """
    end, page_tokens = found.tokens, prompt.page_tokens
    if not end:
        return []
    if group.kind is Kind.STATE:
        state = find(state_key(prompt, end, group.name))
        return [] if state is None else [Need(state, end, 0, 0)]
    first = max(0, end - group.window) if group.kind is Kind.SLIDING else 0
    made: list[Need] = []
    for index, page in enumerate(found.entries):
        start = index * page_tokens
        stop = min(start + page_tokens, end)
        if stop <= first:
            continue
        entry = page if not group.name else find(bound_key(page.key, group.name))
        if entry is not None:
            skip = max(0, first - start)
            made.append(Need(entry, start + skip, stop - start - skip, skip))
    return made


def clip(made: Sequence[Need], first_token: int) -> list[Need]:
    """Return what is needed from a token of the prompt on; a state is needed in any case."""
    clipped: list[Need] = []
    for need in made:
        cut_off = max(0, first_token - need.first_token)
        if not need.num_tokens or not cut_off:
            clipped.append(need)
        elif cut_off < need.num_tokens:
            entry, first, count, skip = need
            clipped.append(Need(entry, first + cut_off, count - cut_off, skip + cut_off))
    return clipped


class _View:
    """What each group has of what was found of a prompt, looked up once."""

    def __init__(self, prompt: Prompt, found: Found, find: Find, states: States) -> None:
        self._prompt = prompt
        self._pages = found.entries
        self._page_tokens = prompt.page_tokens
        self._find = find
        self._states = states
        self._has: dict[tuple[bytes, int], bool] = {}
        self._runs: dict[bytes, int] = {}

    def last(self, group: Group, tokens: int) -> int:
        """Return the last position up to ``tokens`` that a group can serve."""
        if group.kind is Kind.STATE:
            return self._last_state(group, tokens)
        if group.kind is Kind.SLIDING:
            return self._last_sliding(group, tokens)
        return min(tokens, self._run(group) * self._page_tokens)

    def _last_sliding(self, group: Group, tokens: int) -> int:
        page = self._num_pages(tokens) - 1
        while page >= 0 and (page + 1) * self._page_tokens > tokens - group.window:
            if not self._has_page(group, page):
                tokens = page * self._page_tokens
            page -= 1
        return tokens

    def _last_state(self, group: Group, tokens: int) -> int:
        prompt = self._prompt
        for page in range(self._num_pages(tokens) - 1, -1, -1):
            start = page * self._page_tokens
            entry = self._pages[page]
            branch = entry.branch if entry.token_ids else prompt.branch(page)
            for offset in self._states.offsets(branch, group.name):
                if start + offset > tokens:
                    continue
                state = self._find(state_key(prompt, start + offset, group.name))
                if state is not None and is_piece(state, group, offset):
                    return start + offset
        return 0

    def _run(self, group: Group) -> int:
        """Return how many pages from the start have theirs of a group; a loop of thousands."""
        count = self._runs.get(group.name)
        if count is not None:
            return count
        find, suffix, full = self._find, bound_key(b"", group.name), self._page_tokens
        full_bytes, tag, count = group.piece_bytes(full), self._prompt.tag, 0
        for page in self._pages:
            part = find(page.key + suffix)
            nbytes = full_bytes if page.tokens == full else group.piece_bytes(page.tokens)
            if part is None or part.nbytes != nbytes or part.kind != "kvpage":
                break
            if part.branch[:TAG_BYTES] != tag:  # it was there before its page, for another schema
                break
            count += 1
        self._runs[group.name] = count
        return count

    def _num_pages(self, tokens: int) -> int:
        return -(-tokens // self._page_tokens)

    def _has_page(self, group: Group, page: int) -> bool:
        has = self._has.get((group.name, page))
        if has is None:
            has = has_page(self._pages[page], group, self._find)
            self._has[group.name, page] = has
        return has


def has_page(page: Entry, group: Group, find: Find) -> bool:
    """Whether a page has the page of another group that goes with it."""
    entry = find(bound_key(page.key, group.name))
    if entry is None or not is_piece(entry, group, page.tokens):
        return False
    return entry.branch[:TAG_BYTES] == page.branch[:TAG_BYTES]  # else it is another schema's


def is_piece(entry: Entry, group: Group, tokens: int) -> bool:
    """Whether an entry is what a group has of so many tokens, or one of its states."""
    return entry.kind == "kvpage" and entry.nbytes == group.piece_bytes(tokens)


# -- putting --------------------------------------------------------------------------------------


class PartPiece(NamedTuple):
    """What a put of a group stores for one page of its prompt.

    page:       the page that it hangs on; None: that is not here, and has to be put first.
    num_tokens: of the payload; nbytes: its size.
    is_there:   nothing has to be stored: it is here, or in what is longer.
    """

    key: bytes
    page: Entry | None
    num_tokens: int
    nbytes: int
    is_there: bool


def part_pieces(pieces: Sequence[Piece], group: Group, find: Find) -> list[PartPiece]:
    """Return what a put of a group with pages consists of, one for each piece of its prompt."""
    return [_part_piece(piece, group, find) for piece in pieces]


def _part_piece(piece: Piece, group: Group, find: Find) -> PartPiece:
    page, nbytes = piece.there, group.piece_bytes(piece.num_tokens)
    key = bound_key(piece.key, group.name)
    if page is None:
        return PartPiece(key, None, piece.num_tokens, nbytes, False)
    # What is longer than a tail has, or will get, a longer page of the group too.
    is_there = page.key != piece.key or has_page(page, group, find)
    return PartPiece(key, page, piece.num_tokens, nbytes, is_there)


def bound_options(page: Entry, how: Put) -> Put:
    """Return how the page of a group is to be kept: with its page, and as long."""
    return replace(
        how,
        kind="kvpage",
        expires_ms=0,
        tokens=page.tokens,
        parent=page.key,
        branch=b"",
        token_ids=b"",
        depth=page.depth,
    )


def state_options(prompt: Prompt, how: Put) -> Put:
    """Return how the state at the end of a prompt is to be kept.

    how: as ``Sequences.part_options`` says: behind the page that holds the position.
    """
    index = (prompt.num_tokens - 1) // prompt.page_tokens
    branch, token_ids = prompt.branch(index), prompt.token_ids(index)
    tokens = prompt.num_tokens - index * prompt.page_tokens
    return replace(how, branch=branch, token_ids=token_ids, tokens=tokens)


def bound_key(key: bytes, group: bytes) -> bytes:
    """Return the key of the page of a group that goes with a page."""
    return part_key(key, b"g." + group)


def state_key(prompt: Prompt, num_tokens: int, group: bytes) -> bytes:
    """Return the key of the state after so many tokens of a prompt."""
    return part_key(prompt.position_key(num_tokens), b"s." + group)


def _state_of(entry: Entry) -> bytes | None:
    return (group_of(entry.key) or None) if entry.part is Part.FREE else None


def _place(branch: bytes, group: bytes) -> bytes:
    return branch + b"." + group
