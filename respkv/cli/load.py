"""The load that ``respkv bench`` makes: clients that put and get pages as fast as they can.

Each client is a thread with a connection of its own. While a page is on its way the thread is inside
a system call and the others run, so threads load a server well with pages; with values of a few KiB
they measure Python. What a page holds is checked on every get, outside the measured time.
"""

import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from respkv.client import Client
from respkv.errors import ConnectionLost, PageCorrupt, TimedOut

STAMP_BYTES = 16
TICK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do.

    how:       ``kv`` is KV.PUT and KV.GET, ``plain`` SET and GET, ``shm`` reserve and lease.
    num_pages: of each client, used round and round.
    phase_s:   of all the putting, and of all the getting after it.
    """

    url: str
    how: str
    page_bytes: int
    num_clients: int
    num_pages: int
    phase_s: float


@dataclass(slots=True)
class Tally:
    """What one client did in one phase; the latencies are seconds, one for each page."""

    latencies: "array[float]" = field(default_factory=lambda: array("d"))
    num_misses: int = 0


@dataclass(frozen=True, slots=True)
class Phase:
    """What all clients did together. seconds: from the first start to the last end."""

    name: str
    seconds: float
    latencies: Sequence[float]
    num_misses: int


class Caller:
    """One client: its connection, its keys and its memory."""

    def __init__(self, client: Client, plan: Plan, prefix: str) -> None:
        self.keys = [f"{prefix}{index:064x}" for index in range(plan.num_pages)]
        self._client = client
        self._payload = bytearray(os.urandom(plan.page_bytes))
        self._into = bytearray(plan.page_bytes)
        kinds: dict[str, tuple[Callable[[str], Any], Callable[[str], bytes | None]]] = {
            "kv": (self._put_page, self._get_page),
            "plain": (self._set, self._get),
            "shm": (self._commit, self._lease),
        }
        self._put_one, self._get_one = kinds[plan.how]

    def put(self, index: int) -> tuple[float, bool]:
        """Store a page; return the seconds it took, and True.

        The first of a round deletes what the last round left: a server that has a page need not
        store it again, and that is not what is to be measured.
        """
        if index == 0:
            self.delete()
        self._payload[:STAMP_BYTES] = self._payload[-STAMP_BYTES:] = _stamp(index)
        start = time.perf_counter()
        self._put_one(self.keys[index])
        return time.perf_counter() - start, True

    def get(self, index: int) -> tuple[float, bool]:
        """Fetch a page; return the seconds it took and whether it was there.

        Raises PageCorrupt when it is not what was put under its key.
        """
        start = time.perf_counter()
        ends = self._get_one(self.keys[index])
        took = time.perf_counter() - start
        if ends is not None and ends != _stamp(index) * 2:
            raise PageCorrupt(f"{self.keys[index]} holds other bytes than were put")
        return took, ends is not None

    def delete(self) -> None:
        """Delete what was put."""
        self._client.delete(*self.keys)

    def _put_page(self, key: str) -> None:
        self._client.put(key, self._payload)

    def _get_page(self, key: str) -> bytes | None:
        return _ends(self._client.get(key, into=self._into), len(self._into))

    def _set(self, key: str) -> None:
        self._client.set(key, self._payload)

    def _get(self, key: str) -> bytes | None:
        reply = self._client.command("GET", key, into=self._into)
        return None if reply is None else _ends(memoryview(self._into), len(self._into))

    def _commit(self, key: str) -> None:
        with self._client.reserve(key, len(self._payload)) as slot:
            slot.view[:] = self._payload
            slot.commit()

    def _lease(self, key: str) -> bytes | None:
        with self._client.lease([key]) as lease:
            return _ends(lease.pages[0], len(self._payload))


def run(plan: Plan, progress: Callable[[str, float], None]) -> list[Phase]:
    """Put, then get, then delete everything again.

    progress: told a phase's name and the seconds spent since the last time, every TICK_S.
    Raises what the clients raise.
    """
    with ExitStack() as stack:
        callers = []
        for number in range(plan.num_clients):
            client = stack.enter_context(Client(plan.url, name="respkv-bench", pool_max=1))
            client.ping()
            callers.append(Caller(client, plan, f"bench-{os.getpid()}-{number}:"))
        try:
            return [
                _phase("put", [caller.put for caller in callers], plan, progress),
                _phase("get", [caller.get for caller in callers], plan, progress),
            ]
        finally:
            with suppress(ConnectionLost, TimedOut):  # then its own error is on its way
                for caller in callers:
                    caller.delete()


def _phase(
    name: str,
    calls: list[Callable[[int], tuple[float, bool]]],
    plan: Plan,
    progress: Callable[[str, float], None],
) -> Phase:
    stop, abandon = threading.Event(), threading.Event()
    start = time.perf_counter()
    with ThreadPoolExecutor(len(calls)) as threads:
        try:
            running = [
                threads.submit(_repeat, call, plan.num_pages, stop, abandon) for call in calls
            ]
            while (spent := time.perf_counter() - start) < plan.phase_s:
                wait(running, min(TICK_S, plan.phase_s - spent), FIRST_EXCEPTION)
                if any(future.done() for future in running):  # only a failure ends one by itself
                    abandon.set()
                    break
                progress(name, time.perf_counter() - start - spent)
        except BaseException:
            abandon.set()
            raise
        finally:
            stop.set()
    tallies = [future.result() for future in running]
    seconds = time.perf_counter() - start
    latencies = array("d")
    for tally in tallies:
        latencies.extend(tally.latencies)
    return Phase(name, seconds, latencies, sum(tally.num_misses for tally in tallies))


def _repeat(
    call: Callable[[int], tuple[float, bool]],
    num_pages: int,
    stop: threading.Event,
    abandon: threading.Event,
) -> Tally:
    tally = Tally()
    done = 0
    # Whole rounds, so that a get finds what was put.
    while not abandon.is_set() and (done == 0 or done % num_pages or not stop.is_set()):
        took, found = call(done % num_pages)
        if found:
            tally.latencies.append(took)
        else:
            tally.num_misses += 1
        done += 1
    return tally


def _stamp(index: int) -> bytes:
    return index.to_bytes(STAMP_BYTES, "little")


def _ends(page: memoryview | None, nbytes: int) -> bytes | None:
    if page is None:
        return None
    return b"" if len(page) != nbytes else bytes(page[:STAMP_BYTES]) + bytes(page[-STAMP_BYTES:])
