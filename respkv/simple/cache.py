"""A KV cache under names: the keys and values of a layer, kept by a prefix and its number.

Nothing here knows tokens, pages or models; who has token ids gets more out of ``cache.seq``, which
finds the longest common prefix and shares pages. A pair of tensors is one value of a namespace, so
the limit of its bytes, which pair goes first and what expires are the engine's affair. It talks to
an engine of its own in this process, or to a server by its URL: to either by a ``Client``.
"""

import math
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import takewhile
from threading import Lock
from typing import Any, Self, TypeAlias

import torch

from respkv.client.replies import Reply
from respkv.client.requests import Arg
from respkv.client.sync import Client
from respkv.embedded import EmbeddedCache, open_sync
from respkv.errors import ConfigError, LeaseGone, ServerError
from respkv.simple.names import check_namespace, key_of, name_of, prefix_of
from respkv.simple.record import Pair, pack, unpack

Device: TypeAlias = str | torch.device
Tensors: TypeAlias = tuple[torch.Tensor, torch.Tensor]

GIB = 1 << 30
# Pairs are as large as they like, and the arena gives room in units: with a little more than the
# limit it can hold as many bytes as the limit allows.
SLACK_BYTES = 16 << 20
SCAN_COUNT = 10_000
LOOK_AHEAD = 8  # layers that are asked for at a time when nobody knows how many there are
READS_MAX = 3  # of a prefix that is replaced while it is read
USED_MAX = 100_000  # prefixes of which it is known when they were used
TTL_S_MAX = 10 * 365 * 86_400.0


class SimpleKVCache:
    """Keys and values by prefix and layer.

    max_size_gb: of all pairs together, in GiB; the least recently used go first. Over a server it is
                 set as the quota of the namespace; None leaves that as it is.
    ttl_s:       how long a pair is kept; None: as long as there is room.
    device:      where tensors are returned; they may come from any.
    url:         of a server; without it an engine is opened in this process.
    cache:       a client or an embedded cache that is open, instead of either; it stays open.
    namespace:   keeps what is stored here apart from what others store.
    settings:    of the engine in this process; see ``respkv.open_sync``.
    Threads may share it. What is stored is bytes: tensors of every dtype and shape come back as they
    were. Raises ConfigError naming an argument that is wrong.
    """

    def __init__(
        self,
        max_size_gb: float | None = 1.0,
        ttl_s: float | None = None,
        device: Device = "cpu",
        url: str | None = None,
        *,
        cache: Client | None = None,
        namespace: str = "simple",
        **settings: object,
    ) -> None:
        if max_size_gb is not None and not (_is_number(max_size_gb) and 0 < max_size_gb < math.inf):
            raise ConfigError(f"max_size_gb is {max_size_gb!r}; it must be a number more than 0")
        check_namespace(namespace)
        if (url is not None or cache is not None) and settings:
            name = min(settings)
            raise ConfigError(f"{name} = {settings[name]!r}: the server has its own settings")
        if url is not None and cache is not None:
            raise ConfigError(f"url {url!r} and cache: give one of them")
        if not isinstance(cache, Client | None) or not isinstance(url, str | None):
            given = f"url is a {type(url).__name__}" if cache is None else f"cache is {cache!r}"
            raise ConfigError(f"{given}; a URL is a str, and a cache a Client or what is opened")
        self._ttl_ms = _ms(ttl_s)
        self.device = _checked_device(device)
        self.namespace = namespace
        self._max_bytes = 0 if max_size_gb is None else max(1, round(max_size_gb * GIB))
        self._is_own = cache is None
        if cache is None:
            cache = Client(url) if url is not None else self._open(settings)
        self._cache = cache
        self._lock = Lock()
        self._used: OrderedDict[bytes, None] = OrderedDict()  # prefixes, the last used at the end
        self._hits = self._misses = self._rejected = 0
        self._evicted = self._expired = 0  # before this was opened
        self._evicted, self._expired = self._server_counts()

    def _open(self, settings: dict[str, Any]) -> EmbeddedCache:
        if not self._max_bytes and "maxmemory" not in settings:
            raise ConfigError("max_size_gb is None: without a server, say how much there may be")
        room = self._max_bytes * 9 // 8 + SLACK_BYTES
        chosen: dict[str, Any] = {"maxmemory": room, "maxmemory_policy": "lru", "prefault": False}
        return open_sync(**{**chosen, **settings})

    # -- storing ------------------------------------------------------------------------------

    def cache_kv(
        self,
        prefix: str,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        ttl_s: float | None = None,
    ) -> bool:
        """Store the keys and values of a layer; what was there under these names is replaced.

        keys, values: dense tensors of any shape, dtype and device, copied before this returns.
        ttl_s:   how long they are kept; None: as the cache says.
        Returns: False when they can have no room, be it that they are larger than the cache.
        Raises:  TypeError or ValueError naming what cannot be stored.
        """
        pairs = {_checked(layer): Pair(keys, values)}
        return self._store(prefix, pairs, ttl_s)

    def cache_all_layers(
        self, prefix: str, layers: Sequence[Tensors], ttl_s: float | None = None
    ) -> bool:
        """Store the keys and values of all layers, from layer 0 on.

        Returns: False when there is no room for all of them; then none is stored.
        Raises:  TypeError or ValueError naming what cannot be stored.
        """
        if not layers:
            raise ValueError("layers is empty; at least one pair of keys and values is needed")
        count = len(layers)
        store = os.urandom(8).hex()
        pairs = {n: Pair(keys, values, count, store) for n, (keys, values) in enumerate(layers)}
        return self._store(prefix, pairs, ttl_s)

    def _store(self, prefix: str, pairs: dict[int, Pair], ttl_s: float | None) -> bool:
        name = name_of(prefix)
        ttl_ms = self._ttl_ms if ttl_s is None else _ms(ttl_s)
        expiry: list[Arg] = [] if ttl_ms is None else ["PX", ttl_ms]
        keys = [key_of(self.namespace, name, layer) for layer in pairs]
        packed = [pack(pair) for pair in pairs.values()]
        if self._max_bytes and sum(each.nbytes for each in packed) > self._max_bytes:
            self._cache.delete(*keys)  # what it shall be no longer
            return self._refused(len(pairs))  # before others go in vain
        # First, so that what is replaced neither stays when the new has no room, nor takes room.
        batch = self._cache.pipeline().command("DEL", *keys)
        if self._max_bytes:  # each time: a server that was started anew has forgotten it
            batch.command("KV.QUOTA", self.namespace, "MAXBYTES", self._max_bytes)
        for key, payload in zip(keys, packed, strict=True):
            batch.command("KV.PUT", key, payload, *expiry)
        failures = [reply for reply in batch.execute(raise_on_error=False) if _is_error(reply)]
        if failures:
            self._cache.delete(*keys)
            for failure in failures:
                if isinstance(failure, ServerError) and failure.word not in ("OOM", "KVQUOTA"):
                    raise failure
            return self._refused(len(pairs))
        with self._lock:
            self._touch(name)
        return True

    def _refused(self, count: int) -> bool:
        with self._lock:
            self._rejected += count
        return False

    # -- reading ------------------------------------------------------------------------------

    def get_cached_kv(
        self, prefix: str, layer: int, device: Device | None = None
    ) -> Tensors | None:
        """Return the keys and values of a layer, or None.

        device:  where they are wanted; None: as the cache says. They are the caller's own.
        """
        name = name_of(prefix)
        (found,) = self._read([key_of(self.namespace, name, _checked(layer))], device)
        self._count(name, is_hit=found is not None)
        return None if found is None else (found.keys, found.values)

    def get_all_layers(self, prefix: str, device: Device | None = None) -> list[Tensors] | None:
        """Return the keys and values of every layer, or None.

        Of layers that were stored together come all, or None when one of them has gone; one that was
        replaced since comes as it is now. Were they stored one by one, nobody knows how many there
        are to be: those come that follow each other from layer 0 on.
        """
        name = name_of(prefix)
        found: list[Pair] | None = None
        for _ in range(READS_MAX):
            found = self._read_all(name, device)
            if found is None or len({pair.store for pair in found if pair.num_layers}) < 2:
                break
            found = None  # of two who stored it, one meanwhile
        self._count(name, is_hit=found is not None)
        return None if found is None else [(pair.keys, pair.values) for pair in found]

    def _read_all(self, name: bytes, device: Device | None) -> list[Pair] | None:
        (first,) = self._read([key_of(self.namespace, name, 0)], device)
        if first is None:
            return None
        pairs, total = [first], first.num_layers  # 0: as many as there are
        while not total or len(pairs) < total:
            layers = range(len(pairs), total or len(pairs) + LOOK_AHEAD)
            keys = [key_of(self.namespace, name, layer) for layer in layers]
            more = self._read(keys, device)
            there = [pair for pair in takewhile(lambda pair: pair is not None, more) if pair]
            pairs += there
            total = total or max(pair.num_layers for pair in pairs)
            if len(there) < len(more):
                break
        return None if len(pairs) < total else pairs[: total or None]

    def _read(self, keys: list[bytes], device: Device | None) -> list[Pair | None]:
        where = self.device if device is None else torch.device(device)
        if isinstance(self._cache, EmbeddedCache):
            try:
                with self._cache.lease(keys) as lease:
                    return [page if page is None else unpack(page, where) for page in lease.pages]
            except LeaseGone:
                pass  # this thread was kept waiting for longer than a lease lasts
        pages = self._cache.mget(keys)
        return [None if page is None else unpack(page, where) for page in pages]

    # -- evicting -----------------------------------------------------------------------------

    def evict(self, what: str | int) -> int:
        """Evict a prefix with all its layers, or a number of prefixes, the least recently used first.

        Those that others have used, or that were here before, count as used before all others.
        Returns: how many pairs have gone.
        """
        if isinstance(what, str):
            return self._evict([name_of(what)])
        if isinstance(what, bool) or not isinstance(what, int) or what < 0:
            raise ValueError(f"evict({what!r}): a prefix is needed, or how many, from 0 on")
        return self._evict(self._coldest(what))

    def _coldest(self, count: int) -> list[bytes]:
        there = dict.fromkeys(prefix_of(self.namespace, key) for key in self._scan())
        with self._lock:
            known = dict.fromkeys(name for name in self._used if name in there)
        strangers = [name for name in there if name not in known]
        return [*strangers, *known][:count]

    def _evict(self, names: Sequence[bytes]) -> int:
        gone = set(names)
        with self._lock:
            for name in names:
                self._used.pop(name, None)
        return self._delete([key for key in self._scan() if prefix_of(self.namespace, key) in gone])

    def clear(self) -> int:
        """Evict everything of the namespace. Returns how many pairs have gone."""
        with self._lock:
            self._used.clear()
        return self._delete(list(self._scan()))

    def _delete(self, keys: Sequence[bytes]) -> int:
        batches = (keys[n : n + SCAN_COUNT] for n in range(0, len(keys), SCAN_COUNT))
        return sum(self._cache.delete(*batch) for batch in batches)

    def _scan(self) -> Iterator[bytes]:
        pattern = re.sub(r"([*?\[\]^\\])", r"\\\1", self.namespace) + ":*"
        seen: set[bytes] = set()
        cursor: Arg = 0
        while True:
            match self._cache.command("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT):
                case [bytes(after), list(keys)]:
                    pass
                case reply:
                    raise TypeError(f"SCAN was answered with {type(reply).__name__}")
            for key in keys:
                # The pattern finds keys of a namespace "a:b", too, where this one is "a".
                if not isinstance(key, bytes) or key in seen:
                    continue
                if prefix_of(self.namespace, key):
                    seen.add(key)
                    yield key
            if after == b"0":
                return
            cursor = after

    # -- statistics ---------------------------------------------------------------------------

    def get_stats(self) -> dict[str, int | float]:
        """Return what happened so far.

        hits, misses, total_requests: calls of get_cached_kv and get_all_layers; hit_rate: 0 to 1.
        entries, bytes: pairs in the namespace, and what they take; max_bytes: what they may take.
        evictions_lru, evictions_ttl: since this was opened; of a server, for all who use it.
        rejected: pairs that found no room.
        """
        quota = self._cache.quota(self.namespace)
        evicted, expired = self._server_counts()
        with self._lock:
            hits, misses, rejected = self._hits, self._misses, self._rejected
        total = hits + misses
        return {
            "hits": hits,
            "misses": misses,
            "total_requests": total,
            "hit_rate": hits / total if total else 0.0,
            "entries": int(quota["pages"]),
            "bytes": int(quota["bytes"]),
            "max_bytes": self._max_bytes or int(quota["max_bytes"]),
            "evictions_lru": max(0, evicted - self._evicted),
            "evictions_ttl": max(0, expired - self._expired),
            "rejected": rejected,
        }

    def print_stats(self) -> None:
        """Print what ``get_stats`` returns."""
        stats = self.get_stats()
        print(f"SimpleKVCache {self.namespace!r}")
        for name, value in stats.items():
            print(f"  {name:15} {_shown(name, value)}")

    def _server_counts(self) -> tuple[int, int]:
        info = self._cache.info()
        return int(info.get("kv_evicted", 0)), int(info.get("kv_expired", 0))

    # -- the rest -----------------------------------------------------------------------------

    def close(self) -> None:
        """Close the engine or the connection, unless it was given; a second call does nothing."""
        if self._is_own:
            self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self, name: bytes, *, is_hit: bool) -> None:
        with self._lock:
            if is_hit:
                self._hits += 1
                self._touch(name)
            else:
                self._misses += 1

    def _touch(self, name: bytes) -> None:
        self._used[name] = None
        self._used.move_to_end(name)
        if len(self._used) > USED_MAX:  # that one counts as a stranger then
            self._used.popitem(last=False)


def _checked_device(device: Device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"device is {device!r}, which cannot be used: {error}") from error
    return found


def _checked(layer: int) -> int:
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"layer is {layer!r}; it must be a number from 0 on")
    return layer


def _ms(ttl_s: float | None) -> int | None:
    if ttl_s is None:
        return None
    if not _is_number(ttl_s) or not 0 < ttl_s <= TTL_S_MAX:
        raise ConfigError(
            f"ttl_s is {ttl_s!r}; it must be more than 0, up to {TTL_S_MAX:g}, or None for ever"
        )
    return max(1, round(ttl_s * 1000))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_error(reply: Reply) -> bool:
    return isinstance(reply, ServerError)


def _shown(name: str, value: float) -> str:
    if name == "hit_rate":
        return f"{value:.1%}"
    if name.endswith("bytes"):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,}"
