"""Where the copies of the gpu tier run: side streams of a GPU, or the processor itself.

Work for a lane is launched, and an event says when it is over. On a GPU with pinned host memory the
launch returns at once and may be made from the event loop; otherwise it does not, and belongs into a
thread, which ``is_quick`` says. The event is awaited by looking (``ended``): at first again and
again with others let in between, then with pauses. The alternatives were a thread that waits for
each event (two hand-overs of the interpreter for each copy of 100 us, a thread that a hung device
keeps for ever) and a host function on the stream (it would run Python on the driver's thread).
"""

import ctypes
import logging
from collections.abc import Callable
from typing import Any, Literal, Protocol

import anyio
import anyio.lowlevel
import torch

logger = logging.getLogger(__name__)

Way = Literal["in", "out"]

LOOK_S = 200e-6  # a copy of some MiB takes less; until then it is looked at in every turn
PAUSE_S, PAUSE_S_MAX = 0.001, 0.005
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of this process


class Ending(Protocol):
    """Says whether work is over; a ``torch.cuda.Event`` is one."""

    def query(self) -> bool: ...


class Lanes(Protocol):
    """One lane into the device and one out of it; what is launched on one is done in order."""

    @property
    def is_quick(self) -> bool:
        """Whether ``launch`` returns before the work is done, so that the loop may call it."""
        ...

    def launch(self, way: Way, work: Callable[[], None]) -> Ending:
        """Begin work on a lane. Its tensors must stay as they are until it has ended."""
        ...

    def wait_for_users(self) -> None:
        """Have what is launched next wait for the device work that the caller has launched so far."""
        ...


class _Ended:
    def query(self) -> bool:
        return True


ENDED = _Ended()


class HostLanes:
    """Lanes of the processor: work is over when its launch returns."""

    is_quick = False

    def launch(self, way: Way, work: Callable[[], None]) -> Ending:
        work()
        return ENDED

    def wait_for_users(self) -> None:
        return


class CudaLanes:
    """Two streams of a GPU beside those that compute.

    is_quick: whether all host memory that takes part is pinned.
    """

    def __init__(self, device: torch.device, *, is_quick: bool) -> None:
        self.is_quick = is_quick
        self._device = device
        # torch's stubs leave some of these without types.
        make: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
        self._streams = {"in": make(device), "out": make(device)}

    def launch(self, way: Way, work: Callable[[], None]) -> Ending:
        stream = self._streams[way]
        with torch.cuda.stream(stream):
            work()
            ending: Ending = stream.record_event()
            return ending

    def wait_for_users(self) -> None:
        done = torch.cuda.current_stream(self._device).record_event()
        self._streams["in"].wait_event(done)


async def ended(ending: Ending) -> None:
    """Wait until work has ended; others run meanwhile.

    Raises what ``query`` does, a RuntimeError when the device has failed.
    Cancelled: the work goes on; whoever launched it may not let go of its memory.
    """
    look_until, pause_s = anyio.current_time() + LOOK_S, PAUSE_S
    while not ending.query():
        if anyio.current_time() < look_until:
            await anyio.lowlevel.checkpoint()
        else:
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)


class Pinned:
    """Host memory that the driver has pinned, so that copies to and from it need no thread.

    cudart: the CUDA runtime, as ``torch.cuda.cudart()`` gives it.
    Raises RuntimeError, in the constructor, when it does not pin the memory.
    """

    def __init__(self, memory: memoryview, cudart: Any) -> None:
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._memory = memory  # it stays mapped as long as it is pinned
        self._cudart = cudart
        self._check(cudart.cudaHostRegister(self._address, memory.nbytes, _PORTABLE))

    def close(self) -> None:
        """End it; a second call does nothing. Nothing may be on its way. Raises RuntimeError."""
        if self._address:
            address, self._address = self._address, 0
            self._check(self._cudart.cudaHostUnregister(address))

    def _check(self, status: Any) -> None:
        if int(status):
            text = self._cudart.cudaGetErrorString(status)
            raise RuntimeError(f"CUDA error: {text} ({int(status)})")


def pin(memory: memoryview, cudart: Any) -> Pinned | None:
    """Pin host memory; None, and a warning, when that is refused. Blocking: some 0.2 s a GiB."""
    try:
        return Pinned(memory, cudart)
    except RuntimeError as error:
        logger.warning(
            "the arena could not be pinned for the GPU, so copies go through threads: %s; "
            "raise the limit of locked memory (ulimit -l)",
            error,
        )
        return None


def cuda_runtime() -> Any:
    """Return the CUDA runtime that torch uses, initialized."""
    find: Callable[[], Any] = torch.cuda.cudart  # untyped in torch's stubs
    return find()
