"""Send a prompt's KV to respkv: the pages that it has not, cut from a worker's tensors."""

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

from respkv.chain import TOKEN_BYTES
from respkv.client import Client, SequenceMatch, as_bytes
from respkv.client.sequences import ChainOptions
from respkv.integrations.huggingface.buffers import BufferPool
from respkv.integrations.huggingface.page_copies import KVPair, as_one
from respkv.page import Geometry

# Gives K and V of the tokens from one up to another, counted from the prompt's beginning.
Gather: TypeAlias = Callable[[int, int], Sequence[KVPair]]

STAGED_BYTES: Final = 32 << 20  # of pages are cut at a time, and sent in one command


class PageStores:
    """The stores of one namespace."""

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
        self._dtype: torch.dtype = getattr(torch, geometry.dtype)

    def store(
        self,
        data: bytes,
        kv: Sequence[KVPair] | Gather | None,
        first: int,
        logits: bytes | None,
        chain: ChainOptions,
    ) -> int:
        """Send the pages from ``first`` on that are not there; return how many were stored.

        data: the tokens as int32. kv: of tokens[first:], or what gathers some of them.
        Raises CacheError; the pages before the one that failed are stored, they are a prefix.
        """
        seq, tokens = self._client.seq, self._geometry.tokens
        count = len(data) // TOKEN_BYTES
        found = seq.match(self._namespace, data, **chain)
        begin = count if found.tokens >= count else max(first, found.pages * tokens)
        if kv is None or begin >= count:
            if logits is not None and not found.has_logits:
                seq.put(self._namespace, data, None, logits=logits, match=found, **chain)
            return 0
        stored = 0
        step = max(1, STAGED_BYTES // self._geometry.page_bytes) * tokens
        for start in range(begin, count, step):
            end = min(start + step, count)
            if callable(kv):
                pages = self._cut(kv(start, end), 0, end - start)
            else:
                pages = self._cut(kv, start - first, end - first)
            # What was sent before is there, so it need not be asked again.
            there = SequenceMatch(start, start // tokens, "", 0, False)
            put = seq.put(
                self._namespace,
                data[: end * TOKEN_BYTES],
                pages,
                first=start,
                match=there,
                logits=logits if end == count else None,
                **chain,
            )
            stored += put.stored
        return stored

    def _cut(self, kv: Sequence[KVPair], start: int, end: int) -> list[memoryview]:
        """Copy rows into pages, the last of which may be a tail."""
        page = self._geometry
        whole, rest = divmod(end - start, page.tokens)
        middle = start + whole * page.tokens
        found: list[memoryview] = []
        if whole:
            shape = (whole, page.layers, 2, page.tokens, page.heads, page.dim)
            pages = self._buffers.empty(shape, self._dtype, torch.device("cpu"))
            self._gather(kv, start, middle, pages)
            found += [as_bytes(each) for each in pages]
        if rest:
            shape = (1, page.layers, 2, rest, page.heads, page.dim)
            tail = self._buffers.empty(shape, self._dtype, torch.device("cpu"))
            self._gather(kv, middle, end, tail)
            found.append(as_bytes(tail))
        return found

    def _gather(self, kv: Sequence[KVPair], start: int, end: int, pages: Tensor) -> None:
        sizes = (pages.shape[0], pages.shape[3])
        whole = as_one(kv)
        if whole is not None:
            rows = torch.unflatten(whole[:, :, start:end], 2, sizes)
            pages.copy_(rows.permute(2, 0, 1, 3, 4, 5))
            return
        for layer, pair in enumerate(kv):
            for side, tensor in enumerate(pair):
                pages[:, layer, side].copy_(torch.unflatten(tensor[start:end], 0, sizes))
