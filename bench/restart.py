"""Row 9: from the start of a process to its first hit, with very many pages in files."""

import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

from bench.files import MIB, file_server, tier_folder
from bench.load import Load, Transfer, Values, WrongReplyError, command
from bench.result import Result, duration, size
from bench.rows import Bench
from bench.servers import Server

TARGET_S = 2.0
MEMORY_BYTES = 256 * MIB
# The files hold all pages, and as much again as a log needs to stay loose.
ROOM = 1.25


class Restarts:
    """A directory with pages, and servers that are started on it one after the other."""

    def __init__(self, bench: Bench, path: Path) -> None:
        scale = bench.scale.files
        self._path = path
        self._page_bytes = scale.restart_page_bytes
        self._values = Values(self._page_bytes, scale.restart_pages)
        total = scale.restart_pages * self._page_bytes
        self._file_bytes = int(ROOM * total) + MEMORY_BYTES
        self._random = random.Random(9)
        self._num_new = scale.restart_new_pages
        self._turn = 0

    def fill(self) -> None:
        """Store every page and stop the server in order."""
        with self._server() as server, Load(server.unix) as load:
            Transfer(load, self._values, put="KV.PUT", get="KV.GET").put_all()
            if (held := load.ask("DBSIZE")) != b":%d" % len(self._values.keys):
                raise WrongReplyError(f"of {len(self._values.keys)} pages, DBSIZE is {held!r}")

    def first_hit(self) -> float:
        """Start a server, get one page, stop it in order; return the seconds to the hit."""
        start = perf_counter()
        with self._server() as server, Load(server.unix) as load:
            index = self._random.randrange(len(self._values.keys))
            page = bytearray(self._page_bytes)
            request = command("KV.GET", self._values.keys[index])
            load.send([request], len(request))
            is_hit = load.receive_page(page)
            took = perf_counter() - start
        if not is_hit or page != self._values.payloads[index]:
            raise WrongReplyError(f"page {index} is {'wrong' if is_hit else 'missing'}")
        return took

    def first_hit_after_kill(self) -> float:
        """Kill a server that has just stored some more pages, then as ``first_hit``."""
        self._turn += 1
        new = Values(self._page_bytes, self._num_new, prefix=f"new-{self._turn}:")
        with self._server() as server, Load(server.unix) as load:
            Transfer(load, new, put="KV.PUT", get="KV.GET").put_all()
            server.kill()
        return self.first_hit()

    def _server(self) -> Server:
        return file_server(MEMORY_BYTES, self._path, self._file_bytes)


def restarts(bench: Bench) -> Iterator[Result]:
    """Start servers on a directory of pages, left in order and left by a crash."""
    scale = bench.scale.files
    with tier_folder(bench.folder) as path:
        servers = Restarts(bench, path)
        pages = f"{scale.restart_pages:,} pages of {size(scale.restart_page_bytes)} in files"
        bench.progress(f"row 9: {pages}")
        servers.fill()
        work = f"start to first hit, {pages}, after SIGTERM"
        yield _seconds(work, [servers.first_hit() for _ in bench.count(9, work)])
        work = f"start to first hit, {pages}, after kill -9 and {scale.restart_new_pages:,} puts"
        yield _seconds(work, [servers.first_hit_after_kill() for _ in bench.count(9, work)])


def _seconds(work: str, samples: list[float]) -> Result:
    return Result(
        row=9,
        work=work,
        peer="",
        ours=duration(median(samples)),
        ratio=median(samples),
        ratios=samples,
        target=TARGET_S,
        at_least=False,
        unit="s",
        peer_samples=[],
        ours_samples=samples,
    )
