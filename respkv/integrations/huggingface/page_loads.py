"""Bring a prompt's pages into a worker's tensors, by the shortest way there is.

On the server's host, and in an embedded engine, pages are leased and copied once, from where they lie
into the tensors. Over a network the server sends layer after layer. A worker names full pages by
their chain; what is left, part of another prompt's page, only the server can find.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from respkv.chain import NO_EXTRAS, TOKEN_BYTES, Chain, Extras, Media, Prompt
from respkv.chain.recent import RecentPrompts
from respkv.client import Client, as_bytes
from respkv.client.sequences import ChainOptions
from respkv.errors import CacheError, ConfigError, ServerError
from respkv.integrations.huggingface.availability import is_no_shared_memory
from respkv.integrations.huggingface.buffers import BufferPool
from respkv.integrations.huggingface.locks import ForkLock
from respkv.integrations.huggingface.page_copies import Stored, Target, address_of
from respkv.page import Geometry, part_key

RECENT_BYTES: Final = 8 << 20  # of the last prompts: their tokens and ids
LEASE_BYTES: Final = 256 << 20  # at a time: all of a lease has to be in the server's memory


class Loaded(NamedTuple):
    """Where the tokens that were brought end, and how many came without a socket, and on a GPU."""

    end: int
    leased_tokens: int
    gpu_tokens: int


@dataclass(slots=True)
class Ways:
    """What there is of ways from the cache to here, as far as was found out.

    gpu_kind: of device that the gpu tier is on; None: not asked yet.
    """

    can_lease: bool = True
    gpu_kind: str | None = None


class PageLoads:
    """The loads of one namespace. Threads may share it."""

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
        self._ways = Ways()
        self._recent = RecentPrompts(RECENT_BYTES)
        self._lock = ForkLock()

    def within(self, client: Client) -> "PageLoads":
        """Return these loads over the same cache, by a client that waits for other times."""
        found = copy(self)
        found._client = client
        return found

    def prompt(self, data: bytes, chain: ChainOptions) -> Prompt:
        """Return a prompt, whose ids are made once: it is loaded, and then loaded again."""
        extras = extras_of(chain)
        with self._lock:
            return self._recent.prompt(self._chain, self._namespace.encode(), data, extras)

    def logits(self, data: bytes, chain: ChainOptions) -> bytes | None:
        """Return what is stored as the logits behind a prompt. Raises CacheError."""
        prompt = self.prompt(data, chain)
        if not prompt.num_tokens:
            return None
        found = self._client.get(part_key(prompt.position_key(prompt.num_tokens), b"logits"))
        return None if found is None else bytes(found)

    def load(
        self,
        data: bytes,
        target: Target,
        stop: int,
        known: int,
        chain: ChainOptions,
        tiers: str = "",
    ) -> Loaded:
        """Copy tokens from ``target.first`` up to ``stop``.

        data: the prompt's tokens as int32. known: as many of them are stored. tiers: where the
        pages are, as a match says it.
        Raises CacheError; tensors are undefined then.
        """
        end = target.first
        on_gpu = tiers[end // self._geometry.tokens : known // self._geometry.tokens]
        count = len(on_gpu) - len(on_gpu.lstrip("g"))
        if count and target.device.type == self._gpu():
            end = self._load_on_gpu(data, target, count, stop, chain)
        on_device = end - target.first
        if self._ways.can_lease and end < stop:
            end = self._load_leased(data, target, end, stop, known, chain)
        leased = end - target.first
        if end < stop:
            end = self._load_sent(data, target, end, stop, chain)
        return Loaded(end, leased, on_device)

    def _gpu(self) -> str:
        """Return on which kind of device the gpu tier is; empty: there is none, or none to lease of."""
        if self._ways.gpu_kind is None:
            self._ways.gpu_kind = self._client.info().get("kv_gpu_device", "").partition(":")[0]
        return self._ways.gpu_kind

    def _load_on_gpu(
        self, data: bytes, target: Target, count: int, stop: int, chain: ChainOptions
    ) -> int:
        """Copy pages that are on the device of the tensors; return where they end."""
        tokens = self._geometry.tokens
        end, first = target.first, target.first // tokens
        keys = self.prompt(data, chain).keys(first, min(first + count, -(-stop // tokens)))
        try:
            with self._client.lease_gpu(keys) as lease:
                for number, page in enumerate(lease.pages, first):
                    if page is None:
                        break
                    target.copy_page(page.tensor(self._geometry), number * tokens, stop)
                    end = min((number + 1) * tokens, stop)
                page = None  # it is a view of memory that the lease lends
        except ConfigError:  # another host's device, or another container's
            self._ways.gpu_kind = ""
            return target.first
        except CacheError:  # they have left the device: memory has them, or nobody
            return target.first
        return end

    def _load_leased(
        self, data: bytes, target: Target, end: int, stop: int, known: int, chain: ChainOptions
    ) -> int:
        """Copy full pages from ``end`` on, and the tail where the stored tokens end; return the end."""
        tokens = self._geometry.tokens
        prompt = self.prompt(data, chain)
        pages_max = max(1, LEASE_BYTES // self._geometry.page_bytes)
        while end < stop:
            first = end // tokens
            last = min(first + pages_max, -(-stop // tokens))
            try:
                copied = self._copy_leased(prompt, target, (first, last), known, stop)
            except CacheError as error:
                if is_no_shared_memory(error):
                    self._ways.can_lease = False
                    return end
                if isinstance(error, ServerError) and error.word == "OOM" and pages_max > 1:
                    pages_max = (last - first) // 2 or 1  # they are not all in memory at once
                    continue
                raise
            end = max(end, copied)
            if copied < min(last * tokens, stop):
                break
        return end

    def _copy_leased(
        self, prompt: Prompt, target: Target, pages: tuple[int, int], known: int, stop: int
    ) -> int:
        """Copy some pages; return the token at which those end that were there."""
        first, last = pages
        full = known // self._geometry.tokens
        keys = prompt.keys(first, min(last, full))
        if last > full:
            keys.append(prompt.position_key(known))
        # The end of the block confirms the lease; only then are the copies known to be good.
        with self._client.lease(keys) as lease:
            there = list(self._stored(lease.places, lease.memory, first, known))
            target.copy(there, stop)
            if target.device.type == "cuda":
                # An engine in this process may have pinned the pages, and copies from them return before
                # they are made. The lease has to last until they are.
                torch.cuda.current_stream(target.device).synchronize()
        return min(there[-1].first + there[-1].count, stop) if there else 0

    def _stored(
        self, places: Sequence[tuple[int, int] | None], memory: memoryview, first: int, known: int
    ) -> Iterator[Stored]:
        """Say what is in the places, up to the first page that is not there.

        It is not to be read once the memory is released.
        """
        tokens, start = self._geometry.tokens, address_of(memory)
        token_bytes = self._geometry.page_bytes // tokens
        for number, place in enumerate(places, first):
            begin = number * tokens
            count = min(tokens, known - begin)
            if place is None or place[1] != count * token_bytes:
                return
            yield Stored(begin, count, start + place[0], place[1])

    def _load_sent(
        self, data: bytes, target: Target, first: int, stop: int, chain: ChainOptions
    ) -> int:
        """Copy layer after layer as they come; return where the tokens end."""
        page = self._geometry
        row = 2 * page.heads * page.dim
        dtype: torch.dtype = getattr(torch, page.dtype)
        count = stop - first
        staged = self._buffers.empty((page.layers, count * row), dtype, torch.device("cpu"))
        into = [as_bytes(layer) for layer in staged]
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
