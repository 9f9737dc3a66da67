"""Replay a trace against a server: ``respkv trace replay``.

Each request does what a worker does: KV.MATCH of its blocks, KV.MGET of what matched, KV.PUT of the
rest, each page behind the one in front of it. A page's bytes follow from its id, so what comes back is
compared with what was put; a page that matched and is not there when it is fetched is counted, because
the answer to a match is a promise.

Requests start in the order of the trace. With a speed they start at their times; a worker that is not
free then is late, and the next ones with it. With speed 0 each starts when a worker is free.
"""

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream

from respkv.client import AsyncClient
from respkv.client.replies import Reply
from respkv.errors import ConfigError, ServerError
from respkv.trace.flops import DEFAULT_MODEL, Model
from respkv.trace.format import Request, Trace
from respkv.trace.groups import answers_alone

PUT_BATCH = 64  # pages that one pipeline puts
DELETE_BATCH = 1000
REFUSALS = ("OOM", "KVQUOTA")  # answers of a server that is full, not of one that is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to replay.

    speed:       times the pace of the trace; 0: as fast as the workers go.
    num_workers: requests under way at a time.
    page_bytes:  of each page. namespace: of their keys.
    settings:    set with CONFIG SET for the replay, and as they were afterwards.
    keeps:       leave the pages in the server.
    """

    url: str
    speed: float = 0.0
    num_workers: int = 1
    page_bytes: int = 4096
    namespace: str = field(default_factory=lambda: f"trace-{os.getpid()}")
    settings: Mapping[str, str] = field(default_factory=dict)
    keeps: bool = False
    model: Model = DEFAULT_MODEL

    def __post_init__(self) -> None:
        _check(self.speed >= 0, "speed", self.speed, "0 or more")
        _check(self.num_workers >= 1, "workers", self.num_workers, "at least 1")
        _check(self.page_bytes >= 1, "page-bytes", self.page_bytes, "at least 1")


@dataclass(slots=True)
class Report:
    """What came of a replay. Latencies are seconds, one for each call; late_s is the worst delay."""

    num_requests: int = 0
    num_tokens: int = 0
    hit_tokens: int = 0
    num_flops: float = 0.0
    hit_flops: float = 0.0
    num_put: int = 0
    num_refused: int = 0
    num_lost: int = 0
    num_wrong: int = 0
    late_s: float = 0.0
    seconds: float = 0.0
    tiers: Counter[str] = field(default_factory=Counter)
    latencies: "dict[str, array[float]]" = field(
        default_factory=lambda: {name: array("d") for name in ("match", "get", "put", "request")}
    )

    @property
    def hit_rate(self) -> float:
        """Tokens that were hit, as a share of all."""
        return self.hit_tokens / self.num_tokens if self.num_tokens else 0.0

    @property
    def flops_saved(self) -> float:
        """Operations that hits saved, as a share of all."""
        return self.hit_flops / self.num_flops if self.num_flops else 0.0

    def percentile_us(self, name: str, share: float) -> float:
        """Return the latency that ``share`` of the calls of a kind stayed below."""
        found = sorted(self.latencies[name])
        return found[min(int(share * len(found)), len(found) - 1)] * 1e6 if found else 0.0


def page_of(key: str, page_bytes: int) -> bytes:
    """Return the bytes of the page of that key, which no other page has."""
    return hashlib.shake_128(key.encode()).digest(page_bytes)


def run(trace: Trace, plan: Plan) -> Report:
    """Replay a trace in an event loop of its own."""
    return anyio.run(replay, trace, plan, backend_options={"use_uvloop": True})


async def replay(trace: Trace, plan: Plan) -> Report:
    """Replay a trace; the server has its settings back afterwards, also after an error.

    Raises what the client raises. Cancelled: the pages may stay, the settings do not.
    """
    with answers_alone():
        return await _replay(trace, plan)


async def _replay(trace: Trace, plan: Plan) -> Report:
    report = Report()
    stored: set[str] = set()
    async with AsyncClient(plan.url, pool_max=plan.num_workers + 1) as client:
        async with _settings(client, plan.settings):
            start = perf_counter()
            async with anyio.create_task_group() as group:
                send, receive = anyio.create_memory_object_stream[Request](0)
                player = _Player(client, plan, trace, report, stored, start)
                for _ in range(plan.num_workers):
                    group.start_soon(_work, receive.clone(), player)
                receive.close()
                with suppress(anyio.BrokenResourceError):  # all workers failed; the group says why
                    async with send:
                        for request in trace.requests:
                            await send.send(request)
            report.seconds = perf_counter() - start
        if not plan.keeps:
            await _delete(client, sorted(stored))
    return report


class _Player:
    """What all workers of a replay share."""

    def __init__(
        self,
        client: AsyncClient,
        plan: Plan,
        trace: Trace,
        report: Report,
        stored: set[str],
        start: float,
    ) -> None:
        self._client = client
        self._plan = plan
        self._block_tokens = trace.block_tokens
        self._first_s = trace.requests[0].at_s if trace.requests else 0.0
        self._report = report
        self._stored = stored
        self._start = start

    async def serve(self, request: Request) -> None:
        """Match, get and put the pages of one request."""
        await self._until_due(request)
        report, plan = self._report, self._plan
        keys = [f"{plan.namespace}:{block:064x}" for block in request.blocks]
        began = perf_counter()
        matched = await self._client.match(keys) if keys else None
        num_pages = 0 if matched is None else matched.pages
        self._took("match", began)
        if matched is not None:
            report.tiers.update(matched.tiers)
        tokens = min(num_pages * self._block_tokens, request.num_tokens)
        report.num_requests += 1
        report.num_tokens += request.num_tokens
        report.hit_tokens += tokens
        report.num_flops += plan.model.flops(0, request.num_tokens)
        report.hit_flops += plan.model.flops(0, tokens)
        if num_pages:
            await self._get(keys[:num_pages])
        keys += [f"{plan.namespace}:{block:064x}" for block in request.answer]
        await self._put(keys, num_pages, request)
        self._took("request", began)

    async def _until_due(self, request: Request) -> None:
        if self._plan.speed:
            due = self._start + (request.at_s - self._first_s) / self._plan.speed
            late = perf_counter() - due
            self._report.late_s = max(self._report.late_s, late)
            if late < 0:
                await anyio.sleep(-late)

    async def _get(self, keys: Sequence[str]) -> None:
        began = perf_counter()
        pages = await self._client.mget(keys)
        self._took("get", began)
        for key, page in zip(keys, pages, strict=True):
            if page is None:
                self._report.num_lost += 1
            elif page != page_of(key, self._plan.page_bytes):
                self._report.num_wrong += 1

    async def _put(self, keys: Sequence[str], first: int, request: Request) -> None:
        last = len(request.blocks) - 1
        for start in range(first, len(keys), PUT_BATCH):
            pipeline = self._client.pipeline()
            batch = range(start, min(start + PUT_BATCH, len(keys)))
            for place in batch:
                tokens = self._block_tokens
                if place == last:
                    tokens = request.num_tokens - place * self._block_tokens
                parent = ("PARENT", keys[place - 1]) if place else ()
                payload = page_of(keys[place], self._plan.page_bytes)
                pipeline.command("KV.PUT", keys[place], payload, *parent, "TOKENS", str(tokens))
            self._stored.update(keys[place] for place in batch)
            began = perf_counter()
            replies = await pipeline.execute(raise_on_error=False)
            self._took("put", began)
            if self._count(replies):
                break  # what stands behind a page that is not there is found by nobody

    def _count(self, replies: Sequence[Reply]) -> int:
        refused = 0
        for answer in replies:
            if isinstance(answer, ServerError):
                if answer.word not in REFUSALS:
                    raise answer
                refused += 1
        self._report.num_refused += refused
        self._report.num_put += len(replies) - refused
        return refused

    def _took(self, name: str, began: float) -> None:
        self._report.latencies[name].append(perf_counter() - began)


async def _work(requests: MemoryObjectReceiveStream[Request], player: _Player) -> None:
    async with requests:
        async for request in requests:
            await player.serve(request)


@asynccontextmanager
async def _settings(client: AsyncClient, settings: Mapping[str, str]) -> AsyncGenerator[None]:
    """Hold a server's settings at other values."""
    if not settings:
        yield
        return
    before: list[Any] = []
    for name in settings:
        found = _pairs(await client.command("CONFIG", "GET", name))
        if name not in found:
            raise ConfigError(f"the server has no setting {name!r}")
        before += (name, found[name])
    await client.command("CONFIG", "SET", *(word for pair in settings.items() for word in pair))
    try:
        yield
    finally:
        # Shielded, unlike other cleanup: a server must not keep what a cancelled replay set.
        with anyio.CancelScope(shield=True):
            await client.command("CONFIG", "SET", *before)


def _pairs(reply: Reply) -> dict[str, str]:
    if isinstance(reply, list):
        reply = dict(zip(map(_text, reply[::2]), reply[1::2], strict=True))
    assert isinstance(reply, dict)
    return {_text(name): _text(value) for name, value in reply.items()}


def _text(reply: object) -> str:
    return bytes(reply).decode() if isinstance(reply, bytes | memoryview) else str(reply)


async def _delete(client: AsyncClient, keys: Sequence[str]) -> None:
    for start in range(0, len(keys), DELETE_BATCH):
        await client.delete(*keys[start : start + DELETE_BATCH])


def _check(good: bool, name: str, value: object, accepted: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {value!r}; it must be {accepted}")
