"""Keep the KV of prompts in respkv: all that an inference worker has to do, without the model.

1. ``SharedPages`` tells the server what a page of the model looks like and which weights made it.
   A worker with other weights is refused at once.
2. ``load`` names every page of a prompt by a hash of all tokens up to its end, asks once how many
   of them the server has from the start on, and takes those.
3. ``store`` gives the server the pages that it had not.

Pages travel in one of two ways. ``via="socket"`` works from anywhere: pages are sent over the
connection. ``via="memory"`` is for a worker on the server's host: it copies out of and into the
server's own memory, and only the places of pages are sent.
"""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from respkv.chain import page_ids
from respkv.client import Client, as_bytes, as_torch
from respkv.errors import CacheError
from respkv.kernels.pages import gather_pages, scatter_pages
from respkv.page import Geometry, page_keys

Layers = list[tuple[Tensor, Tensor]]  # K and V of every layer, each [1, H, tokens, D]


class SharedPages:
    """The pages of one namespace.

    fingerprint: names the weights that make them.
    codecs:      how tiers store them, as ``{"nvme": "xs"}``; without loss where it is not said.
    """

    def __init__(
        self,
        client: Client,
        namespace: str,
        geometry: Geometry,
        fingerprint: bytes,
        codecs: Mapping[str, str] | None = None,
    ) -> None:
        self.client = client
        self.namespace = namespace
        self.geometry = geometry
        self.fingerprint = fingerprint
        self.shape = (geometry.layers, 2, geometry.tokens, geometry.heads, geometry.dim)
        self.dtype: torch.dtype = getattr(torch, geometry.dtype)
        self.found_in = ""  # the letters of the tiers that the last load was from
        client.schema_set(
            namespace,
            layers=geometry.layers,
            heads=geometry.heads,
            dim=geometry.dim,
            tokens=geometry.tokens,
            dtype=geometry.dtype,
            fingerprint=fingerprint,
            codecs=codecs,
        )

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the key of every full page of a prompt, in order."""
        # The chain starts at the weights: equal keys mean equal KV, whoever computed it.
        ids = page_ids(tokens, page_tokens=self.geometry.tokens, seed=self.fingerprint)
        return page_keys(self.namespace, ids)

    def load(self, tokens: Sequence[int], via: str) -> Layers:
        """Return the KV of the longest stored prefix of a prompt, [] when none can be had."""
        # The last token is always left to compute: that gives the logits of the next one.
        keys = self.keys(tokens[:-1])
        take = self._take_memory if via == "memory" else self._take_socket
        self.found_in = ""
        if not keys:
            return []
        try:
            match = self.client.match(keys)
            self.found_in = "".join(sorted(set(match.tiers)))
            return take(keys[: match.pages]) if match.pages else []
        except CacheError as error:
            # To compute is never wrong, so a cache that fails is a cache that had nothing. One of
            # these errors is LeaseGone: the lease lapsed while we copied, and a slot may have held
            # another page by then.
            print(f"computing instead: {error}", file=sys.stderr)
            return []

    def store(self, tokens: Sequence[int], layers: Layers, first_page: int, via: str) -> int:
        """Give the server the full pages of a prompt from ``first_page`` on; returns how many."""
        keys = self.keys(tokens)
        put = self._put_memory if via == "memory" else self._put_socket
        for index in range(first_page, len(keys)):
            parent = keys[index - 1] if index else None
            try:
                put(keys[index], parent, index * self.geometry.tokens, layers)
            except CacheError as error:
                print(f"stored only {index} of {len(keys)} pages: {error}", file=sys.stderr)
                return index - first_page
        return max(len(keys) - first_page, 0)

    def _take_socket(self, keys: list[bytes]) -> Layers:
        return self._scatter(self.client.mget(keys))

    def _take_memory(self, keys: list[bytes]) -> Layers:
        # The end of the block confirms the lease; only then are the copies known to be good.
        with self.client.lease(keys) as lease:
            layers = self._scatter(lease.pages)
        return layers

    def _put_socket(self, key: bytes, parent: bytes | None, token: int, layers: Layers) -> None:
        page = torch.empty(self.shape, dtype=self.dtype)
        self._gather(page, token, layers)
        self.client.put(key, as_bytes(page), parent=parent, tokens=self.geometry.tokens)

    def _put_memory(self, key: bytes, parent: bytes | None, token: int, layers: Layers) -> None:
        # The page is invisible until it is committed; leaving the block before gives the slot back.
        with self.client.reserve(key, self.geometry.page_bytes) as slot:
            self._gather(as_torch(slot.view, self.geometry.dtype, self.shape), token, layers)
            slot.commit(parent=parent, tokens=self.geometry.tokens)

    def _scatter(self, views: Sequence[memoryview | None]) -> Layers:
        """Copy pages, each from where it lies, into the K and V of every layer."""
        page = self.geometry
        # A page can be evicted between the match and the read. What follows the gap is of no use.
        present: list[memoryview] = []
        for view in views:
            if view is None:
                break
            present.append(view)
        shape = (1, page.heads, len(present) * page.tokens, page.dim)
        keys = [torch.empty(shape, dtype=self.dtype) for _ in range(page.layers)]
        values = [torch.empty(shape, dtype=self.dtype) for _ in range(page.layers)]
        for index, view in enumerate(present):
            one = as_torch(view, self.geometry.dtype, self.shape)
            scatter_pages(one[None], keys=keys, values=values, first_token=index * page.tokens)
        return list(zip(keys, values, strict=True)) if present else []

    def _gather(self, page: Tensor, token: int, layers: Layers) -> None:
        """Copy the KV from ``token`` on into one page, wherever its memory is."""
        gather_pages(
            [key for key, _ in layers],
            [value for _, value in layers],
            first_token=token,
            num_pages=1,
            page_tokens=self.geometry.tokens,
            out=page[None],
        )
