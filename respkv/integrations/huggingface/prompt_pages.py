"""The KV of a model's prompts, kept in respkv: found, loaded into tensors, and stored in the background.

Nothing here knows a Cache of transformers: sources and destinations are tensors, so a paged cache
uses it as well as one that is contiguous.

To compute is never wrong. So a cache that fails is a cache that had nothing: errors of the server are
counted and logged, and only mistakes of the caller are raised.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final, Literal, TypeAlias, TypeVar, Unpack

from torch import Tensor
from transformers import PreTrainedModel

from respkv.chain import TOKEN_BYTES
from respkv.client import Client, SequenceMatch
from respkv.client.sequences import ChainOptions, Tokens, token_bytes
from respkv.errors import CacheError
from respkv.integrations.huggingface.availability import (
    Availability,
    is_final,
    is_schema_refusal,
)
from respkv.integrations.huggingface.buffers import BufferPool
from respkv.integrations.huggingface.locks import ForkLock, OneProcess
from respkv.integrations.huggingface.logits import pack_logits, unpack_logits
from respkv.integrations.huggingface.model_kv import (
    ModelKV,
    WeightsNote,
    fingerprint_of,
    read_model,
)
from respkv.integrations.huggingface.page_copies import KVPair, Target
from respkv.integrations.huggingface.page_loads import PageLoads
from respkv.integrations.huggingface.page_stores import Gather, PageStores
from respkv.integrations.huggingface.pages_stats import PagesStats
from respkv.integrations.huggingface.store_queue import StoreQueue
from respkv.page import Geometry, part_of

PAGE_TOKENS_MIN: Final = 64
PAGE_TOKENS_MAX: Final = 256
PAGE_BYTES: Final = 1 << 20  # a page has at least, if that is not too many tokens
MATCH_TIMEOUT_S: Final = 2.0
LOAD_PATIENCE: Final = 10  # times as long as it is expected to take
NO_MATCH: Final = SequenceMatch(0, 0, "", 0, False)
T = TypeVar("T")
KV: TypeAlias = Sequence[KVPair]


class PromptPages(OneProcess):
    """The pages of one model. Threads may share it.

    cache:       a ``Client``, an embedded engine (``respkv.open_sync``), or a URL, for which it has
                 a client of its own.
    model:       what makes the KV: its geometry is read off a forward pass of one token, and its
                 fingerprint is a hash of its configuration and all its weights, read once. Or give
                 ``geometry``, whose tokens are those of a page, and ``fingerprint`` or ``namespace``,
                 which no other model may have.
    namespace:   after the fingerprint if None.
    page_tokens: tokens of a page; 64 to 256, so that pages of small models are not too many, if None.
                 Prompts are matched to the token whatever it is.
    codecs, ttl_ms, durability: of the namespace, as in ``Client.schema_set``.
    match_timeout_s: for how long a question is waited for, so that a cache that hangs holds up the
                 caller no longer; then nobody asks for ten times as long. A load may take ten times
                 as long as its match says, and this long at least. Neither is ever longer than the
                 client's own ``timeout_s``, which holds for stores.
    queue_max:   stores that may wait.
    spare_bytes: of memory are kept for the next prompt.
    Raises: UnsupportedModel; TypeError when there is neither a model nor a geometry, or nothing
            that tells its pages from those of another model.
    """

    def __init__(
        self,
        cache: Client | str,
        *,
        model: PreTrainedModel | None = None,
        geometry: Geometry | None = None,
        fingerprint: bytes | None = None,
        namespace: str | None = None,
        page_tokens: int | None = None,
        codecs: Mapping[str, str] | None = None,
        ttl_ms: int | None = None,
        durability: Literal["memory", "written", "durable"] | None = None,
        match_timeout_s: float = MATCH_TIMEOUT_S,
        queue_max: int = 64,
        spare_bytes: int = 1 << 30,
    ) -> None:
        if not match_timeout_s > 0:
            raise ValueError(f"match_timeout_s must be more than 0, not {match_timeout_s}")
        if model is None and geometry is None:
            raise TypeError("PromptPages needs a model, or the geometry of its pages")
        if not (fingerprint or namespace or (fingerprint is None and model is not None)):
            raise TypeError(
                "PromptPages needs a model, a fingerprint or a namespace: models of one shape"
                " would get each other's pages"
            )
        self.model_kv: ModelKV | None = None if model is None else read_model(model)
        if geometry is None:
            assert self.model_kv is not None
            geometry = self.model_kv.geometry(
                page_tokens or _page_tokens(self.model_kv.token_bytes)
            )
        if fingerprint is None:
            fingerprint = b"" if model is None else fingerprint_of(model)
        self._weights = None if model is None else WeightsNote(model)
        self.geometry = geometry
        self.fingerprint = fingerprint
        self.namespace = namespace or f"hf-{fingerprint.hex()[:16]}-{geometry.tokens}"
        self.buffers = BufferPool(spare_bytes)
        self._schema: dict[str, Any] = {
            "layers": geometry.layers,
            "heads": geometry.heads,
            "dim": geometry.dim,
            "tokens": geometry.tokens,
            "dtype": geometry.dtype,
            "fingerprint": fingerprint or None,
            # Ids begin with the weights, so equal ids mean equal KV whoever computed it.
            "seed": fingerprint or None,
            "codecs": codecs,
            "ttl_ms": ttl_ms,
            "durability": durability,
        }
        self._owns_client = isinstance(cache, str)
        self.client = Client(cache, reconnect_max=1) if isinstance(cache, str) else cache
        self._is_declared = False
        self._state = Availability()
        self._counts: dict[str, Any] = dict.fromkeys((each.name for each in fields(PagesStats)), 0)
        self._lock = ForkLock()  # a collection may drop a cache, which is stored, anywhere
        self._storing = ForkLock()
        self._queue = StoreQueue(queue_max)
        self.match_timeout_s = match_timeout_s
        self._quick = self.client.within(match_timeout_s)
        where = (self.namespace, geometry, fingerprint, self.buffers)
        self._loads = PageLoads(self._quick, *where)
        self._stores = PageStores(self.client, *where)

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.geometry.tokens

    @property
    def has_its_weights(self) -> bool:
        """Whether the model has the weights that it had, as far as torch counts their changes."""
        return self._weights is None or self._weights.is_right

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.geometry.page_bytes // self.geometry.tokens

    def check(self) -> None:
        """Declare the namespace now.

        Raises ServerError KVSCHEMA when it holds the KV of another model or has pages of another
        shape, ConnectionLost or TimedOut when the server is away.
        """
        self._is_declared = False
        self._declare(self.client)

    # -- what is there ------------------------------------------------------------------------

    def match(
        self, tokens: Tokens, *, logits: bool = False, **chain: Unpack[ChainOptions]
    ) -> SequenceMatch:
        """Say how many tokens of a prompt are stored; they then stay for a few seconds.

        tokens: a list, an array or a tensor of integers. chain: salt, tenant, lora, ... of
                ``Client.seq.match``.
        logits: bring those of the prompt's end at once; ``logits`` then takes them from the match.
        Returns: NO_MATCH also when the cache cannot be asked.
        """
        data = token_bytes(tokens)
        seq, name = self._quick.seq, self.namespace
        found = self._ask("match", lambda: seq.match(name, data, logits=logits, **chain))
        if found is None:
            return NO_MATCH
        self._count(matches=1, match_tokens=found.tokens)
        return found

    def logits(
        self,
        tokens: Tokens,
        *,
        match: SequenceMatch | None = None,
        **chain: Unpack[ChainOptions],
    ) -> Tensor | None:
        """Return the logits [V] that follow a prompt, as they were stored; None: they are not.

        match: of this prompt; if they came with it, nobody is asked.
        """
        if match is not None and match.logits is not None:
            return unpack_logits(match.logits)
        data = token_bytes(tokens)
        packed = self._ask("logits", lambda: self._loads.logits(data, chain))
        return None if packed is None else unpack_logits(packed)

    def load(
        self,
        tokens: Tokens,
        into: KV,
        *,
        first: int = 0,
        stop: int | None = None,
        match: SequenceMatch | None = None,
        **chain: Unpack[ChainOptions],
    ) -> int:
        """Fill keys and values with those of a prompt's tokens from ``first`` up to ``stop``.

        into:    K and V of every layer, each ``[n, H, D]`` of the geometry's dtype, any strides and
                 device; row 0 is token ``first``.
        stop:    as many as ``match`` found if None, else as many as there is room for.
        Returns: the end: rows of tokens ``first`` to there are those that were stored, the others
                 are undefined. ``first`` when nothing could be had.
        Raises:  ValueError when ``into`` does not fit.
        """
        data = token_bytes(tokens)
        target = Target(into, self.geometry, first)
        known = len(data) // TOKEN_BYTES if match is None else match.tokens
        end = min(known if stop is None else stop, known, first + target.room)
        if end <= first:
            return first
        begun = time.perf_counter()
        tiers = "" if match is None else match.tiers
        loads = self._loads_for(match)
        loaded = self._ask("load", lambda: loads.load(data, target, end, known, chain, tiers))
        if loaded is None:
            return first
        self._count(
            loads=1,
            loaded_tokens=loaded.end - first,
            loaded_bytes=(loaded.end - first) * self.token_bytes,
            leased_bytes=loaded.leased_tokens * self.token_bytes,
            gpu_bytes=loaded.gpu_tokens * self.token_bytes,
            load_s=time.perf_counter() - begun,
        )
        return loaded.end

    # -- storing ------------------------------------------------------------------------------

    def store(
        self,
        tokens: Tokens,
        kv: KV | Gather | None,
        *,
        first: int = 0,
        logits: Tensor | None = None,
        done: Callable[[], None] | None = None,
        **chain: Unpack[ChainOptions],
    ) -> bool:
        """Store the KV of a prompt in the background; pages that are there are not sent.

        kv:      K and V of every layer, each ``[n, H, D]`` of tokens[first:], any strides and
                 device. They must not change until it is done (``flush``). Or a function that is
                 called with a first token and an end, in the thread that stores, for each part
                 that is missing, and returns K and V of these tokens. None: only logits.
        first:   a multiple of page_tokens; pages in front of it are there, or nothing is stored.
        logits:  [V] that follow the last token.
        done:    called in the thread that stores when kv is not needed any more, be it stored or not.
        Returns: False when too much waits already, and it was dropped; ``done`` is not called then.
        Raises:  ValueError when kv does not fit.
        """
        data = token_bytes(tokens)
        count = len(data) // TOKEN_BYTES
        if first % self.page_tokens:
            raise ValueError(f"first = {first}: accepted are multiples of {self.page_tokens}")
        if kv is not None and not callable(kv):
            room = Target(kv, self.geometry, first).room
            if room < count - first:
                raise ValueError(f"kv has {room} tokens, {count - first} are to be stored")
        packed = None if logits is None else pack_logits(logits)
        if not self._state.is_open:
            self._count(stores_dropped=1)
            return False

        def work() -> None:
            try:
                with self._storing:
                    stored = self._ask(
                        "store", lambda: self._stores.store(data, kv, first, packed, chain)
                    )
            finally:
                if done is not None:
                    done()
            if stored is None:
                self._count(stores_dropped=1)
            else:
                self._count(stores=1, stored_pages=stored)

        is_queued = self._queue.add(work)
        if not is_queued:
            self._count(stores_dropped=1)
        return is_queued

    def clear(self) -> int:
        """Forget all pages of the namespace, and what hangs on them; return how many there were.

        What is queued at this time is stored before that or after it.
        Raises CacheError.
        """
        pattern = b"".join(b"\\" + bytes([each]) for each in self.namespace.encode()) + b":*"
        count, cursor = 0, b"0"
        with self._storing:
            while True:
                reply: Any = self.client.command("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
                cursor, keys = bytes(reply[0]), [bytes(key) for key in reply[1]]
                if keys:
                    self.client.delete(*keys)
                count += sum(part_of(key) is None for key in keys)
                if cursor == b"0":
                    return count

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until what was queued is stored, or has failed; False: it takes longer."""
        return self._queue.flush(timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Store what is queued and take no more; close the client, if it is its own."""
        self._queue.close(timeout_s)
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> "PromptPages":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> PagesStats:
        """Return what was done since the beginning."""
        with self._lock:
            counts = dict(self._counts)
        counts["errors"], counts["last_error"] = self._state.errors, self._state.last_error
        return PagesStats(**counts)

    # -- asking -------------------------------------------------------------------------------

    def _ask(self, what: str, ask: Callable[[], T]) -> T | None:
        """Return an answer, None when there is none to be had."""
        if not self._state.is_open:
            return None
        begun = time.monotonic()
        try:
            if not self._is_declared:
                self._declare(self._quick)
            try:
                answer = ask()
            except CacheError as error:
                if not is_schema_refusal(error):
                    raise
                self._declare(self._quick)  # everything was flushed, its schema too
                answer = ask()
        except CacheError as error:
            if not self._state.refused:
                self._state.failed(what, error, time.monotonic() - begun)
            return None
        self._state.succeeded()
        return answer

    def _declare(self, client: Client) -> None:
        # Threads may do so together, and none waits for another: to declare twice changes nothing.
        try:
            client.schema_set(self.namespace, **self._schema)
        except CacheError as error:
            if is_final(error):
                self._state.refuse(error)
            raise
        self._is_declared = True

    def _loads_for(self, match: SequenceMatch | None) -> PageLoads:
        """Return what loads, and waits for as long as that may take."""
        if match is None:
            return self._loads.within(self.client)
        seconds = LOAD_PATIENCE * match.load_us / 1e6
        if seconds <= self.match_timeout_s:
            return self._loads
        return self._loads.within(self.client.within(seconds))

    def _count(self, **more: float) -> None:
        with self._lock:
            for name, number in more.items():
                self._counts[name] += number


def _page_tokens(token_bytes: int) -> int:
    """Return how long a page is: a power of two, of 1 MiB or more if that is not too long."""
    tokens = PAGE_TOKENS_MIN
    while tokens < PAGE_TOKENS_MAX and tokens * token_bytes < PAGE_BYTES:
        tokens *= 2
    return tokens
