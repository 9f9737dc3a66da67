"""Memory for keys and values that is used again, since new memory is the slowest there is.

The kernel hands out fresh memory page by page and clears it: copying 64 MiB into it took 60 ms where
the same copy into memory that had been touched took 8. So blocks are kept when the last tensor in
them has gone, and new ones are asked for in huge pages, which took 12 ms.
"""

import math
import mmap
import weakref
from typing import Final

import numpy
import torch
from torch import Tensor

from respkv.integrations.huggingface.locks import ForkLock

SMALL_BYTES: Final = 1 << 18  # the heap is as quick for less
HUGE_BYTES: Final = 2 << 20
SPARE_BYTES: Final = 1 << 30


class BufferPool:
    """Blocks of memory on the CPU; other devices have pools of their own. Threads may share it.

    spare_bytes: of blocks that nothing is in are kept at most, those used last.
    """

    def __init__(self, spare_bytes: int = SPARE_BYTES) -> None:
        self.spare_bytes = spare_bytes
        self._spare: list[mmap.mmap] = []
        self._lock = ForkLock()  # a collection may return a block in the middle of a take

    @property
    def idle_bytes(self) -> int:
        """Bytes of the blocks that nothing is in."""
        with self._lock:
            return sum(map(len, self._spare))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor whose memory comes back when the last view of it has gone.

        Its contents are those of whatever was there before.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or nbytes < SMALL_BYTES:
            with torch.inference_mode(False):
                return torch.empty(shape, dtype=dtype, device=device)
        block = self._take(rounded(nbytes))
        # torch holds on to the array for as long as any tensor has its memory.
        loan = numpy.frombuffer(block, numpy.uint8)
        weakref.finalize(loan, self._give_back, block).atexit = False
        with torch.inference_mode(False):  # else nobody could write into it outside of that mode
            return torch.from_numpy(loan)[:nbytes].view(dtype).view(shape)

    def _take(self, nbytes: int) -> mmap.mmap:
        with self._lock:
            for index in reversed(range(len(self._spare))):
                if len(self._spare[index]) == nbytes:
                    return self._spare.pop(index)
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if nbytes >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _give_back(self, block: mmap.mmap) -> None:
        with self._lock:
            self._spare.append(block)
            while self._spare and self.idle_bytes > self.spare_bytes:
                self._spare.pop(0)


def rounded(nbytes: int) -> int:
    """Return one of few sizes, at most a quarter larger, so that a block serves many prompts."""
    step = max(SMALL_BYTES, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step
