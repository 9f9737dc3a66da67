"""Row 10: GET of pages that are in files alone, through the socket and back."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from bench.files import MIB, file_server, tier_counts, tier_folder
from bench.fio import Fio, Job, engine, filled_file
from bench.load import Load, Transfer, Values, WrongReplyError, command
from bench.result import Line, Result, size, throughput
from bench.rows import Bench
from bench.servers import Server, redis_server

MEMORY_BYTES = 512 * MIB


class Window:
    """GETs of a set of values over one connection, ``depth`` of them on the way at any time."""

    def __init__(self, load: Load, values: Values, depth: int, *, get: str) -> None:
        self._load = load
        self._values = values
        self._depth = depth
        # Not in the order in which they were written, or the device would read ahead.
        self._order = list(range(len(values.keys)))
        random.Random(depth).shuffle(self._order)
        self._requests = [command(get, values.keys[index]) for index in self._order]
        self._page = bytearray(values.nbytes)

    def measure(self) -> float:
        """Get every value once; return the seconds from one to the next."""
        load, requests = self._load, self._requests
        first = b"".join(requests[: self._depth])
        start = perf_counter()
        load.send([first], len(first))
        for index in range(len(requests)):
            if not load.receive_page(self._page):
                raise WrongReplyError(f"value {self._order[index]} is not there")
            if index + self._depth < len(requests):
                request = requests[index + self._depth]
                load.send([request], len(request))
        took = perf_counter() - start
        if self._page != self._values.payloads[self._order[-1]]:
            raise WrongReplyError(f"value {self._order[-1]} came back different")
        return took / len(requests)


def cold_gets(bench: Bench) -> Iterator[Result]:
    """Get pages of each size, none of which is in memory, at every depth."""
    scale = bench.scale.files
    for page_bytes in scale.cold_page_bytes:
        values = Values(page_bytes, max(1, scale.cold_set_bytes // page_bytes))
        bench.progress(f"row 10: pages of {size(page_bytes)}")
        with (
            _cold_server(bench, values) as server,
            redis_server() as redis,
            Load(server.unix) as load,
            Load(redis.unix) as peer,
        ):
            ours = {each: Window(load, values, each, get="KV.GET") for each in scale.depths}
            yield from _against_fio(bench, values, ours)
            deepest = max(scale.depths)
            Transfer(peer, values).put_all()
            yield bench.compare(
                _line(
                    values,
                    deepest,
                    "redis-server with it in memory",
                    Window(peer, values, deepest, get="GET").measure,
                    ours[deepest].measure,
                )
            )
            _check_cold(server, values)


@contextmanager
def _cold_server(bench: Bench, values: Values) -> Iterator[Server]:
    """Run a server that was started on a directory with all values, and keeps none in memory."""
    file_bytes = 2 * len(values.keys) * values.nbytes + MEMORY_BYTES
    with tier_folder(bench.folder) as path:
        for is_second in (False, True):
            server = file_server(MEMORY_BYTES, path, file_bytes, promote="never")
            with server, Load(server.unix) as load:
                transfer = Transfer(load, values, put="KV.PUT", get="KV.GET")
                if is_second:
                    transfer.check_all()
                    yield server
                else:
                    transfer.put_all()


def _against_fio(bench: Bench, values: Values, ours: dict[int, Window]) -> Iterator[Result]:
    nbytes, count = values.nbytes, len(values.keys)
    with filled_file(bench.folder, nbytes * count) as file:
        for depth, window in ours.items():
            job = Job(file, nbytes * count, "read", nbytes, depth, max(count, 2 * depth))
            yield bench.compare(
                _line(values, depth, f"fio by {engine()}", Fio(job).measure, window.measure)
            )


def _line(
    values: Values,
    depth: int,
    against: str,
    peer: Callable[[], float],
    ours: Callable[[], float],
) -> Line:
    work = f"cold GET {size(values.nbytes)}, {depth} deep, Unix socket, against {against}"
    return Line(10, work, None, throughput(values.nbytes), peer, ours)


def _check_cold(server: Server, values: Values) -> None:
    # Each was got at least once before, and none may have stayed.
    if tier_counts(server)["kv_nvme_hits"] < 2 * len(values.keys):
        raise WrongReplyError("the pages came out of memory: these are not cold GETs")
