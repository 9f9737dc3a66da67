"""Pages on the server's GPU, mapped into this process: tensors without a copy.

The server's device memory is one allocation; its handle is opened once and its mapping kept, as
the arena's is, and unmapped when neither a client nor a tensor made of it is left. Both processes
must see the same GPU and share the IPC namespace. torch is imported when the first lease begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from respkv.errors import ConfigError, TierError
from respkv.page import Geometry

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class GpuPage:
    """A page as it lies on the device.

    stored: [bytes] uint8 there; not to be written, and only read while the lease lasts.
    form:   how it is stored: "raw", or codecs as in ``i8`` and ``i8/f8+4+16``.
    """

    stored: torch.Tensor
    form: str

    def tensor(self, geometry: Geometry) -> torch.Tensor:
        """Return the page [L, 2, T, H, D]: a view of it where it is raw, else decoded.

        Raises ValueError when it is no page of this geometry.
        """
        import torch

        from respkv.kernels.page_coding import as_page, decode_page
        from respkv.kernels.page_form import form_of_name

        form = form_of_name(self.form, geometry)
        if form.nbytes != self.stored.nbytes:
            raise ValueError(f"{self.stored.nbytes} bytes; {form.name} pages have {form.nbytes}")
        if form.is_lossless:
            return as_page(self.stored, form)
        memory = torch.empty(geometry.page_bytes, dtype=torch.uint8, device=self.stored.device)
        return decode_page(self.stored, form, out=as_page(memory, form.raw))


class GpuMemories:
    """The device memory that one client has mapped: a client has one server, so one at a time.

    open_memory: maps what a device's UUID and a handle name; [bytes] uint8.
    """

    def __init__(self, open_memory: Callable[[str, bytes], torch.Tensor] | None = None) -> None:
        self._open = open_memory or open_cuda
        self._mapped: tuple[tuple[str, bytes], torch.Tensor] | None = None

    def find(self, device: str, handle: bytes) -> torch.Tensor:
        """Map a server's memory, or return the mapping there is. Raises ConfigError."""
        key = (device, handle)
        # Threads may come here together; a mapping too many is dropped with its last tensor.
        if self._mapped is None or self._mapped[0] != key:
            self._mapped = (key, self._open(device, handle))
        return self._mapped[1]


def open_cuda(device: str, handle: bytes) -> torch.Tensor:
    """Map another process's device memory.

    device: its UUID, as ``driver.device_uuid`` has it.
    Returns: [bytes] uint8 on that device, as long as any tensor made of it lives.
    Raises ConfigError when this process cannot have it.
    """
    import torch

    from respkv.kernels import driver

    if not torch.cuda.is_available():
        raise ConfigError("a lease on a GPU needs a torch that sees one; here it sees none")
    try:
        indexes = {driver.device_uuid(index): index for index in range(torch.cuda.device_count())}
        if device not in indexes:
            raise ConfigError(f"the server's GPU {device} is none that this process sees")
        with torch.cuda.device(indexes[device]):
            torch.cuda.current_stream().synchronize()  # or there is no context yet
            address, nbytes = driver.open_shared(handle)
            return torch.as_tensor(_Mapping(address, nbytes, driver.close_shared))
    except TierError as error:
        raise ConfigError(
            f"the server's GPU memory cannot be mapped: {error}; both processes must be on one"
            " machine, in one IPC namespace, and of users that may see each other"
        ) from error


class _Mapping:
    """Device memory as torch takes it over; a tensor made of it keeps it, and so the mapping."""

    def __init__(self, address: int, nbytes: int, close: Callable[[int], None]) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
        weakref.finalize(self, close, address).atexit = False
