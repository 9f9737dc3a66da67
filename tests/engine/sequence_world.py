"""Prompts in a cache beside a model that knows nothing of chains: what each key holds, and no more.

The bytes of a page are made from all tokens in front of each of its tokens and from all that must
keep prompts apart, so whatever is found can be checked token by token.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as kept

from respkv.chain import Extras, Media, Prompt, pack_tokens
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.namespaces import Schema
from respkv.engine.sequences import Found, Piece, Sequences
from respkv.errors import OutOfMemory, SequenceGap
from respkv.page import Geometry, Part

ROW_BYTES = 2048
DIM = ROW_BYTES
Tokens = tuple[int, ...]
Get = Callable[[Entry], bytes | None]


def schema_of(
    namespace: bytes, page_tokens: int, *, version: int = 0, algorithm: str = "blake3"
) -> Schema:
    """Versions have everything in common but the fingerprint, which no id depends on."""
    return Schema(
        namespace,
        Geometry(1, 1, DIM, page_tokens, "uint8"),
        fingerprint=b"%d" % version,
        hash_algorithm=algorithm.encode(),
        seed=namespace[:1],
    )


@dataclass(frozen=True)
class Context:
    """All that keeps prompts apart beside their tokens; media are among those."""

    schema: Schema
    salt: bytes = b""
    tenant: bytes = b""
    lora: bytes = b""

    def extras(self, tokens: Tokens) -> Extras:
        """A token of 100 and more is an image of one token, whose place-holder is token 99."""
        media = tuple(
            Media(at, 1, b"image %d" % token) for at, token in enumerate(tokens) if token >= 100
        )
        return Extras(self.salt, self.tenant, self.lora, media=media)


@kept
def row(context: Context, tokens: Tokens) -> bytes:
    """K and V of the last of some tokens."""
    name = repr((context, tokens)).encode()
    return hashlib.sha256(name).digest() * (ROW_BYTES // 32)


def payload(context: Context, tokens: Tokens, first: int) -> bytes:
    """The bytes of the piece that begins at token ``first``."""
    rows = [row(context, tokens[: at + 1]) for at in range(first, len(tokens))]
    return b"".join(rows) * 2


@dataclass(frozen=True)
class Held:
    """What a key was given. what: empty for a page or tail, else the name of a part."""

    context: Context
    tokens: Tokens
    first: int
    what: bytes = b""


def common(one: Tokens, other: Tokens) -> int:
    """How many tokens are the same from the start."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


class World:
    """A cache with sequences, and what its keys were given."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.sequences = Sequences(cache)
        self.held: dict[bytes, Held] = {}

    def prompt(self, context: Context, tokens: Tokens) -> Prompt:
        shown = pack_tokens([min(token, 99) for token in tokens])
        return self.sequences.prompt(context.schema.namespace, shown, context.extras(tokens))

    def live(self) -> dict[bytes, Held]:
        """What is resident, and not past its TTL."""
        return {
            entry.key: self.held[entry.key]
            for entry in self.cache.entries.values()
            if entry.kind == "kvpage"
            and not 0 < entry.expires_ms <= self.cache.clock.wall_ms
            and (entry.part is None or self._hangs_on_a_page(entry))
        }

    def _hangs_on_a_page(self, part: Entry) -> bool:
        page = part.parent
        return page is not None and not 0 < page.expires_ms <= self.cache.clock.wall_ms

    def expected(self, context: Context, tokens: Tokens) -> int:
        """How many tokens of a prompt a look at everything finds."""
        size = context.schema.geometry.tokens
        pages = [each for each in self.live().values() if each.context == context and not each.what]
        full = {each.tokens for each in pages if len(each.tokens) - each.first == size}
        count = 0
        while count + size <= len(tokens) and tokens[: count + size] in full:
            count += size
        siblings = [each.tokens for each in pages if each.first == count]
        return max(
            [count, *(common(each, tokens) for each in siblings if each[:count] == tokens[:count])]
        )

    # -- what is done -----------------------------------------------------------------------------

    def put(
        self, context: Context, tokens: Tokens, how: Put, *, first: int = 0, parts: bool = False
    ) -> bool:
        """Put tokens from ``first`` on, as far as there is room; say whether all of it is here."""
        prompt, orphans = self.prompt(context, tokens), self.orphans()
        size = prompt.page_tokens
        before, gap = self.expected(context, tokens), ""
        pieces: list[Piece] = []
        try:
            pieces = self.sequences.plan(prompt, first, until=self.cache.clock.now + 1)
        except SequenceGap as error:
            gap = str(error)
        if before // size * size < first:
            assert f"FROM {before // size * size}" in gap
            return False
        assert not gap
        assert [piece.first_token for piece in pieces] == list(range(first, len(tokens), size))
        is_whole = all(self._put(context, tokens, piece, how) for piece in pieces)
        self.sequences.tidy()
        assert self.orphans() <= orphans, "room for a prompt was made by a hole in a chain"
        if is_whole:
            assert self.expected(context, tokens) == len(tokens)
        if is_whole and parts and tokens:
            self._put_part(context, tokens, prompt, how)
        return is_whole

    def _put(self, context: Context, tokens: Tokens, piece: Piece, how: Put) -> bool:
        end = piece.first_token + piece.num_tokens
        there = piece.there
        if there is not None:
            held = self.held[there.key]
            assert held.context == context
            assert held.tokens[:end] == tokens[:end]
            self.sequences.describe(piece, how)
            return True
        data = payload(context, tokens[:end], piece.first_token)
        try:
            entry = self.cache.put(piece.key, data, self.sequences.put_options(piece, how))
        except OutOfMemory:
            return False
        self.cache.promise(entry, self.cache.clock.now + 1)
        self.held[piece.key] = Held(context, tokens[:end], piece.first_token)
        return True

    def _put_part(self, context: Context, tokens: Tokens, prompt: Prompt, how: Put) -> None:
        options = self.sequences.part_options(prompt, how)
        key = self.sequences.part_key(prompt)
        try:
            self.cache.put(key, row(context, tokens), options)
        except OutOfMemory:
            return
        self.held[key] = Held(context, tokens, 0, b"logits")
        assert self.sequences.find_part(prompt) is self.cache.entries[key]

    def match(self, context: Context, tokens: Tokens) -> Found:
        """Match, and hold the answer against the look at everything."""
        prompt = self.prompt(context, tokens)
        expected = self.expected(context, tokens)
        found = self.sequences.match(prompt, self.cache.clock.now + 1)
        assert found.tokens == expected
        assert found.tokens == len(found.pages) * prompt.page_tokens + found.partial_tokens
        for at, entry in enumerate(found.entries):
            held = self.held[entry.key]
            assert held.context == context
            end = min(found.tokens, len(held.tokens))
            assert held.tokens[:end] == tokens[:end]
            assert held.first == at * prompt.page_tokens
            assert entry.held_until >= self.cache.clock.now + 1
        part = self.sequences.find_part(prompt)
        is_there = any(
            (each.context, each.tokens, each.what) == (context, tokens, b"logits")
            for each in self.live().values()
        )
        assert (part is not None) == is_there
        return found

    def check_bytes(self, found: Found, context: Context, tokens: Tokens, get: Get) -> None:
        """Make sure that what was found has the K and V of the prompt's own tokens."""
        size = context.schema.geometry.tokens
        for at, entry in enumerate(found.entries):
            data = get(entry)
            if data is None:
                continue
            count = min(size, found.tokens - at * size)
            half = len(data) // 2
            for token in range(count):
                expected = row(context, tokens[: at * size + token + 1])
                for plane in (0, half):
                    start = plane + token * ROW_BYTES
                    assert data[start : start + ROW_BYTES] == expected

    # -- what always holds ------------------------------------------------------------------------

    def orphans(self) -> set[bytes]:
        """Pages whose chain has a hole right in front of them, or will when it is noticed."""
        wall_ms = self.cache.clock.wall_ms
        there = {
            entry.key
            for entry in self.cache.entries.values()
            if not 0 < entry.expires_ms <= wall_ms
        }
        return {
            entry.key
            for entry in self.cache.entries.values()
            if entry.parent_key and entry.parent_key not in there
        }

    def check(self) -> None:
        self.cache.check()
        self.sequences.check()
        for entry in self.cache.entries.values():
            if entry.kind == "kvpage":
                self._check_entry(entry)

    def _check_entry(self, entry: Entry) -> None:
        held = self.held[entry.key]
        namespace = held.context.schema.namespace
        assert entry.key.startswith(namespace + b":")
        assert entry.branch.startswith(held.context.schema.tag)
        if held.what:
            assert entry.part is Part.FREE
            assert not entry.token_ids
            page = entry.parent
            # One of a former schema may hang on a page of the present one; it is never found.
            if page is not None and page.branch[:8] == entry.branch[:8]:
                holder = self.held[page.key]
                assert holder.context == held.context
                assert holder.first < len(held.tokens)
                assert holder.tokens[: len(held.tokens)] == held.tokens
            return
        assert entry.tokens == len(held.tokens) - held.first
        assert entry.depth == held.first
        size = held.context.schema.geometry.tokens
        parent = self.held.get(entry.parent_key)
        if held.first:
            assert parent is None or parent.tokens == held.tokens[: held.first]
            assert entry.parent_key
        assert held.first % size == 0

    def check_no_idle_tails(self) -> None:
        """After tidying there is no tail whose tokens something at least as lasting has."""
        self.sequences.tidy()
        live = [self.cache.entries[key] for key in self.live()]
        for tail in live:
            mine = self.held[tail.key]
            for longer in live:
                theirs = self.held[longer.key]
                if tail is longer or mine.what or theirs.what or mine.context != theirs.context:
                    continue
                if mine.first != theirs.first or theirs.tokens[: len(mine.tokens)] != mine.tokens:
                    continue
                is_as_lasting = (
                    longer.level >= tail.level
                    and longer.priority >= tail.priority
                    and (not longer.expires_ms or 0 < tail.expires_ms <= longer.expires_ms)
                    and tail.pinned_until <= self.cache.clock.now
                )
                assert not is_as_lasting, (mine, theirs)
