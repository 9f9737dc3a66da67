"""Chains: the ids of a prompt's pages, each the hash of the page before it and its own tokens.

An id names the whole prefix that ends with its page, so equal ids mean equal prefixes, and the
longest cached prefix is the longest run of present ids from the start. What changes the K and V
without being a token is hashed with the tokens: a salt and a tenant into the first page, a LoRA
adapter into every page, images and other media into the pages that they overlap.

Two schemes are our own. With H = blake3 or sha256 an id is H(node + tokens), where node is the id
before it, or H(that id + extras) for a page with extras; the extras are padded to one byte more than
a multiple of four, so nothing that is hashed can be taken for tokens. The third, ``sha256_cbor``, is
vLLM's, whose ids are then the same: sha256 of the canonical CBOR of (parent, tokens, extra keys).
Source: vLLM, vllm/v1/core/kv_cache_utils.py, hash_block_tokens and generate_block_hash_extra_keys.

Within a page, prompts are compared by their tokens, and only under one ``branch``: the page before
and all extras but media. Media stand among the tokens as markers, where they begin; so two prompts
with the same words before different images share those words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from respkv.chain.extras import NO_EXTRAS, Extras, Media, medium_name, node_of, shared_fields
from respkv.chain.schemes import ALGORITHMS, SCHEMES, Scheme
from respkv.chain.tokens import (
    MARKER,
    MARKER_BYTES,
    TOKEN_BYTES,
    TOKEN_MAX,
    check_tokens,
    common_tokens,
    pack_tokens,
    tokens_of,
)
from respkv.page import PAGE_ID_BYTES, page_key

__all__ = [
    "ALGORITHMS",
    "BRANCH_BYTES",
    "NO_EXTRAS",
    "PAGE_TOKENS_MAX",
    "PRIVATE",
    "TOKEN_BYTES",
    "TOKEN_MAX",
    "Chain",
    "Extras",
    "Media",
    "Prompt",
    "check_tokens",
    "common_tokens",
    "pack_tokens",
    "page_ids",
    "tokens_of",
]

PAGE_TOKENS_MAX = 4096  # of a page whose tokens are kept with it
MEDIA_MAX = 128  # that begin in one page or reach into it
BRANCH_BYTES = 16  # of a branch, behind its tag
# Behind the branch of pages with a salt, a tenant or a LoRA adapter: their tokens do not name them.
PRIVATE = b"p"


class Chain:
    """One way to chain the pages of prompts.

    seed: where chains start; two with different seeds have no id in common. For ``sha256_cbor`` the
          value of PYTHONHASHSEED of the vLLM workers, or ``vllm-none-hash``, its default.
    """

    def __init__(self, algorithm: str, seed: bytes, page_tokens: int) -> None:
        scheme = SCHEMES.get(algorithm)
        if scheme is None:
            known = ", ".join(SCHEMES)
            raise ValueError(f"a chain is hashed with one of {known}, not with {algorithm!r}")
        if page_tokens < 1:
            raise ValueError(f"page_tokens must be at least 1, not {page_tokens}")
        self.algorithm = algorithm
        self.page_tokens = page_tokens
        self.scheme: Scheme = scheme
        self.start = scheme.start(seed, page_tokens)

    def prompt(
        self, namespace: bytes, tokens: bytes, extras: Extras = NO_EXTRAS, tag: bytes = b""
    ) -> "Prompt":
        """Return a prompt of a namespace. Nothing is hashed yet.

        tokens: int32 little-endian. tag: goes in front of every branch.
        Raises ValueError for tokens that are none, and extras that the algorithm cannot hash.
        """
        check_tokens(tokens)
        self.scheme.check(extras)
        return Prompt(self, namespace, tokens, extras, tag)

    def ids(self, tokens: bytes, extras: Extras = NO_EXTRAS) -> list[bytes]:
        """Return the ids of all full pages of a prompt; raises as ``prompt`` does."""
        prompt = self.prompt(b"", tokens, extras)
        return prompt.ids(prompt.num_pages)


@dataclass(slots=True)
class Prompt:
    """Tokens, and what is mixed into their chain. Ids are made when they are first asked for.

    num_tokens, num_pages: of the prompt, and how many full pages that is; tail_tokens: the rest.
    """

    chain: Chain
    namespace: bytes
    tokens: bytes
    extras: Extras
    tag: bytes
    page_tokens: int = field(init=False)
    num_tokens: int = field(init=False)
    num_pages: int = field(init=False)
    tail_tokens: int = field(init=False)
    _ids: list[bytes] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.page_tokens = self.chain.page_tokens
        self.num_tokens = len(self.tokens) // TOKEN_BYTES
        self.num_pages, self.tail_tokens = divmod(self.num_tokens, self.page_tokens)

    def ids(self, stop: int) -> list[bytes]:
        """Return the ids of the full pages before ``stop``, in a list that is not to be changed.

        Threads may ask together.
        """
        ids = self._ids
        if stop > len(ids):
            assert stop <= self.num_pages
            ids = self._hash(stop)
        return ids

    def take_ids(self, other: "Prompt") -> int:
        """Take over the ids that another prompt has, of the full pages that both begin with.

        Returns: how many. None when the other has another chain or other extras.
        """
        if other.chain is not self.chain or other.extras != self.extras:
            return 0
        ids, width = other._ids, self.page_tokens * TOKEN_BYTES
        same, stop = 0, min(len(ids), self.num_pages)
        while same < stop:  # the halves that are equal are read once
            middle = (same + stop + 1) // 2
            piece = other.tokens[same * width : middle * width]
            if self.tokens.startswith(piece, same * width):
                same = middle
            else:
                stop = middle - 1
        if same > len(self._ids):
            self._ids = ids[:same]
        return same

    def id(self, index: int) -> bytes:
        """Return the id of a full page."""
        return self.ids(index + 1)[index]

    def keys(self, first: int, stop: int) -> list[bytes]:
        """Return the keys of full pages."""
        digits = b"".join(self.ids(stop)[first:stop]).hex().encode()
        front = self.namespace + b":"
        width = 2 * PAGE_ID_BYTES
        return [front + digits[at : at + width] for at in range(0, len(digits), width)]

    def key(self, index: int) -> bytes:
        """Return the key of a full page. Raises ValueError when it is too long for one."""
        return page_key(self.namespace, self.id(index))

    def parent_id(self, index: int) -> bytes:
        """Return the id of the page before, or where the chain starts."""
        return self.id(index - 1) if index else self.chain.start

    def parent_key(self, index: int) -> bytes:
        """Return the key of the page before; empty for the first page."""
        return self.key(index - 1) if index else b""

    def position_id(self, num_tokens: int) -> bytes:
        """Return the id of the first ``num_tokens`` tokens: of a page, or of a part of one."""
        assert 0 < num_tokens <= self.num_tokens
        index, rest = divmod(num_tokens, self.page_tokens)
        if not rest:
            return self.id(index - 1)
        return self._hash_one(index, num_tokens, self.parent_id(index))

    def position_key(self, num_tokens: int) -> bytes:
        """Return the key of a page, or of a tail, that ends with these tokens."""
        return page_key(self.namespace, self.position_id(num_tokens))

    def branch(self, index: int) -> bytes:
        """Return what a page shares with all pages whose tokens may be compared with its own."""
        parent = self.parent_id(index)
        extras = self.extras
        node = node_of(blake3, parent, shared_fields(extras, index))
        is_private = extras.salt or extras.tenant or extras.lora
        return self.tag + node[:BRANCH_BYTES] + (PRIVATE if is_private else b"")

    def token_ids(self, index: int, num_tokens: int = TOKEN_MAX) -> bytes:
        """Return the tokens of a page up to a position of the prompt, with markers for media.

        Raises ValueError when too many media are in one page.
        """
        first = index * self.page_tokens
        stop = min(first + self.page_tokens, self.num_tokens, num_tokens)
        media = self.extras.overlapping(first, stop)
        if not media:
            return self.tokens[first * TOKEN_BYTES : stop * TOKEN_BYTES]
        if len(media) > MEDIA_MAX:
            raise ValueError(f"a page has at most {MEDIA_MAX} media, not {len(media)}")
        parts, at = [], first
        for medium in media:
            begin = max(medium.first, first)
            parts.append(self.tokens[at * TOKEN_BYTES : begin * TOKEN_BYTES])
            name = blake3(medium_name(medium, first)).digest()
            parts.append(MARKER + name[: MARKER_BYTES - len(MARKER)])
            at = begin
        parts.append(self.tokens[at * TOKEN_BYTES : stop * TOKEN_BYTES])
        return b"".join(parts)

    def _hash(self, stop: int) -> list[bytes]:
        # The list that others may be reading is never changed: two threads that both made it longer
        # would leave ids in it twice, and those behind them would name the wrong pages. A copy for each
        # page that is asked for alone would cost the square of their number, so it grows by halves.
        stop = max(stop, min(len(self._ids) * 3 // 2, self.num_pages))
        ids, extras, start = self._ids.copy(), self.extras, self.chain.start
        has_all = bool(extras.lora or extras.media)
        while len(ids) < stop:
            index = len(ids)
            parent = ids[-1] if ids else start
            if has_all or (not index and extras is not NO_EXTRAS):
                ids.append(self._hash_one(index, (index + 1) * self.page_tokens, parent))
            else:
                self.chain.scheme.extend(ids, parent, self.tokens, self.page_tokens, stop)
        self._ids = ids
        return ids

    def _hash_one(self, index: int, num_tokens: int, parent: bytes) -> bytes:
        """Hash a page, or its first tokens, with whatever extras it has."""
        first = index * self.page_tokens
        tokens = self.tokens[first * TOKEN_BYTES : num_tokens * TOKEN_BYTES]
        return self.chain.scheme.hash_page(parent, tokens, self.extras, index, first)


def page_ids(
    tokens: Sequence[int],
    *,
    page_tokens: int,
    seed: bytes = b"",
    salt: bytes = b"",
    algorithm: str = "blake3",
) -> list[bytes]:
    """Chain the ids of the full pages of a prompt; a last partial page has none.

    tokens:    token ids, 0 to 2**31 - 1.
    seed:      where the chain starts, e.g. a fingerprint of the model's weights.
    salt:      mixed into the first page; separates tenants that must not share.
    algorithm: one of ALGORITHMS.
    Returns:   32-byte ids; id i names tokens[: (i + 1) * page_tokens].
    """
    chain = Chain(algorithm, seed, page_tokens)
    return chain.ids(pack_tokens(tokens), Extras(salt=salt) if salt else NO_EXTRAS)
