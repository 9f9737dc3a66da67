"""Rows 1 to 6 of DESIGN.md's table of targets: the same work by both servers.

Each row starts both servers afresh, so that a row by itself gives what it gives within the whole.
Values go round through a set that is larger than the processor's caches.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

from bench.files import FILES, FileScale
from bench.load import Load, Transfer, Values, WrongReplyError, command
from bench.result import MIB, Line, Result, compare, duration, rate, size, throughput
from bench.servers import Server, Transport, redis_server, respkv_server
from bench.small import SmallLoad, fill
from respkv.client import Client, as_torch

BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Scale:
    """How much work is done.

    turn_bytes: moved in one measurement of large values; set_bytes: in all values of a set.
    requests:   of small values in one measurement, ``deep_requests`` of pipelined ones.
    pages:      in the prefix; memory_bytes: of all pages whose resident memory is measured.
    """

    large_bytes: int = 32 * MIB
    medium_bytes: tuple[int, ...] = (MIB, 4 * MIB)
    set_bytes: int = 128 * MIB
    turn_bytes: int = 256 * MIB
    arena_bytes: int = 512 * MIB
    zero_copies: int = 300
    requests: int = 60_000
    deep_requests: int = 300_000
    clients: int = 50
    pages: int = 1000
    prefixes: int = 100
    memory_bytes: int = 512 * MIB
    memory_page_bytes: tuple[int, ...] = (MIB, 4 * MIB, 64 << 10)
    files: FileScale = FILES


@dataclass(frozen=True, slots=True)
class Bench:
    """How the rows are run.

    folder: where the rows of the file tiers have their files.
    """

    scale: Scale
    rounds: int
    progress: Callable[[str], None]
    folder: Path

    def compare(self, line: Line) -> Result:
        return compare(line, self.rounds, self.progress)

    def count(self, row: int, work: str) -> Iterator[int]:
        """Count the rounds of what has no peer."""
        for number in range(self.rounds):
            self.progress(f"row {row}: {work}, round {number + 1} of {self.rounds}")
            yield number

    @contextmanager
    def servers(self) -> Iterator[tuple[Server, Server]]:
        """Run redis-server and respkv."""
        with redis_server() as redis:
            with respkv_server(self.scale.arena_bytes, shm="rw") as ours:
                yield redis, ours


def large_values(bench: Bench) -> Iterator[Result]:
    """Row 1: SET and GET of large values."""
    targets: dict[Transport, float] = {"unix": 3.0, "tcp": 3.0}
    yield from _values(bench, 1, bench.scale.large_bytes, targets)


def medium_values(bench: Bench) -> Iterator[Result]:
    """Row 2: SET and GET of medium values."""
    targets: dict[Transport, float] = {"unix": 1.2, "tcp": 1.0}
    for nbytes in bench.scale.medium_bytes:
        yield from _values(bench, 2, nbytes, targets)


def _values(
    bench: Bench, row: int, nbytes: int, targets: dict[Transport, float]
) -> Iterator[Result]:
    values = Values(nbytes, max(1, bench.scale.set_bytes // nbytes))
    count = max(1, bench.scale.turn_bytes // nbytes)
    show = throughput(nbytes)
    with bench.servers() as servers:
        for transport, target in targets.items():
            with ExitStack() as stack:
                peer, ours = (
                    Transfer(stack.enter_context(Load(server.address(transport))), values)
                    for server in servers
                )
                for each in (peer, ours):
                    each.put_all()
                work = f"{size(nbytes)}, {_TRANSPORTS[transport]}"
                put = partial(peer.put, count), partial(ours.put, count)
                yield bench.compare(Line(row, f"SET {work}", target, show, *put))
                for each in (peer, ours):
                    each.check_all()
                get = partial(peer.get, count), partial(ours.get, count)
                yield bench.compare(Line(row, f"GET {work}", target, show, *get))


_TRANSPORTS: dict[Transport, str] = {"unix": "Unix socket", "tcp": "TCP"}


def leased_reads(bench: Bench) -> Iterator[Result]:
    """Row 3: a large page read in place against GET.

    What is timed is getting hold of the bytes. A reader has yet to read them, here as there.
    """
    values = Values(bench.scale.large_bytes, 4)
    count = max(1, bench.scale.turn_bytes // values.nbytes)
    with bench.servers() as (redis, ours), Load(redis.unix) as load, Client(ours.url) as client:
        peer = Transfer(load, values)
        peer.put_all()
        peer.check_all()
        for key, payload in zip(values.keys, values.payloads, strict=True):
            client.put(key, payload)
            with client.lease([key]) as lease:
                _check_same(lease.pages[0], payload)
        yield bench.compare(
            Line(
                3,
                f"{size(values.nbytes)}: lease, tensor, release, against GET, Unix socket",
                100.0,
                duration,
                partial(peer.get, count),
                partial(_lease, client, values, bench.scale.zero_copies),
            )
        )


def _lease(client: Client, values: Values, count: int) -> float:
    shape = [values.nbytes // BF16_BYTES]
    start = perf_counter()
    for index in range(count):
        with client.lease([values.keys[index % len(values.keys)]]) as lease:
            page = lease.pages[0]
            assert page is not None
            as_torch(page, "bfloat16", shape)
    return (perf_counter() - start) / count


def reserved_writes(bench: Bench) -> Iterator[Result]:
    """Row 4: a large page written in place against SET."""
    values = Values(bench.scale.large_bytes, 4)
    count = max(1, bench.scale.turn_bytes // values.nbytes)
    with bench.servers() as (redis, ours), Load(redis.unix) as load, Client(ours.url) as client:
        peer = Transfer(load, values)
        peer.put_all()
        _reserve(client, values, len(values.keys))
        yield bench.compare(
            Line(
                4,
                f"{size(values.nbytes)}: reserve, copy, commit, against SET, Unix socket",
                4.0,
                duration,
                partial(peer.put, count),
                partial(_reserve, client, values, count),
            )
        )
        peer.check_all()
        for key, payload in zip(values.keys, values.payloads, strict=True):
            _check_same(client.get(key), payload)


def _reserve(client: Client, values: Values, count: int) -> float:
    start = perf_counter()
    for index in range(count):
        turn = index % len(values.keys)
        with client.reserve(values.keys[turn], values.nbytes) as slot:
            slot.view[:] = values.payloads[turn]
            slot.commit()
    return (perf_counter() - start) / count


def small_values(bench: Bench) -> Iterator[Result]:
    """Row 5: SET and GET of 64 bytes by many connections."""
    scale = bench.scale
    with bench.servers() as servers:
        for server in servers:
            fill(server)
        for depth, count, target in ((1, scale.requests, 0.9), (16, scale.deep_requests, 0.6)):
            for word in ("set", "get"):
                loads = [SmallLoad(server, word, depth, count, scale.clients) for server in servers]
                how = f"{depth} deep" if depth > 1 else "unpipelined"
                work = f"{word.upper()} 64 B, {scale.clients} connections, {how}, TCP"
                peer, ours = (load.measure for load in loads)
                yield bench.compare(Line(5, work, target, rate, peer, ours))
                for load in loads:
                    load.check()


def prefix_match(bench: Bench) -> Iterator[Result]:
    """Row 6: the longest prefix, by one command against one for each page."""
    pages = bench.scale.pages
    values = Values(16 << 10, pages)
    with bench.servers() as (redis, ours), Load(redis.tcp) as peer, Load(ours.tcp) as load:
        Transfer(peer, values).put_all()
        Transfer(load, values, put="KV.PUT", get="KV.GET").put_all()
        match = partial(_match, load, values, bench.scale.prefixes)
        several = partial(_exists_together, peer, values, bench.scale.prefixes)
        single = partial(_exists_one_by_one, peer, values, max(1, bench.scale.prefixes // 20))
        work = f"{pages:,} pages: one KV.MATCH, against {pages:,} EXISTS"
        yield bench.compare(Line(6, f"{work} pipelined, TCP", 1.5, duration, several, match))
        yield bench.compare(Line(6, f"{work} one by one, TCP", 100.0, duration, single, match))


def _match(load: Load, values: Values, count: int) -> float:
    pages = len(values.keys)
    request = command("KV.MATCH", str(pages), *values.keys)
    expected = b"*3\r\n:%d\r\n$%d\r\n%b\r\n:" % (pages, pages, b"c" * pages)
    reply = bytearray(len(expected) + 64)
    start = perf_counter()
    for _ in range(count):
        load.send([request], len(request))
        load.receive_past(reply, len(expected))
    took = perf_counter() - start
    if not reply.startswith(expected):
        raise WrongReplyError(f"not the whole prefix: {bytes(reply[:64])!r}")
    return took / count


def _exists_together(load: Load, values: Values, count: int) -> float:
    request = b"".join(command("EXISTS", key) for key in values.keys)
    reply = bytearray(4 * len(values.keys))
    start = perf_counter()
    for _ in range(count):
        load.send([request], len(request))
        load.receive([reply], len(reply))
    took = perf_counter() - start
    _check_found(reply, len(values.keys))
    return took / count


def _exists_one_by_one(load: Load, values: Values, count: int) -> float:
    requests = [command("EXISTS", key) for key in values.keys]
    reply = bytearray(4)
    start = perf_counter()
    for _ in range(count):
        for request in requests:
            load.send([request], len(request))
            load.receive([reply], 4)
    took = perf_counter() - start
    _check_found(reply, 1)
    return took / count


def _check_found(reply: bytearray, count: int) -> None:
    if reply != b":1\r\n" * count:
        raise WrongReplyError(f"not every page is there: {bytes(reply[:64])!r}")


def _check_same(page: memoryview | None, payload: memoryview) -> None:
    if page is None or bytes(page) != bytes(payload):
        raise WrongReplyError("a page is not what was written")
