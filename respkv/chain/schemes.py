"""How the id of a page is made: which hash function, and what it is given."""

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence

import cbor2
from blake3 import blake3

from respkv.chain.extras import Extras, Hash, media_fields, node_of, shared_fields
from respkv.chain.tokens import TOKEN_BYTES


class Scheme(ABC):
    """How ids are made. One of the hash functions, and what it is given."""

    @abstractmethod
    def start(self, seed: bytes, page_tokens: int) -> bytes:
        """Return what stands in for the id before the first page."""

    def check(self, extras: Extras) -> None:  # noqa: B027 (most take them all)
        """Raise ValueError for extras that cannot be hashed."""

    @abstractmethod
    def extend(
        self, ids: list[bytes], parent: bytes, tokens: bytes, page_tokens: int, stop: int
    ) -> None:
        """Append the ids of pages without extras until there are ``stop``."""

    @abstractmethod
    def hash_page(
        self, parent: bytes, tokens: bytes, extras: Extras, index: int, first: int
    ) -> bytes:
        """Return the id of one page, whose first token stands at ``first`` of the prompt."""


class Ours(Scheme):
    """Plain bytes, hashed."""

    def __init__(self, name: str, function: Hash) -> None:
        self._name = name
        self._hash = function

    def start(self, seed: bytes, page_tokens: int) -> bytes:
        text = f"respkv chain 1 {self._name} {page_tokens} ".encode()
        return self._hash(text + seed).digest()

    def extend(
        self, ids: list[bytes], parent: bytes, tokens: bytes, page_tokens: int, stop: int
    ) -> None:
        # A match waits for this loop: locals, and no call but the hash.
        function, append, width = self._hash, ids.append, page_tokens * TOKEN_BYTES
        for at in range(len(ids) * width, stop * width, width):
            parent = function(parent + tokens[at : at + width]).digest()
            append(parent)

    def hash_page(
        self, parent: bytes, tokens: bytes, extras: Extras, index: int, first: int
    ) -> bytes:
        stop = first + len(tokens) // TOKEN_BYTES
        fields = shared_fields(extras, index) + media_fields(extras, first, stop)
        return self._hash(node_of(self._hash, parent, fields) + tokens).digest()


class Vllm(Scheme):
    """vLLM's ``sha256_cbor``."""

    def start(self, seed: bytes, page_tokens: int) -> bytes:
        return hashlib.sha256(cbor2.dumps(_text(seed, "seed"), canonical=True)).digest()

    def check(self, extras: Extras) -> None:
        for name in ("salt", "tenant", "lora", "lora_path"):
            _text(getattr(extras, name), name)
        for medium in extras.media:
            _text(medium.digest, "digest of a medium")

    def extend(
        self, ids: list[bytes], parent: bytes, tokens: bytes, page_tokens: int, stop: int
    ) -> None:
        function, append, begin = hashlib.sha256, ids.append, 0
        width = page_tokens * TOKEN_BYTES
        encoded, ends = _encode(tokens[len(ids) * width : stop * width], page_tokens)
        front, middle = _FRONT, _array_head(page_tokens)
        for end in ends:
            body = encoded[begin:end]
            parent = function(front + parent + middle + body + _NULL).digest()
            append(parent)
            begin = end

    def hash_page(
        self, parent: bytes, tokens: bytes, extras: Extras, index: int, first: int
    ) -> bytes:
        keys: list[tuple[str | int, ...]] = []
        if extras.lora:
            keys.append(("lora", _text(extras.lora, "lora"), _text(extras.lora_path, "lora_path")))
        for medium in extras.overlapping(first, first + len(tokens) // TOKEN_BYTES):
            keys.append(("mm", _text(medium.digest, "digest"), medium.first - first))
        if extras.salt and not index:
            keys.append(("cache_salt", _text(extras.salt, "salt")))
        if extras.tenant and not index:  # vLLM knows none: ids with a tenant are our own
            keys.append(("tenant", _text(extras.tenant, "tenant")))
        value = (parent, tuple(_unpack(tokens)), tuple(keys) or None)
        return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()


_FRONT = b"\x83\x58\x20"  # an array of three, the first a string of 32 bytes
_NULL = b"\xf6"
_HEADS = bytes((0, 0, 0x18, 0x19, 0, 0x1A))  # of a number, by the bytes that it has with it


def _encode(tokens: bytes, page_tokens: int) -> tuple[bytes, list[int]]:
    """Return token ids as CBOR, one behind the other, and where those of each page end.

    cbor2 is asked for one value at a time, which takes four times as long as the hashes.
    """
    import numpy as np  # here, because only this scheme needs it and clients start without

    ids = np.frombuffer(tokens, "<u4")
    widths = np.where(ids < 24, 1, np.where(ids < 256, 2, np.where(ids < 65536, 3, 5)))
    cells = np.empty((len(ids), 5), np.uint8)  # each id at the right, its head in front of it
    cells[:, 1:] = ids.astype(">u4").view(np.uint8).reshape(-1, 4)
    heads = np.where(widths == 1, cells[:, 4], np.frombuffer(_HEADS, np.uint8)[widths])
    cells[np.arange(len(ids)), 5 - widths] = heads
    is_used = np.arange(5) >= 5 - widths[:, None]
    return cells[is_used].tobytes(), np.cumsum(widths)[page_tokens - 1 :: page_tokens].tolist()


def _array_head(count: int) -> bytes:
    """Return the head of a CBOR array of ``count`` items."""
    return bytes([cbor2.dumps(count)[0] | 0x80]) + cbor2.dumps(count)[1:]


def _unpack(tokens: bytes) -> Sequence[int]:
    return struct.unpack(f"<{len(tokens) // TOKEN_BYTES}i", tokens)


def _text(word: bytes, name: str) -> str:
    try:
        return word.decode()
    except UnicodeDecodeError:
        raise ValueError(f"for sha256_cbor, {name} has to be UTF-8, not {word!r}") from None


SCHEMES: dict[str, Scheme] = {
    "blake3": Ours("blake3", blake3),
    "sha256": Ours("sha256", hashlib.sha256),
    "sha256_cbor": Vllm(),
}
ALGORITHMS = tuple(SCHEMES)
