"""What a semantic cache does, without the I/O: operations that a face drives (effects.py).

Every operation first makes its view of the store current: it takes the events that have come since
the last one, and reads the embeddings of entries of which they tell. If listening had to begin anew, or
events were missed, all keys are asked for again. Then the index names candidates, and what is
answered is always read from the store: an entry that has expired, was evicted or deleted is no
hit, whatever the index says, and leaves it.

Left alone on purpose: a command for it in the server (KV.SEM). The search would hold up every other
client of the server's one event loop for as long as it takes, the server would need numpy and
usearch, and an index is more memory next to the cache. Here each process that searches pays for
its own index, and the server sees SET-like and GET-like commands only.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from respkv.client.commands import list_of, unexpected
from respkv.client.replies import Reply
from respkv.client.requests import Arg
from respkv.errors import ConfigError, PageCorrupt, ServerError
from respkv.semantic import records
from respkv.semantic.answers import Hit, SemanticStats
from respkv.semantic.effects import Ask, Hear, Heard, Steps
from respkv.semantic.embeddings import Vector, as_vector, scaled, scores
from respkv.semantic.records import Record
from respkv.semantic.settings import Settings
from respkv.semantic.shelf import Shelf, Shelves

SCAN_COUNT = 10_000
BATCH = 256  # commands sent together
STALE_MAX = 4096  # entries, of whom nothing is asked for, that are noted and not read
CANDIDATES = 8  # that a get has ready, in case the nearest ones are gone
PAYLOADS = 8  # that a search asks for together
TURNS = 3
# Entries may be replaced while they are read; a get that meets that so often gives up.
ATTEMPTS = 64


class Core:
    """The state of one semantic cache, and its operations."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._names = settings.names
        self._shelves = Shelves(settings.dim, settings.metric, settings.index, settings.tenants_max)
        self._is_described = self._is_complete = False
        self._hits = self._misses = self._puts = 0
        self._gone = self._evicted = self._unreadable = self._rescans = 0

    def put(
        self,
        embedding: Any,
        payload: bytes | str,
        *,
        tenant: str = "",
        ttl_s: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> Steps[str]:
        """Store an entry; return its key. See ``SemanticCache.put``."""
        settings = self._settings
        vector = as_vector(embedding, settings.dim, settings.metric)
        owner = records.tenant_hash(tenant)
        kept = settings.check_payload(payload)
        ttl_ms = settings.ttl_ms(ttl_s)
        name = records.name_of(vector) if key is None else key
        entry = records.entry_hash(name)
        told = None if metadata is None else records.as_metadata(metadata)
        created_ms = time.time_ns() // 1_000_000
        value = records.encode(owner, Record(name, vector, kept, told, created_ms))
        yield from self._listen()
        args: list[Arg] = ["KV.PUT", self._names.key(owner, entry), value, "TENANT", owner.hex()]
        if ttl_ms:
            args += ("PX", ttl_ms)
        if settings.durability is not None:
            args.append(settings.durability.upper())
        num_changes = self._shelves.num_changes
        try:
            checked((yield Ask([args], lets_others=True)))
        except BaseException:
            # It may have been stored or not; whoever reads next will see.
            self._shelves.open(owner).stale.add(entry)
            raise
        shelf = self._shelves.open(owner)
        self._shelves.note(owner, entry)
        if self._shelves.num_changes == num_changes:
            shelf.put(entry, vector, created_ms)
            shelf.use(entry)
        else:  # of this very put perhaps, or of one that came after it
            shelf.stale.add(entry)
        self._puts += 1
        yield from self._make_room(owner, entry)
        return name

    def get(
        self, embedding: Any, *, tenant: str = "", threshold: float | None = None
    ) -> Steps[Hit | None]:
        """Return the nearest entry, or None. See ``SemanticCache.get``."""
        settings = self._settings
        vector = as_vector(embedding, settings.dim, settings.metric)
        owner = records.tenant_hash(tenant)
        least = settings.threshold if threshold is None else settings.check_threshold(threshold)
        yield from self._catch_up(owner)
        is_sure = False
        for _ in range(ATTEMPTS):
            near = self._near(owner, vector, CANDIDATES, least)
            if not near and is_sure:
                break
            if not near:
                # Before a model is asked: what another has stored just now may be on its way. The
                # server tells of it some turns of its loop later, so it gets those.
                for _ in range(TURNS):
                    checked((yield Ask([["PING"]])))
                yield from self._catch_up(owner)
                is_sure = True
            for entry in near:
                (hit,) = yield from self._fetch(owner, [entry], vector)
                if hit is not None:
                    self._hits += 1
                    self._shelves.open(owner).use(entry)
                    return hit
                yield from self._read_stale(owner)
                if entry in self._shelves.open(owner).entries:
                    break  # it is another now, and so may be the nearest
        self._misses += 1
        return None

    def search(
        self,
        embedding: Any,
        k: int = 5,
        *,
        tenant: str = "",
        threshold: float | None = None,
    ) -> Steps[list[Hit]]:
        """Return the k nearest entries, nearest first. See ``SemanticCache.search``."""
        settings = self._settings
        vector = as_vector(embedding, settings.dim, settings.metric)
        owner = records.tenant_hash(tenant)
        least = None if threshold is None else settings.check_threshold(threshold)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k = {k!r}: how many are searched for, from 1 on")
        yield from self._catch_up(owner)
        found: dict[bytes, Hit] = {}
        for _ in range(ATTEMPTS):
            near = self._near(owner, vector, k, least)
            wanted = [entry for entry in near if entry not in found]
            if not wanted:
                break
            for start in range(0, len(wanted), PAYLOADS):
                batch = wanted[start : start + PAYLOADS]
                hits = yield from self._fetch(owner, batch, vector)
                pairs = zip(batch, hits, strict=True)
                found |= {entry: hit for entry, hit in pairs if hit is not None}
            yield from self._read_stale(owner)
        best = sorted(found.items(), key=lambda each: (-each[1].score, each[0]))[:k]
        shelf = self._shelves.open(owner)
        for entry, _ in reversed(best):
            shelf.use(entry)
        if best:
            self._hits += 1
        else:
            self._misses += 1
        return [hit for _, hit in best]

    def delete(self, key: str, *, tenant: str = "") -> Steps[bool]:
        """Delete an entry; say whether it was there."""
        owner, entry = records.tenant_hash(tenant), records.entry_hash(key)
        (count,) = checked((yield Ask([["DEL", self._names.key(owner, entry)]])))
        self._shelves.removed(owner, entry)
        return bool(count)

    def clear(self, tenant: str = "") -> Steps[int]:
        """Delete all entries of a tenant; return how many there were."""
        owner = records.tenant_hash(tenant)
        keys = yield from self._scan()
        entries = sorted(keys.get(owner, ()))
        count = yield from self._delete(owner, entries)
        return count

    def stats(self) -> SemanticStats:
        """Return what was done so far."""
        shelves, asked = self._shelves, self._hits + self._misses
        return SemanticStats(
            entries=shelves.num_keys,
            tenants=len(shelves.keys),
            tenants_open=shelves.num_open,
            index_bytes=shelves.index_bytes,
            hits=self._hits,
            misses=self._misses,
            hit_rate=self._hits / asked if asked else 0.0,
            puts=self._puts,
            gone=self._gone,
            evicted=self._evicted,
            unreadable=self._unreadable,
            rescans=self._rescans,
        )

    def _catch_up(self, owner: bytes) -> Steps[None]:
        """Make the view of the store current, for one tenant with its embeddings."""
        yield from self._listen()
        yield from self._read_stale(owner)

    def _listen(self) -> Steps[None]:
        """Take note of what has become of entries since the last time."""
        heard: Heard = yield Hear(self._names.of_pages)
        if heard.is_new or any(event.missed for event in heard.events):
            self._is_complete = False
        if not self._is_complete:
            # What was heard just now came before what is asked for now.
            yield from self._describe()
            keys = yield from self._scan()
            self._shelves.restart(keys)
            self._rescans += 1
            self._is_complete = True
        else:
            for event in heard.events:
                if event.kind == "cleared":
                    self._shelves.restart({})
                    self._is_described = False
                elif (name := self._names.parse(event.key)) is None:
                    continue
                elif event.kind in ("stored", "removed"):
                    self._shelves.changed(*name, is_there=event.kind == "stored")
        if not self._is_described:
            yield from self._describe()

    def _describe(self) -> Steps[None]:
        """Agree with all other users of the namespace on what is kept in it. Raises ConfigError."""
        about = f"dim={self._settings.dim}"
        (said,) = checked((yield Ask([["SET", self._names.about, about, "NX", "GET"]])))
        if isinstance(said, bytes) and said != about.encode():
            raise ConfigError(
                f"namespace {self._names.namespace!r} keeps embeddings of another model:"
                f" {said.decode(errors='replace')}, not {about}; take another namespace, or delete"
                f" {self._names.about!r}"
            )
        self._is_described = True

    def _scan(self) -> Steps[dict[bytes, set[bytes]]]:
        """Return the entries of all tenants that are in the store."""
        keys: dict[bytes, set[bytes]] = {}
        cursor = b"0"
        while True:
            scan: list[Arg] = ["SCAN", cursor, "MATCH", self._names.pattern, "COUNT", SCAN_COUNT]
            (reply,) = checked((yield Ask([scan])))
            match reply:
                case [bytes(cursor), list(found)]:
                    pass
                case _:
                    raise unexpected("a cursor and keys", reply)
            for key in found:
                name = self._names.parse(key) if isinstance(key, bytes) else None
                if name is not None:
                    keys.setdefault(name[0], set()).add(name[1])
            if cursor == b"0":
                return keys

    def _read_stale(self, owner: bytes) -> Steps[None]:
        """Read the embeddings of entries that are new here, or of which something was told."""
        shelf = self._shelves.open(owner)
        own = [] if shelf.is_loaded else list(shelf.entries)
        last = records.front_bytes(self._settings.dim) - 1
        while shelf.stale:
            batch = [entry for entry, _ in zip(shelf.stale, range(BATCH), strict=False)]
            ranges: list[list[Arg]] = [
                ["GETRANGE", self._names.key(owner, each), 0, last] for each in batch
            ]
            for entry, reply in zip(batch, checked((yield Ask(ranges))), strict=True):
                self._take_front(owner, shelf, entry, reply)
        if not shelf.is_loaded:
            shelf.is_loaded = True
            shelf.order_by_age(own)

    def _take_front(self, owner: bytes, shelf: Shelf, entry: bytes, reply: Reply) -> None:
        if not isinstance(reply, bytes | memoryview):
            raise unexpected("bytes", reply)
        if not reply:  # it has left
            self._shelves.removed(owner, entry)
            return
        try:
            front = records.decode_front(reply, owner, entry, self._settings.dim)
            self._check_direction(front.embedding)
        except PageCorrupt:
            self._unreadable += 1
            shelf.drop(entry)
            return
        self._shelves.note(owner, entry)
        shelf.put(entry, front.embedding, front.created_ms)

    def _check_direction(self, embedding: Vector) -> None:
        """Raise PageCorrupt for zeros where scores are cosines: put by a cache of another metric."""
        if self._settings.metric == "cosine" and not embedding.any():
            raise PageCorrupt("an embedding without a direction")

    def _near(self, owner: bytes, vector: Vector, count: int, least: float | None) -> list[bytes]:
        found = self._shelves.open(owner).index.nearest(vector, count)
        return [entry for entry, score in found if least is None or score >= least]

    def _fetch(self, owner: bytes, entries: list[bytes], vector: Vector) -> Steps[list[Hit | None]]:
        """Return what entries are now, None for those that are no answer."""
        gets: list[list[Arg]] = [["KV.GET", self._names.key(owner, entry)] for entry in entries]
        replies = checked((yield Ask(gets, lets_others=True)))
        return [
            self._read(owner, entry, reply, vector)
            for entry, reply in zip(entries, replies, strict=True)
        ]

    def _read(self, owner: bytes, entry: bytes, reply: Reply, vector: Vector) -> Hit | None:
        """Return what an entry is now. None: it is gone, or was replaced by one of another place."""
        shelf = self._shelves.open(owner)
        if reply is None:
            self._gone += entry in shelf.entries
            shelf.stale.add(entry)  # others may have put it again meanwhile
            return None
        try:
            record = records.decode(reply, owner, entry, self._settings.dim)
            self._check_direction(record.embedding)
        except PageCorrupt:
            self._unreadable += 1
            shelf.drop(entry)
            return None
        if not shelf.is_current(entry, record.embedding):  # another entry may be nearer now
            shelf.stale.add(entry)
            return None
        metric = self._settings.metric
        # As the index has it, so that both come to the same, to the last bit.
        row, query = scaled(record.embedding, metric), scaled(vector, metric)
        score = float(scores(row[None], query, metric)[0])
        return Hit(record.payload, score, record.key, record.metadata)

    def _make_room(self, owner: bytes, keep: bytes) -> Steps[None]:
        """Delete what a tenant has too many of. Reads embeddings only if it may have."""
        most = self._settings.max_entries
        if len(self._shelves.keys.get(owner, ())) > most:
            yield from self._read_stale(owner)
            surplus = self._shelves.open(owner).surplus(most, keep)
            self._evicted += yield from self._delete(owner, surplus)
        elif len(self._shelves.open(owner).stale) >= STALE_MAX:
            yield from self._read_stale(owner)

    def _delete(self, owner: bytes, entries: list[bytes]) -> Steps[int]:
        count = 0
        for start in range(0, len(entries), BATCH):
            batch = entries[start : start + BATCH]
            args: list[Arg] = ["DEL", *(self._names.key(owner, entry) for entry in batch)]
            (deleted,) = checked((yield Ask([args])))
            count += deleted if isinstance(deleted, int) else 0
            for entry in batch:
                self._shelves.removed(owner, entry)
        return count


def checked(replies: Iterable[Reply]) -> list[Reply]:
    """Return replies. Raises the first error among them."""
    found = list_of(list(replies))
    for reply in found:
        if isinstance(reply, ServerError):
            raise reply
    return found
