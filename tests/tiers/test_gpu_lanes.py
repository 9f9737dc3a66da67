"""Lanes, and how their events are awaited."""

import ctypes
from collections.abc import Callable

import anyio
import pytest
import torch

from respkv.tiers import gpu_lanes
from respkv.tiers.gpu_lanes import (
    ENDED,
    CudaLanes,
    HostLanes,
    Pinned,
    cuda_runtime,
    ended,
    pin,
)
from tests.simulation.virtual import Jump, run
from tests.tiers.late_lanes import LateEnding

pytestmark = pytest.mark.anyio

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


async def test_what_has_ended_is_not_waited_for() -> None:
    await ended(ENDED)


async def test_others_run_while_an_event_is_awaited() -> None:
    ending = LateEnding()
    turns = 0

    async def others() -> None:
        nonlocal turns
        for _ in range(10):
            await anyio.sleep(0.001)
            turns += 1
        ending.is_over = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(others)
        with anyio.fail_after(60):
            await ended(ending)
    assert turns == 10


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_looking_becomes_rare(backend: str) -> None:
    """In virtual time, in which no machine is slow or stands still: a look takes 10 us there."""

    async def look(jump: Jump) -> tuple[int, int]:
        class Ending(LateEnding):
            def query(self) -> bool:
                jump(1e-5)
                return super().query()

        ending, looks = Ending(), list[int]()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ended, ending)
            for _ in range(2):
                await anyio.sleep(0.1)
                looks.append(ending.num_looks)
            ending.is_over = True
        return looks[0], looks[1] - looks[0]

    at_first, later = run(look, backend=backend, seed=1)
    assert gpu_lanes.PAUSE_S_MAX <= 0.005
    assert 0 < later <= 0.1 / gpu_lanes.PAUSE_S_MAX + 2
    assert at_first > later + 10, "often at first"


async def test_an_error_of_the_device_is_raised_to_who_waits() -> None:
    ending = LateEnding()
    ending.error = RuntimeError("CUDA error: unspecified launch failure")
    with pytest.raises(RuntimeError, match="launch failure"):
        await ended(ending)


async def test_a_wait_can_be_cancelled() -> None:
    with anyio.move_on_after(0.02) as scope:
        await ended(LateEnding())
    assert scope.cancelled_caught


def test_work_of_the_processor_is_over_when_it_was_launched() -> None:
    done: list[int] = []
    ending = HostLanes().launch("in", lambda: done.append(1))
    assert done == [1]
    assert ending.query()


class FakeRuntime:
    """A CUDA runtime that pins, or does not."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if not self.status:
            self.pinned[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return self.status

    def cudaGetErrorString(self, status: int) -> str:
        return "out of memory"


def test_memory_is_pinned_until_it_is_closed() -> None:
    runtime, memory = FakeRuntime(), memoryview(bytearray(4096))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pinned = pin(memory, runtime)
    assert pinned is not None
    assert runtime.pinned == {address: 4096}
    pinned.close()
    pinned.close()
    assert not runtime.pinned


def test_memory_that_cannot_be_pinned_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert pin(memoryview(bytearray(4096)), FakeRuntime(2)) is None
    assert "could not be pinned" in caplog.text
    assert "CUDA error: out of memory (2)" in caplog.text
    assert "ulimit -l" in caplog.text


def compute(cycles: int) -> None:
    """Have the computing stream busy; 2 billion cycles take about a second."""
    sleep: Callable[[int], None] = torch.cuda._sleep
    sleep(cycles)


@pytest.mark.gpu
@needs_cuda
async def test_copies_from_pinned_memory_run_beside_the_computing_stream() -> None:
    arena = memoryview(bytearray(64 << 20))
    pinned = Pinned(arena, cuda_runtime())
    lanes = CudaLanes(torch.device("cuda"), is_quick=True)
    source = torch.frombuffer(arena, dtype=torch.uint8)
    assert source.is_pinned()
    source.fill_(7)
    target = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    compute(200_000_000)

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    ending = lanes.launch("in", copy)
    await ended(ending)
    assert not torch.cuda.current_stream().query(), "the copy did not wait for it"
    assert int(target[-1]) == 7
    pinned.close()


@pytest.mark.gpu
@needs_cuda
async def test_what_is_launched_after_users_waits_for_them() -> None:
    lanes = CudaLanes(torch.device("cuda"), is_quick=True)
    compute(100_000_000)
    lanes.wait_for_users()
    ending = lanes.launch("in", lambda: None)
    assert not ending.query()
    await ended(ending)
    assert torch.cuda.current_stream().query()
