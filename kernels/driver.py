"""The CUDA driver's calls that torch does not offer: device memory shared between processes.

torch shares tensors as well, but counts each in a file that the receiving torch must own, once for
each receiver; one allocation that lives as long as its server, and receivers that come and go, need
none of that. The driver is asked through ctypes; its library has the same name for every version
of CUDA. A context must be current, which torch sees to (``torch.cuda.current_stream().synchronize()``
makes one).

An allocation can be shared when cudaMalloc made it; memory of PYTORCH_CUDA_ALLOC_CONF=
expandable_segments:True cannot. A process cannot open a handle that is its own.
Source: CUDA driver API reference, memory management (cuIpc*, cuMemGetAddressRange) and devices.
"""

import ctypes
from functools import cache
from typing import Any, NamedTuple

from respkv.errors import TierError

HANDLE_BYTES = 64
_UUID_BYTES = 16
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the one flag there is


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class Shared(NamedTuple):
    """An allocation as another process may open it.

    handle: what ``open_shared`` takes. offset: of the address that was asked about, from its start.
    """

    handle: bytes
    offset: int


def share(address: int) -> Shared:
    """Return the handle of the allocation that a device address is in. Raises TierError."""
    base, nbytes = address_range(address)
    assert base <= address < base + nbytes
    handle = _Handle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
    return Shared(ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES), address - base)


def open_shared(handle: bytes) -> tuple[int, int]:
    """Map another process's allocation on the current device; ``close_shared`` ends that.

    Returns: its address and its bytes. Raises TierError.
    """
    if len(handle) != HANDLE_BYTES:
        raise TierError(f"a handle has {HANDLE_BYTES} bytes, not {len(handle)}")
    given = _Handle()
    ctypes.memmove(ctypes.byref(given), handle, HANDLE_BYTES)
    address = ctypes.c_uint64()
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, ctypes.c_uint(_LAZY_PEER_ACCESS))
    return address_range(address.value)


def close_shared(address: int) -> None:
    """Unmap what ``open_shared`` mapped. Raises TierError."""
    _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


def address_range(address: int) -> tuple[int, int]:
    """Return start and bytes of the allocation that a device address is in. Raises TierError."""
    base, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
    _call(
        "cuMemGetAddressRange_v2",
        ctypes.byref(base),
        ctypes.byref(nbytes),
        ctypes.c_uint64(address),
    )
    return base.value, nbytes.value


def device_uuid(index: int) -> str:
    """Return what names a device for every process, whichever devices each can see.

    index: as this process counts. Raises TierError.
    """
    device, uuid = ctypes.c_int(), (ctypes.c_ubyte * _UUID_BYTES)()
    _call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
    return bytes(uuid).hex()


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TierError(f"there is no CUDA driver: {error}") from error
    library.cuInit(ctypes.c_uint(0))  # if it fails, so does what is asked next, and says why
    return library


def _call(name: str, *args: Any) -> None:
    """Call the driver. Raises TierError with what it says."""
    library = _library()
    try:
        function = getattr(library, name)
    except AttributeError as error:
        raise TierError(f"the CUDA driver has no {name}; it is too old") from error
    status = function(*args)
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        reason = (text.value or b"unknown error").decode(errors="replace")
        raise TierError(f"{name}: {reason} ({status})")
