"""Leases of pages on the server's GPU. They belong to a connection, as those in the arena do."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from respkv.client.commands import Key
from respkv.client.connection import Connection
from respkv.client.core import Core
from respkv.client.effects import Operation, Sleep
from respkv.client.gpu import GpuPage
from respkv.client.lease import LeaseHold, array_of, ask, undone_on_error
from respkv.client.replies import Reply
from respkv.client.requests import Arg
from respkv.errors import ProtocolError, TimedOut

if TYPE_CHECKING:
    import torch

PAUSE_S = 0.0005


class GpuLeaseHold(LeaseHold):
    """A lease of pages on the device from begin to end.

    gpu_pages: for each key its page, None where it has none there.
    """

    def __init__(self, core: Core[Any], keys: Iterable[Key], ms: int | None) -> None:
        super().__init__(core, keys, ms)
        self.gpu_pages: list[GpuPage | None] = []
        self._memory: torch.Tensor | None = None

    def begin(self) -> Operation[None]:
        """Take the lease. Raises and Cancelled: as for one in the arena."""
        assert self._conn is None, "a lease begins once"
        args: list[Arg] = ["KV.LEASE", len(self._keys), *self._keys, "TIER", "gpu"]
        if self._ms is not None:
            args += ("MS", self._ms)

        def talk(conn: Connection, deadline: float) -> Operation[None]:
            reply = yield from ask(conn, args, deadline)
            with undone_on_error(conn):
                self._id, places, device, handle = array_of(reply, 4)
                if not isinstance(device, bytes) or not isinstance(handle, bytes):
                    raise ProtocolError(f"{device!r} and {handle!r} name no device memory")
                found = array_of(places, len(self._keys))
                self._memory = memory = self._core.gpus.find(device.decode(), handle)
                self.gpu_pages = [_page(memory, place) for place in found]

        self._conn, _ = yield from self._core.converse(talk, repeatable=True)

    def end(self, *, failed: bool) -> Operation[None]:
        """Give the lease back once the caller's stream has done what it was given so far.

        failed, Raises, Cancelled: as for a lease in the arena.
        """
        self.gpu_pages = []
        try:
            yield from self._wait_for_stream()
        except BaseException:
            conn, self._conn = self._conn, None
            if conn is not None:
                conn.close()
                self._core.pool.give_back(conn)
            raise
        yield from super().end(failed=failed)

    def _wait_for_stream(self) -> Operation[None]:
        memory, self._memory = self._memory, None
        if memory is None or not memory.is_cuda:
            return
        import torch

        done = torch.cuda.current_stream(memory.device).record_event()
        deadline = time.monotonic() + self._core.settings.timeout_s
        while not done.query():
            if time.monotonic() >= deadline:
                raise TimedOut("the work that reads leased pages has not ended")
            yield Sleep(PAUSE_S, deadline)


def _page(memory: torch.Tensor, place: Reply) -> GpuPage | None:
    if place is None:
        return None
    match place:
        case [int(offset), int(nbytes), bytes(form)]:
            pass
        case _:
            raise ProtocolError(f"{place!r} is not a place on a device")
    if offset < 0 or nbytes < 1 or offset + nbytes > memory.nbytes:
        raise ProtocolError(f"{nbytes} bytes at {offset} are not within the server's memory")
    return GpuPage(memory[offset : offset + nbytes], form.decode())
