"""A Device around another one, on which things go wrong as a script or a seed says.

    faulty = FaultyDevice(MemoryDevice(), random.Random(seed).randrange)
    faulty.add("error", "write", code=errno.EIO, name="segment-", skip=2, times=1)
    faulty.add("dropped", "write", one_in=20)
    ...
    faulty.heal()

Kinds, and the calls that they can befall:

- error: any. It raises OSError with ``code`` and did nothing.
- short: read, write. It does a part, then raises.
- torn, dropped, misdirected: read, write. Success is reported, but only the first part was moved,
  or nothing, or all to or from another place, maybe of another file. A dropped sync synced nothing.
- flip: read, write. One bit is wrong.
- slow: any. It takes ``delay_s`` longer. hang: any. It does not go on before ``release`` or ``heal``.

What is moved in part or elsewhere keeps to the alignment of the device inside.
"""

import errno
import mmap
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import anyio
from anyio.lowlevel import checkpoint

from respkv.tiers.device import CLOSE_S, Device, Write

Call = Literal[
    "names", "create", "open", "read", "write", "sync", "remove", "load", "replace", "close"
]
Kind = Literal["error", "short", "torn", "dropped", "misdirected", "flip", "slow", "hang"]
Choose = Callable[[int], int]

SECTOR_BYTES = 512
_TIMES = ("slow", "hang")
_MOVES: tuple[Call, ...] = ("read", "write")


@dataclass(eq=False)
class Fault:
    """What befalls calls on files whose names start with ``name``.

    skip:   so many matching calls pass first.
    one_in: of those after it, one in so many is hit, by chance.
    times:  so many are hit in all; None: no end.
    hits:   so many were.
    """

    kind: Kind
    calls: tuple[Call, ...]
    code: int = errno.EIO
    name: str = ""
    skip: int = 0
    one_in: int = 1
    times: int | None = None
    delay_s: float = 0.0
    hits: int = 0

    def __post_init__(self) -> None:
        assert self.kind in ("error", *_TIMES) or set(self.calls) <= {*_MOVES, "sync"}
        assert "sync" not in self.calls or self.kind in ("error", "dropped", *_TIMES)

    def bites(self, call: Call, name: str, choose: Choose) -> bool:
        """Say whether this call is hit, and count it."""
        if call not in self.calls or not name.startswith(self.name):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.hits == self.times or choose(self.one_in):
            return False
        self.hits += 1
        return True


class FaultyDevice:
    """See the module.

    choose: a number below n, for all that is left to chance.
    faults: in force now. Of those that hit a call, all that take time do, and the first other one.
    """

    def __init__(self, inner: Device, choose: Choose | None = None) -> None:
        self.engine: Literal["io_uring", "threads", "aiofiles"] = inner.engine
        self.is_direct = inner.is_direct
        self.fallback_reason = inner.fallback_reason
        self.alignment = inner.alignment
        self.inner = inner
        self.faults: list[Fault] = []
        self._choose = choose or random.Random(0).randrange
        self._released = anyio.Event()
        self._num_hanging = 0
        self._is_closed = False  # while something hung: that fails then, and what comes
        self._sizes: dict[str, int] = {}  # of open files
        self._is_gone = False
        self._visible: set[str] | None = None  # None: all files

    def add(
        self,
        kind: Kind,
        *calls: Call,
        code: int = errno.EIO,
        name: str = "",
        skip: int = 0,
        one_in: int = 1,
        times: int | None = None,
        delay_s: float = 0.0,
    ) -> Fault:
        """Put a fault in force."""
        fault = Fault(kind, calls, code, name, skip, one_in, times, delay_s)
        self.faults.append(fault)
        return fault

    def heal(self, fault: Fault | None = None) -> None:
        """End one fault, or all of them; what hangs goes on. A directory stays gone."""
        self.faults = [each for each in self.faults if fault not in (None, each)]
        self.release()

    def release(self) -> None:
        """Let everything that hangs now go on."""
        self._released.set()
        self._released = anyio.Event()

    def make_read_only(self) -> list[Fault]:
        """Do as a file system that was remounted read-only: what would change something is EROFS."""
        calls: tuple[Call, ...] = ("create", "write", "remove", "replace")
        return [self.add("error", *calls, code=errno.EROFS)]

    def vanish(self) -> None:
        """Take the directory away with all in it. Files that are open still work."""
        self._is_gone = True
        self._visible = set()

    def come_back(self, *, is_empty: bool = True) -> None:
        """Bring the directory back, as it was (mounted again) or empty (made again).

        Files that were open when it vanished still work, though nobody finds an empty one's.
        """
        self._is_gone = False
        if not is_empty:
            self._visible = None

    # The protocol

    def register(self, memory: memoryview) -> None:
        self.inner.register(memory)

    async def names(self) -> list[str]:
        await self._suffer("names")
        self._find_directory("")
        return [name for name in await self.inner.names() if self._is_visible(name)]

    async def create(self, name: str, nbytes: int) -> None:
        try:
            await self._suffer("create", name)
            self._find_directory(name)
            await self._bury_ghost(name)
            await self.inner.create(name, nbytes)
        except OSError:
            self._sizes.pop(name, None)
            if not self._is_closed:
                with anyio.CancelScope(shield=True):
                    await self.inner.remove(name)
            raise
        self._sizes[name] = nbytes
        self._show(name)

    async def open(self, name: str) -> int:
        await self._suffer("open", name)
        self._find(name)
        self._sizes[name] = await self.inner.open(name)
        return self._sizes[name]

    async def read(self, name: str, offset: int, into: memoryview) -> None:
        fault = await self._suffer("read", name)
        match fault and fault.kind:
            case "dropped":
                await checkpoint()
            case "short" | "torn":
                part = self._cut(into.nbytes)
                if part:
                    await self.inner.read(name, offset, into.cast("B")[:part])
            case "misdirected":
                await self.inner.read(*self._elsewhere(name, offset, into.nbytes), into)
            case "flip":
                await self.inner.read(name, offset, into)
                self._flip(into)
            case _:
                await self.inner.read(name, offset, into)
        if fault and fault.kind == "short":
            raise _error(fault.code, name)

    async def write(self, name: str, pieces: Sequence[Write]) -> None:
        fault = await self._suffer("write", name)
        if fault is None:
            await self.inner.write(name, pieces)
            return
        match fault.kind:
            case "short" | "torn":
                pieces = self._first_part(pieces)
            case "dropped":
                pieces = []
            case "misdirected":
                pieces = list(pieces)
                wrong = pieces.pop(self._choose(len(pieces)))
                place, offset = self._elsewhere(name, wrong.offset, wrong.data.nbytes)
                await self.inner.write(place, [Write(offset, wrong.data)])
            case _:
                pieces = [Write(piece.offset, _aligned_copy(piece.data)) for piece in pieces]
                self._flip(pieces[self._choose(len(pieces))].data)
        if pieces:
            await self.inner.write(name, pieces)
        else:
            await checkpoint()
        if fault.kind == "short":
            raise _error(fault.code, name)

    async def sync(self, name: str) -> None:
        if await self._suffer("sync", name) is None:
            await self.inner.sync(name)

    async def remove(self, name: str) -> None:
        await self._suffer("remove", name)
        self._sizes.pop(name, None)
        await self.inner.remove(name)

    async def load(self, name: str) -> bytes | None:
        await self._suffer("load", name)
        return await self.inner.load(name) if self._is_visible(name) else None

    async def replace(self, name: str, data: bytes) -> None:
        await self._suffer("replace", name)
        self._find_directory(name)
        await self._bury_ghost(name)
        await self.inner.replace(name, data)
        self._show(name)

    async def close(self, seconds: float = CLOSE_S) -> None:
        if self._is_closed:
            return
        await self._suffer("close")
        self._sizes.clear()
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(seconds):
                while self._num_hanging:  # noqa: ASYNC110
                    await anyio.sleep(0.005)
            self._is_closed = self._num_hanging > 0
            self.release()
            while self._num_hanging:
                await checkpoint()
            await self.inner.close(seconds)

    # What goes wrong

    async def _suffer(self, call: Call, name: str = "") -> Fault | None:
        """Take the time and raise the error of the faults that hit a call, or return the one left."""
        if self._is_closed:
            raise _error(errno.EBADF, name)
        hits = [fault for fault in self.faults if fault.bites(call, name, self._choose)]
        # Shielded, as device.py asks: what was started runs to its end.
        with anyio.CancelScope(shield=True):
            for fault in hits:
                if fault.kind == "slow":
                    await anyio.sleep(fault.delay_s)
                elif fault.kind == "hang" and fault in self.faults:  # not healed while it was slow
                    await self._hang(name)
        others = [fault for fault in hits if fault.kind not in _TIMES]
        if others and others[0].kind == "error":
            await checkpoint()
            raise _error(others[0].code, name)
        return others[0] if others else None

    async def _hang(self, name: str) -> None:
        self._num_hanging += 1
        await self._released.wait()
        self._num_hanging -= 1
        if self._is_closed:
            raise _error(errno.ETIMEDOUT, name)

    def _cut(self, nbytes: int) -> int:
        """Choose a part of so many bytes, less than all of them."""
        unit = max(self.alignment, SECTOR_BYTES)
        return self._choose(-(-nbytes // unit)) * unit

    def _first_part(self, pieces: Sequence[Write]) -> list[Write]:
        left = self._cut(sum(piece.data.nbytes for piece in pieces))
        part: list[Write] = []
        for piece in pieces:
            if left > 0:
                part.append(Write(piece.offset, piece.data.cast("B")[:left]))
            left -= piece.data.nbytes
        return part

    def _elsewhere(self, name: str, offset: int, nbytes: int) -> tuple[str, int]:
        """Choose another place for so many bytes, in any open file; the place itself if none."""
        files = [(each, size) for each, size in sorted(self._sizes.items()) if size >= nbytes]
        for _ in range(8):
            if not files:
                break
            other, size = files[self._choose(len(files))]
            place = self._choose((size - nbytes) // self.alignment + 1) * self.alignment
            if (other, place) != (name, offset):
                return other, place
        return name, offset

    def _flip(self, data: memoryview) -> None:
        bit = self._choose(8 * data.nbytes)
        data.cast("B")[bit // 8] ^= 1 << bit % 8

    # A directory that went away

    def _find_directory(self, name: str) -> None:
        if self._is_gone:
            raise _error(errno.ENOENT, name)

    def _find(self, name: str) -> None:
        if not self._is_visible(name):
            raise _error(errno.ENOENT, name)

    def _is_visible(self, name: str) -> bool:
        return self._visible is None or name in self._visible

    def _show(self, name: str) -> None:
        if self._visible is not None:
            self._visible.add(name)

    async def _bury_ghost(self, name: str) -> None:
        """Remove for good a file that vanished, since another one takes its name."""
        if not self._is_visible(name):
            await self.inner.remove(name)


def _aligned_copy(data: memoryview) -> memoryview:
    memory = memoryview(mmap.mmap(-1, data.nbytes))
    memory[:] = data.cast("B")
    return memory


def _error(code: int, name: str) -> OSError:
    return OSError(code, os.strerror(code), name)
