"""The driver's calls. Where there is no GPU, that they say so."""

import subprocess
import sys

import pytest
import torch

from respkv.errors import TierError
from respkv.kernels import driver


@pytest.mark.parametrize(
    "call",
    [
        lambda: driver.share(1 << 20),
        lambda: driver.open_shared(bytes(driver.HANDLE_BYTES)),
        lambda: driver.close_shared(1 << 20),
        lambda: driver.device_uuid(99),
    ],
    ids=["share", "open", "close", "uuid"],
)
def test_a_call_that_fails_says_why(call: object) -> None:
    assert callable(call)
    with pytest.raises(TierError, match=r"there is no CUDA driver|^cu[A-Za-z0-9_]+: "):
        call()


def test_a_handle_of_another_length_is_refused_before_the_driver_sees_it() -> None:
    with pytest.raises(TierError, match="a handle has 64 bytes, not 63"):
        driver.open_shared(bytes(63))


_READER = """
import sys, torch
from respkv.client.gpu import open_cuda
device, handle, offset = sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3])
memory = open_cuda(device, handle)
print(int(memory[offset : offset + 1000].sum()), memory.nbytes >= offset + 1000)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_process_reads_the_memory_that_is_shared() -> None:
    torch.empty(1 << 20, dtype=torch.uint8, device="cuda")  # what comes next has an offset
    memory = torch.full((64 << 20,), 3, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    shared = driver.share(memory.data_ptr())
    place = [driver.device_uuid(memory.device.index or 0), shared.handle.hex(), str(shared.offset)]
    done = subprocess.run(
        [sys.executable, "-c", _READER, *place], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["3000", "True"]
