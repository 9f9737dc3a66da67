"""Bring a prompt's pages into a worker's tensors, by the shortest way there is.

On the server's host, and in an embedded engine, pages are leased and copied once, from where they lie
into the tensors. Over a network the server sends layer after layer. A worker names full pages by
their chain; what is left, part of another prompt's page, only the server can find.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch

from respkv.chain import NO_EXTRAS, TOKEN_BYTES, Chain, Extras, Media, Prompt
from respkv.client import Client
from respkv.client.sequences import ChainOptions
from respkv.errors import CacheError, ServerError
from respkv.integrations.huggingface.availability import is_no_shared_memory
from respkv.integrations.huggingface.buffers import BufferPool
from respkv.integrations.huggingface.page_copies import Stored, Target
from respkv.page import Geometry

LEASE_BYTES: Final = 256 << 20  # at a time: all of a lease has to be in the server's memory


class Loaded(NamedTuple):
    """Where the tokens that were brought end, and how many came without a socket."""

    end: int
    leased_tokens: int


class PageLoads:
    """The loads of one namespace."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        geometry: Geometry,
        fingerprint: bytes,
        buffers: BufferPool,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._geometry = geometry
        self._buffers = buffers
        self._chain = Chain("blake3", fingerprint, geometry.tokens)
        self._can_lease = True

    def load(
        self, data: bytes, target: Target, stop: int, known: int, chain: ChainOptions
    ) -> Loaded:
        """Copy tokens from ``target.first`` up to ``stop``.

        data: the prompt's tokens as int32. known: as many of them are stored.
        Raises CacheError; tensors are undefined then.
        """
        end = target.first
        if self._can_lease:
            end = self._load_leased(data, target, stop, known, chain)
        leased = end - target.first
        if end < stop:
            end = self._load_sent(data, target, end, stop, chain)
        return Loaded(end, leased)

    def _load_leased(
        self, data: bytes, target: Target, stop: int, known: int, chain: ChainOptions
    ) -> int:
        """Copy full pages, and the tail that ends where the stored tokens do; return their end."""
        tokens, end = self._geometry.tokens, target.first
        prompt = self._chain.prompt(
            self._namespace.encode(), data[: known * TOKEN_BYTES], extras_of(chain)
        )
        pages_max = max(1, LEASE_BYTES // self._geometry.page_bytes)
        while end < stop:
            first = end // tokens
            last = min(first + pages_max, -(-stop // tokens))
            try:
                copied = self._copy_leased(prompt, target, first, last, stop)
            except CacheError as error:
                if is_no_shared_memory(error):
                    self._can_lease = False
                    return end
                if isinstance(error, ServerError) and error.word == "OOM" and pages_max > 1:
                    pages_max = (last - first) // 2 or 1  # they are not all in memory at once
                    continue
                raise
            end = max(end, copied)
            if copied < min(last * tokens, stop):
                break
        return end

    def _copy_leased(self, prompt: Prompt, target: Target, first: int, last: int, stop: int) -> int:
        """Copy some pages; return the token at which those end that were there."""
        keys = prompt.keys(first, min(last, prompt.num_pages))
        if last > prompt.num_pages:
            keys.append(prompt.position_key(prompt.num_tokens))
        # The end of the block confirms the lease; only then are the copies known to be good.
        with self._client.lease(keys) as lease:
            pages = list(self._stored(lease.pages, first, prompt.num_tokens))
            target.copy(pages, stop)
            end = pages[-1].first + pages[-1].count if pages else 0
            del pages
        return min(end, stop)

    def _stored(self, views: list[memoryview | None], first: int, known: int) -> Iterator[Stored]:
        """Say what the views are, up to the first page that is not there."""
        tokens = self._geometry.tokens
        token_bytes = self._geometry.page_bytes // tokens
        for number, view in enumerate(views, first):
            begin = number * tokens
            count = min(tokens, known - begin)
            if view is None or len(view) != count * token_bytes:
                return
            yield Stored(begin, count, view)

    def _load_sent(
        self, data: bytes, target: Target, first: int, stop: int, chain: ChainOptions
    ) -> int:
        """Copy layer after layer as they come; return where the tokens end."""
        page = self._geometry
        row = 2 * page.heads * page.dim
        dtype: torch.dtype = getattr(torch, page.dtype)
        count = stop - first
        staged = self._buffers.empty((page.layers, count * row), dtype, torch.device("cpu"))
        into = [memoryview(layer.view(torch.uint8).numpy()) for layer in staged]
        prompt = data[: stop * TOKEN_BYTES]
        with self._client.seq.get(
            self._namespace, prompt, first=first, into=into, **chain
        ) as layers:
            for index, layer in enumerate(layers):
                if not len(layer):
                    break
                plane = target.layer_tensor(layer, layers.num_tokens)
                target.copy_layer(index, plane, first)
            return first + layers.num_tokens


def extras_of(chain: ChainOptions) -> Extras:
    """Return what is mixed into a chain."""
    words = {name: chain.get(name) for name in ("salt", "tenant", "lora", "lora_path")}
    media = tuple(Media(*each) for each in chain.get("media", ()))
    named = {name: _bytes(word) for name, word in words.items() if word is not None}
    return Extras(**named, media=media) if named or media else NO_EXTRAS


def _bytes(word: object) -> bytes:
    if isinstance(word, str):
        return word.encode()
    return bytes(word) if isinstance(word, bytes | bytearray | memoryview) else str(word).encode()
