"""Prompts and the pages that are here of them: matched to the token, and put piece by piece.

A prompt is matched page by page by the ids of its pages (chain.py). Where that run ends, some page
behind the last one of it may still begin with the same tokens, as far as the prompt goes or as far
as the two agree; its K and V of those tokens are the prompt's own. So no token of reuse is lost to
the borders of pages.

A prompt is put as full pages and a tail, the last tokens that fill no page. A tail is a page with
fewer tokens. When a longer page or tail that begins with it has come, nothing needs it any more and
it goes (``tidy``); what hangs on its positions, as logits do, hangs on the longer one then.

Nothing is found under another schema: every branch begins with the tag of the schema under which
the page was put.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from respkv.chain import NO_EXTRAS, Extras, Prompt
from respkv.engine.branches import Branches
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.history import Reason
from respkv.engine.namespaces import TAG_BYTES
from respkv.engine.nodes import has_bound_parts_of, page_of
from respkv.engine.prefix import longest_run
from respkv.engine.prompts import Prompts
from respkv.engine.watch import Watcher
from respkv.errors import CommandError, SequenceGap
from respkv.page import Part, part_key

FIRST_PAGES = 32  # are hashed before the first is looked for; then four times as many, and so on


@dataclass(slots=True)
class Found:
    """What is here of a prompt, from its start.

    tokens:         how many of its tokens.
    pages:          its full pages; some may be cold.
    partial:        the page or tail that has the next ``partial_tokens`` of them as its first ones.
    """

    tokens: int
    pages: list[Entry]
    partial: Entry | None = None
    partial_tokens: int = 0

    @property
    def entries(self) -> list[Entry]:
        """All pages that the tokens are in, in order."""
        return self.pages if self.partial is None else [*self.pages, self.partial]


@dataclass(slots=True)
class Piece:
    """A page or a tail that a prompt consists of, as ``Put`` wants it described.

    index:       which page of the prompt it is; first_token: where in the prompt it begins.
    there:       what has it already: the entry of its key, or for a tail one that begins with it.
    """

    key: bytes
    index: int
    first_token: int
    num_tokens: int
    branch: bytes
    token_ids: bytes
    parent_key: bytes
    depth: int
    there: Entry | None

    @property
    def is_there(self) -> bool:
        """Whether nothing has to be stored for it."""
        return self.there is not None


class Sequences(Watcher):
    """The prompts of all namespaces.

    serve: cuts what was found to what can be used, where that is not for the pages alone to say.
    is_whole: says whether a page can stand for shorter ones; else those are stored beside it.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.branches = Branches()
        self.serve: Callable[[Prompt, Found], Found] | None = None
        self.is_whole: Callable[[Entry], bool] | None = None
        self._prompts = Prompts(cache.namespaces)
        self._replaced: list[tuple[Entry, Entry]] = []  # a tail, and what begins with it
        for entry in cache.entries.values():
            self.restored(entry)
        cache.watchers.add(self)

    def prompt(self, namespace: bytes, tokens: bytes, extras: Extras = NO_EXTRAS) -> Prompt:
        """Return a prompt of a namespace; tokens: int32 little-endian.

        Raises SchemaMismatch when the namespace has no schema, or one whose pages cannot be chained
        here, and CommandError for tokens or extras that are none.
        """
        return self._prompts.prompt(namespace, tokens, extras)

    # -- finding ------------------------------------------------------------------------------

    def find(self, prompt: Prompt) -> Found:
        """Say what is here of a prompt, without counting it as a use."""
        found = self.find_pages(prompt)
        return found if self.serve is None else self.serve(prompt, found)

    def find_pages(self, prompt: Prompt) -> Found:
        """Say which pages of a prompt are here, whether they can be used or not."""
        self.tidy()
        pages = self._run(prompt, prompt.num_pages)
        partial, count = self._longest(prompt, len(pages))
        return Found(len(pages) * prompt.page_tokens + count, pages, partial, count)

    def match(self, prompt: Prompt, until: float, *, session: bytes = b"") -> Found:
        """Use what is here of a prompt, and keep it until then (monotonic clock, seconds).

        session: the conversation that the prompt belongs to, if that is known.
        """
        found = self.find(prompt)
        self._cache.use_run(found.entries, until)
        run, partial = found.pages, found.partial
        if partial is not None and partial.tokens == found.partial_tokens:
            run = found.entries  # the prompt goes on where that tail ended
        self._cache.requests.matched(run, prompt.num_tokens, self._cache.clock.now, session)
        if self._cache.copies.num_cold:
            self._cache.on_match(found.entries)
        return found

    def holder(self, prompt: Prompt) -> Entry | None:
        """Return the page or tail that has the last token of a prompt, if all of it is here."""
        found = self.find_pages(prompt)
        if not prompt.num_tokens or found.tokens < prompt.num_tokens:
            return None
        return found.entries[-1]

    def find_part(self, prompt: Prompt, what: bytes = b"logits") -> Entry | None:
        """Return what is stored at the end of a prompt under a name; None also for another schema's."""
        if not prompt.num_tokens:
            return None
        entry = self._cache.find(self.part_key(prompt, what))
        if entry is None or entry.parent is None or not self.is_fit(entry, prompt):
            return None
        # Its TTL is that of the page that it hangs on; with that it goes.
        return entry if self._cache.find(entry.parent.key) is not None else None

    @staticmethod
    def part_key(prompt: Prompt, what: bytes = b"logits") -> bytes:
        """Return the key of what is stored at the end of a prompt under a name."""
        return part_key(prompt.position_key(prompt.num_tokens), what)

    @staticmethod
    def is_fit(entry: Entry, prompt: Prompt) -> bool:
        """Whether an entry was put under the schema of a prompt's namespace."""
        return entry.kind == "kvpage" and entry.branch.startswith(prompt.tag)

    # -- putting ------------------------------------------------------------------------------

    def plan(
        self,
        prompt: Prompt,
        first_token: int = 0,
        *,
        until: float = 0.0,
        is_coming: Callable[[bytes], bool] | None = None,
        num_pieces: int | None = None,
        seen: int = 0,
    ) -> list[Piece]:
        """Return the pieces that the tokens from ``first_token`` on consist of, in order.

        until: what is here is kept until then: room for the others comes not out of their chain.
        is_coming: of a page's key, whether it will be here first, so that its absence is no gap.
        num_pieces: of these, how many; None: all. seen: pages that need not be looked for in front.
        Raises CommandError when no page begins at ``first_token``, and SequenceGap when not all
        pages in front of it are here.
        """
        self.tidy()
        self.check_first(prompt, first_token)
        first = first_token // prompt.page_tokens
        stop = prompt.num_pages + bool(prompt.tail_tokens)
        if num_pieces is not None:
            stop = min(stop, first + num_pieces)
        front = self._run(prompt, first, seen)
        missing = range(seen + len(front), first)
        if missing and (is_coming is None or not all(map(is_coming, map(prompt.key, missing)))):
            here = len(self._run(prompt, first)) * prompt.page_tokens
            text = f"only {here} of the {first_token} tokens in front are here"
            raise SequenceGap(f"{text}; put them first, FROM {here}")
        prompt.ids(min(stop, prompt.num_pages))  # at once, which is quicker than one by one
        pieces = [self._piece(prompt, index) for index in range(first, stop)]
        for entry in front:
            self._cache.promise(entry, until)
        for piece in pieces:
            if piece.there is not None:
                self._cache.promise(piece.there, until)
        return pieces

    @staticmethod
    def check_first(prompt: Prompt, first_token: int) -> None:
        """Raise CommandError unless a page begins at a token, or the prompt ends there."""
        if first_token % prompt.page_tokens or not 0 <= first_token <= prompt.num_tokens:
            raise CommandError(
                f"FROM is a multiple of {prompt.page_tokens} up to {prompt.num_tokens}, "
                f"not {first_token}"
            )

    @staticmethod
    def put_options(piece: Piece, how: Put) -> Put:
        """Return how a piece is to be kept: as ``how`` says, and where it belongs."""
        return replace(
            how,
            kind="kvpage",
            tokens=piece.num_tokens,
            parent=piece.parent_key,
            branch=piece.branch,
            token_ids=piece.token_ids,
            depth=piece.depth,
        )

    def describe(self, piece: Piece, how: Put) -> None:
        """Apply put options to a piece that is there. What holds more than it loses nothing."""
        entry = piece.there
        assert entry is not None
        if entry.key == piece.key:
            self._cache.describe(entry, self.put_options(piece, how))
            self._note(entry)
            return
        expires_ms = how.expires_ms
        if expires_ms is not None and (not entry.expires_ms or 0 < expires_ms < entry.expires_ms):
            expires_ms = None
        self._cache.describe(
            entry,
            replace(
                how,
                kind="kvpage",
                expires_ms=expires_ms,
                priority=max(how.priority, entry.priority),
                tokens=entry.tokens,
                depth=entry.depth,
            ),
        )

    def part_options(self, prompt: Prompt, how: Put, page: Entry | None = None) -> Put:
        """Return how to keep what is stored at the end of a prompt. Raises SequenceGap.

        It hangs on the page that holds that position, or on ``page``, and has no TTL but that one's.
        """
        page = page or self.holder(prompt)
        if page is None:
            raise SequenceGap(
                f"the page that holds token {prompt.num_tokens} is not here; put it first, "
                f"FROM {self.find_pages(prompt).tokens // prompt.page_tokens * prompt.page_tokens}"
            )
        tokens = prompt.tail_tokens or prompt.page_tokens
        depth = prompt.num_tokens - tokens
        return replace(
            how, kind="kvpage", expires_ms=0, tokens=tokens, parent=page.key, depth=depth
        )

    def tidy(self) -> int:
        """Drop the tails whose tokens something longer has; return how many went."""
        count = 0
        while self._replaced:
            tail, longer = self._replaced.pop()
            if self._may_go(tail, longer):
                self._drop(tail, longer)
                count += 1
        return count

    @staticmethod
    def parts_of(entry: Entry) -> list[Entry]:
        """Return what hangs on a page: logits, hidden states, pages of other groups."""
        return list(entry.parts or ())

    # -- watching -----------------------------------------------------------------------------

    def stored(self, entry: Entry, *, is_new: bool) -> None:
        """A page has come; tails that are its beginning are of no use any more."""
        page = page_of(entry)
        if not page.token_ids or page.part is not None:
            return
        if page is entry:
            self.branches.insert(entry)
        self._note(page)  # tails may have waited for this part of it

    def restored(self, entry: Entry) -> None:
        """A page of the last run is here."""
        if entry.token_ids and entry.kind == "kvpage" and entry.part is None:
            self.branches.insert(entry)

    def removed(self, entry: Entry, reason: Reason) -> None:
        """A page goes."""
        if entry.token_ids and entry.part is None:
            self.branches.remove(entry)

    def cleared(self) -> None:
        """All pages have gone."""
        self.branches.clear()
        self._replaced.clear()

    def check(self) -> None:
        """Assert that every page that came with its tokens is in its place, and nothing else."""
        self.branches.check()
        pages = {
            entry
            for entry in self._cache.entries.values()
            if entry.kind == "kvpage" and entry.token_ids and entry.part is None
        }
        assert pages == set(self.branches.all())

    # -- inside -------------------------------------------------------------------------------

    def _run(self, prompt: Prompt, stop: int, first: int = 0) -> list[Entry]:
        """Return the full pages from ``first`` on that are here, up to ``stop``."""
        cache, pages, count = self._cache, list[Entry](), FIRST_PAGES
        ended_by_ms = cache.clock.wall_ms if cache.index.num_volatile else 0
        while (at := first + len(pages)) < stop:
            keys = prompt.keys(at, min(at + count, stop))
            run = longest_run(cache.entries, keys, ended_by_ms)
            tags = [entry.branch[:TAG_BYTES] for entry in run]
            if tags.count(prompt.tag) < len(tags):  # a page of another schema, or a string
                run = run[: next(at for at, tag in enumerate(tags) if tag != prompt.tag)]
            pages += run
            if len(run) < len(keys):
                cache.find(keys[len(run)])  # its TTL may have ended
                break
            count *= 4
        return pages

    def _longest(self, prompt: Prompt, index: int) -> tuple[Entry | None, int]:
        """Return what has the longest beginning in common with a page of a prompt."""
        token_ids = prompt.token_ids(index)
        while token_ids:
            entry, count = self.branches.find(prompt.branch(index), token_ids)
            if entry is None or self._cache.find(entry.key) is entry:
                return entry, count
        return None, 0

    def _piece(self, prompt: Prompt, index: int) -> Piece:
        first = index * prompt.page_tokens
        num_tokens = min(prompt.page_tokens, prompt.num_tokens - first)
        key = prompt.position_key(first + num_tokens)
        there = self._cache.find(key)
        if there is not None and not self.is_fit(there, prompt):
            there = None
        if there is None and num_tokens < prompt.page_tokens:
            longest, count = self._longest(prompt, index)
            is_there = longest is not None and count == num_tokens and self._is_whole(longest)
            there = longest if is_there else None
        return Piece(
            key,
            index,
            first,
            num_tokens,
            prompt.branch(index),
            prompt.token_ids(index),
            prompt.parent_key(index),
            first,
            there,
        )

    def _is_whole(self, page: Entry) -> bool:
        return self.is_whole is None or self.is_whole(page)

    def _note(self, page: Entry) -> None:
        """Note which tails may be of no use any more, for ``tidy``."""
        self._replaced += ((tail, page) for tail in self.branches.beginnings(page))
        longer = self.branches.continuation(page)
        if longer is not None:
            self._replaced.append((page, longer))

    def _may_go(self, tail: Entry, longer: Entry) -> bool:
        """Whether a tail is of no use: what begins with it is here, and for at least as long."""
        if tail.position < 0 or longer.position < 0 or tail.branch != longer.branch:
            return False
        if tail.kind != "kvpage" or longer.kind != "kvpage" or tail is longer:
            return False
        if not tail.token_ids or not longer.token_ids.startswith(tail.token_ids):
            return False
        now = self._cache.clock.now
        return (
            has_bound_parts_of(longer, tail)
            and self._is_whole(longer)
            and longer.level >= tail.level
            and longer.priority >= tail.priority
            and (not longer.expires_ms or 0 < tail.expires_ms <= longer.expires_ms)
            and (tail.pinned_until <= now or tail.pinned_until <= longer.pinned_until)
        )

    def _drop(self, tail: Entry, longer: Entry) -> None:
        for part in self.parts_of(tail):
            if part.part is Part.FREE:
                how = Put("kvpage", None, part.priority, part.tokens, longer.key, depth=part.depth)
                self._cache.describe(part, how)
        self._cache.delete(tail, "replaced")
