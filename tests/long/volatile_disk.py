"""A disk with a cache that a power cut empties: python -m tests.long.volatile_disk SOURCE MOUNT POWER.

A FUSE file system that holds in memory what was written to its files until they are synced. SIGUSR1
is the power cut: of what was not synced some blocks are kept, others are not, in no order, and from
then on every write fails. SIGUSR2 switches the power on again. The file POWER says what it is. A loop
device over a file of it is a disk that loses unflushed writes out of order, direct I/O among them;
an ext4 that is shut down loses what has no journal entry, but what was written in place stays.
"""

import errno
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from tests.faults import fuse
from tests.faults.table import TABLE_BYTES, Table

BLOCK_BYTES = 4096
KEPT = (0.0, 0.5, 0.95)  # chances of a block that was not synced
START_S = 10.0


class VolatileFiles(fuse.PassThrough):
    """Files, and the blocks that were written to them and not synced, by file and number."""

    def __init__(self, source: Path) -> None:
        super().__init__(source, Table(mmap.mmap(-1, TABLE_BYTES)))
        self._blocks: dict[tuple[int, int], bytes] = {}
        self._guard = threading.RLock()
        self._is_on = True
        self._rng = random.Random()

    def cut(self) -> None:
        """Cut the power."""
        with self._guard:
            self._is_on = False
            chance = self._rng.choice(KEPT)
            for (file, block), data in self._blocks.items():
                if self._rng.random() < chance:
                    os.pwrite(file, data, block * BLOCK_BYTES)
            self._blocks.clear()

    def switch_on(self) -> None:
        """Take writes again."""
        self._is_on = True

    def _read(self, request: fuse.Request) -> bytes:
        file, at, nbytes, *_ = fuse._IO.unpack_from(request.body)
        with self._guard:
            found = bytearray(os.pread(file, nbytes, at))
            for block in range(at // BLOCK_BYTES, -(-(at + nbytes) // BLOCK_BYTES)):
                if data := self._blocks.get((file, block)):
                    start = max(at, block * BLOCK_BYTES)
                    stop = min(at + nbytes, (block + 1) * BLOCK_BYTES)
                    first = start - block * BLOCK_BYTES
                    found[start - at : stop - at] = data[first : first + stop - start]
        return bytes(found)

    def _write(self, request: fuse.Request) -> bytes:
        file, at, nbytes, *_ = fuse._IO.unpack_from(request.body)
        data = bytes(request.body[fuse._IO.size : fuse._IO.size + nbytes])
        with self._guard:
            if not self._is_on:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            for block in range(at // BLOCK_BYTES, -(-(at + nbytes) // BLOCK_BYTES)):
                start = max(at, block * BLOCK_BYTES)
                stop = min(at + nbytes, (block + 1) * BLOCK_BYTES)
                piece = data[start - at : stop - at]
                if len(piece) < BLOCK_BYTES:
                    piece = self._patched(file, block, start - block * BLOCK_BYTES, piece)
                self._blocks[file, block] = piece
        return struct.pack("<II", nbytes, 0)

    def _patched(self, file: int, block: int, first: int, piece: bytes) -> bytes:
        """Return a block with a piece of it replaced."""
        old = self._blocks.get((file, block)) or os.pread(file, BLOCK_BYTES, block * BLOCK_BYTES)
        old = old.ljust(BLOCK_BYTES, b"\0")
        return old[:first] + piece + old[first + len(piece) :]

    def _sync(self, request: fuse.Request) -> bytes:
        file = int.from_bytes(request.body[:8], "little")
        with self._guard:
            if not self._is_on:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            for block in [block for owner, block in self._blocks if owner == file]:
                os.pwrite(file, self._blocks.pop((file, block)), block * BLOCK_BYTES)
        return b""

    def _release(self, request: fuse.Request) -> bytes:
        # What a program has written stays in the cache of the disk when it closes the file.
        file = int.from_bytes(request.body[:8], "little")
        if self._is_on:
            with self._guard:
                for block in [block for owner, block in self._blocks if owner == file]:
                    os.pwrite(file, self._blocks.pop((file, block)), block * BLOCK_BYTES)
        return super()._release(request)


class VolatileDisk:
    """Such a file system, in a process of its own. ``path``: where it is."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "volatile"
        self._power = folder / "power"
        source = folder / "source"
        for each in (self.path, source):
            each.mkdir()
        words = [sys.executable, "-m", "tests.long.volatile_disk", source, self.path, self._power]
        self._process = subprocess.Popen([str(word) for word in words])
        self._wait_for("on")

    def cut(self) -> None:
        """Cut the power; return when it is off."""
        self._process.send_signal(signal.SIGUSR1)
        self._wait_for("off")

    def switch_on(self) -> None:
        """Switch it on again; return when it is on."""
        self._process.send_signal(signal.SIGUSR2)
        self._wait_for("on")

    def close(self) -> None:
        """Unmount it and end its process."""
        subprocess.run(["umount", "--lazy", self.path], check=True)
        self._process.kill()
        self._process.wait()

    def _wait_for(self, state: str) -> None:
        deadline = time.monotonic() + START_S
        while not self._power.exists() or self._power.read_text() != state:
            assert self._process.poll() is None, "the volatile disk has ended"
            assert time.monotonic() < deadline, f"the volatile disk does not get {state}"
            time.sleep(0.005)


def main() -> None:
    """Mount and serve."""
    source, target, power = (Path(word) for word in sys.argv[1:])
    files = VolatileFiles(source)

    def off(_number: int, _frame: FrameType | None) -> None:
        files.cut()
        power.write_text("off")

    def on(_number: int, _frame: FrameType | None) -> None:
        files.switch_on()
        power.write_text("on")

    signal.signal(signal.SIGUSR1, off)
    signal.signal(signal.SIGUSR2, on)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    fuse._mount(device, target)
    for _ in range(fuse.THREADS):
        threading.Thread(target=fuse.serve, args=(device, files), daemon=True).start()
    power.write_text("on")
    parent = os.getppid()
    while os.getppid() == parent:  # it goes with the test that started it
        time.sleep(1)


if __name__ == "__main__":
    main()
