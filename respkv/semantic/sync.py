"""The blocking face of the semantic cache."""

import os
import threading
from collections.abc import Mapping
from typing import Any, Self, TypeVar, Unpack

from respkv.client import Client, Listening, PageEvent
from respkv.client.replies import Reply
from respkv.errors import ConnectionLost, ProtocolError
from respkv.semantic.answers import Hit, SemanticStats
from respkv.semantic.core import Core
from respkv.semantic.effects import Ask, Effect, Hear, Heard, Steps
from respkv.semantic.settings import Options, make_settings

T = TypeVar("T")

EVENTS_MAX = 10_000  # taken at once; what is left is for the next call


class SemanticCache:
    """Answers found by how near the embeddings of their questions are. Threads may share it.

    cache:     a ``respkv.client.Client``, an engine from ``respkv.open_sync``, or the URL of a
               server, to which a client is then opened and closed.
    namespace: 1 to 64 letters, digits and ``. _ -``. All objects with the same server and namespace
               share their entries, and take embeddings of one ``dim``.
    threshold: the score that a hit has at least; 0.9 for cosine, to be given for the others.
    ttl_s:     time to live of entries; None: until they are evicted.
    metric:    cosine, ip (inner product) or l2, whose score is minus the distance.
    index:     exact, or hnsw, which is approximate and needs the extra ``semantic``.
    max_entries: of each tenant; those that were not used for longest are deleted.
    max_payload_bytes: of each entry; 16 MiB. tenants_max: whose embeddings are kept in this process.
    durability: what a put survives once it has returned: ``written`` or ``durable``, as for pages.

    What another object has stored or deleted is seen by the next call that begins after the server
    has sent its event, which it does at once: within milliseconds. Every call raises ServerError,
    ConnectionLost or TimedOut when the server cannot be had, and is safe to repeat.
    Raises ConfigError for a wrong setting, also, from the first call on, for a namespace that keeps
    embeddings of another dim.
    """

    def __init__(
        self,
        cache: Client | str,
        namespace: str = "answers",
        *,
        dim: int,
        **options: Unpack[Options],
    ) -> None:
        self._core = Core(make_settings(namespace, dim, options))
        if not isinstance(cache, Client | str):
            raise TypeError(
                f"cache is a Client, an engine from respkv.open_sync or a URL, not"
                f" {type(cache).__name__}"
            )
        self._cache = Client(cache) if isinstance(cache, str) else cache
        self._is_own = isinstance(cache, str)
        self._is_closed = False
        self._lock = threading.Lock()
        self._events: Listening[PageEvent] | None = None
        self._pid = os.getpid()
        self._inherited: list[
            Listening[PageEvent]
        ] = []  # a forked child leaves its parent's connection alone

    def put(
        self,
        embedding: Any,
        payload: bytes | str,
        *,
        tenant: str = "",
        ttl_s: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> str:
        """Store a payload under an embedding.

        embedding: [dim] numbers: a list, an array or a tensor.
        payload:   bytes are opaque: text, an image, audio, a tensor's bytes.
        tenant:    who may find it: a search sees the entries of its own tenant only.
        ttl_s:     time to live; None: that of the cache.
        metadata:  a dict that JSON can say, at most 64 KiB of it.
        key:       a name within the tenant. An entry with the same name is replaced; without one,
                   that with the same embedding.
        Returns:   the key.
        Raises:    ValueError or TypeError for what cannot be stored; ServerError OOM when the
                   server has no room, KVQUOTA when the tenant may keep no more. Nothing is stored.
        """
        steps = self._core.put(
            embedding, payload, tenant=tenant, ttl_s=ttl_s, metadata=metadata, key=key
        )
        return self._run(steps)

    def get(
        self, embedding: Any, *, tenant: str = "", threshold: float | None = None
    ) -> Hit | None:
        """Return the nearest entry, or None when its score is below the threshold.

        threshold: in place of that of the cache.
        """
        return self._run(self._core.get(embedding, tenant=tenant, threshold=threshold))

    def search(
        self,
        embedding: Any,
        k: int = 5,
        *,
        tenant: str = "",
        threshold: float | None = None,
    ) -> list[Hit]:
        """Return the k nearest entries, nearest first; only those above a threshold, if given."""
        return self._run(self._core.search(embedding, k, tenant=tenant, threshold=threshold))

    def delete(self, key: str, *, tenant: str = "") -> bool:
        """Delete an entry; say whether it was there."""
        return self._run(self._core.delete(key, tenant=tenant))

    def clear(self, tenant: str = "") -> int:
        """Delete all entries of a tenant; return how many there were."""
        return self._run(self._core.clear(tenant))

    def stats(self) -> SemanticStats:
        """Return what this object has done, and knows of the store."""
        with self._lock:
            return self._core.stats()

    def close(self) -> None:
        """Stop listening, and close the client if it was opened here; later calls raise ConnectionLost."""
        with self._lock:
            self._is_closed = True
            self._stop_listening()
        if self._is_own:
            self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        if self._pid != os.getpid():
            self._begin_anew_after_fork()
        with self._lock:
            try:
                effect = next(steps)
                while True:
                    try:
                        answer = self._carry_out(effect)
                    except BaseException as error:
                        effect = steps.throw(error)
                    else:
                        effect = steps.send(answer)
            except StopIteration as stop:
                result: T = stop.value
                return result

    def _carry_out(self, effect: Effect) -> list[Reply] | Heard:
        if self._is_closed:
            raise ConnectionLost("the semantic cache is closed")
        if isinstance(effect, Hear):
            return self._hear(effect.namespace)
        if not effect.lets_others:
            return self._ask(effect)
        self._lock.release()
        try:
            return self._ask(effect)
        finally:
            self._take_again()

    def _take_again(self) -> None:
        """Take the lock, also when interrupted: it is given back by who has it."""
        interruption: BaseException | None = None
        while True:
            try:
                self._lock.acquire()
                break
            except BaseException as error:
                interruption = error
        if interruption is not None:
            raise interruption

    def _ask(self, ask: Ask) -> list[Reply]:
        pipeline = self._cache.pipeline()
        for command in ask.commands:
            pipeline.command(*command)
        return pipeline.execute(raise_on_error=False)

    def _hear(self, namespace: str) -> Heard:
        heard: list[PageEvent] = []
        if self._events is not None:
            try:
                while len(heard) < EVENTS_MAX:
                    event = self._events.next(0.0)
                    if event is None:
                        break
                    heard.append(event)
            except (ConnectionLost, ProtocolError):
                self._stop_listening()
            except BaseException:
                # Interrupted: what was heard is forgotten here, so it must be asked for again.
                self._stop_listening()
                raise
        if self._events is not None:
            return Heard(heard, is_new=False)
        events = self._cache.events(namespace)
        events.__enter__()
        self._events = events
        return Heard((), is_new=True)

    def _stop_listening(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            events.__exit__(None, None, None)

    def _begin_anew_after_fork(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        if self._events is not None:
            self._inherited.append(self._events)
        self._events = None
