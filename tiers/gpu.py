"""The gpu tier: one allocation on a device, cut into slots, and the copies to and from it.

It stands above the arena and is inclusive: what is here is in memory or in a file, too, so dropping
a page is free and no page is lost with the device. Who is here is decided in the engine; here are
the bytes. ``device="cpu"`` runs the same code on the processor, for tests.

A slot is counted, as in the arena: by whoever took it, by each lease, and by each copy on its way.
So none is used again under a copy or a reader. A page becomes visible when the engine has been
answered, which is after its copy has ended on the device; any stream may read it from then on.

Everything is allocated at the start, but for what encoding takes: about two pages beside the
capacity while it lasts.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import anyio
import anyio.to_thread
import torch
from torch import Tensor

from respkv.errors import TierError
from respkv.kernels import driver
from respkv.kernels.page_form import PageForm
from respkv.tiers.estimate import Estimate
from respkv.tiers.format import hash64
from respkv.tiers.gpu_lanes import (
    CudaLanes,
    HostLanes,
    Lanes,
    Pinned,
    Way,
    cuda_runtime,
    ended,
    pin,
)
from respkv.tiers.gpu_slots import GpuSlots
from respkv.tiers.slab import Slot

logger = logging.getLogger(__name__)

THREADS_MAX = 4  # for copies of memory that is not pinned, and for encoding on the processor
HASH_ON_LOOP_MAX = 1 << 20
LATENCY_US, BYTES_PER_S = 30.0, 20e9  # of reading, until it has been measured


@dataclass(slots=True)
class GpuStats:
    """What the tier counts: pages and payload bytes that came and went, and what went wrong."""

    writes: int = 0
    write_bytes: int = 0
    reads: int = 0
    read_bytes: int = 0
    unfit: int = 0  # pages with numbers that a codec cannot hold
    errors: int = 0


class GpuTier:
    """Pages in the memory of one device. Make it with ``open``.

    slots:  what is where.
    memory: [capacity] uint8 on ``device``.
    pinned: the host memory that its copies come from; None: they go through threads.
    state:  off once the device has failed: a CUDA context does not recover. ``reason`` says why.
    """

    name = "gpu"
    letter = "g"

    def __init__(
        self, memory: Tensor, lanes: Lanes, *, pinned: Pinned | None = None, unit_bytes: int = 0
    ) -> None:
        self.memory = memory
        self.device = memory.device
        self.pinned = pinned
        self.stats = GpuStats()
        self.reason = ""
        sizes = {"unit_bytes": unit_bytes} if unit_bytes else {}
        self.slots = GpuSlots(memory.nbytes, **sizes)
        self._lanes = lanes
        self._limiter: anyio.CapacityLimiter | None = None
        self._estimate = Estimate(latency_us=LATENCY_US, bytes_per_s=BYTES_PER_S)
        self._shared: driver.Shared | str = _share(memory)

    @classmethod
    def open(cls, device: str, capacity_bytes: int, arena: memoryview) -> "GpuTier":
        """Allocate the slots, and pin the arena. Blocking: for seconds.

        device: ``cuda:0`` and so on, or ``cpu``.
        Raises TierError when there is no such device, or not so much memory on it.
        """
        place = _find_device(device)
        try:
            memory = torch.empty(capacity_bytes, dtype=torch.uint8, device=place)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise TierError(
                f"gpu-bytes {capacity_bytes}: {device} has not so much memory free; lower it "
                f"({_first_line(error)})"
            ) from error
        if place.type == "cpu":
            return cls(memory, HostLanes())
        pinned = pin(arena, cuda_runtime())
        return cls(memory, CudaLanes(place, is_quick=pinned is not None), pinned=pinned)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all slots there can be."""
        return self.slots.capacity_bytes

    @property
    def state(self) -> str:
        """``ok`` or ``off``."""
        return "off" if self.reason else "ok"

    @property
    def latency_us(self) -> float:
        """What a small read takes."""
        return self._estimate.latency_us

    @property
    def bytes_per_s(self) -> float:
        """What large reads bring."""
        return self._estimate.bytes_per_s

    def load_us(self, nbytes: int) -> int:
        """Estimate how long reading takes."""
        return self._estimate.load_us(nbytes)

    def take(self, nbytes: int) -> Slot | None:
        """Take a slot, held once; ``give_back`` ends that. None when there is no room."""
        return None if self.reason else self.slots.take(nbytes)

    async def write(self, slot: Slot, payload: memoryview, form: PageForm) -> bool:
        """Copy a page into a slot, in a form.

        payload: of the arena, where it must stay as it is until this has ended.
        Returns: False when the page has numbers that the form's codecs cannot hold; the slot then
        has no page. Raises TierError when the device fails, or has no memory to encode with.
        Cancelled: not before the copy has ended.
        """
        assert payload.nbytes == form.geometry.page_bytes
        stored = self._bytes_of(slot, form.nbytes)
        source = _tensor_of(payload)
        fits: list[Tensor] = []

        def copy_in() -> None:
            if form.is_lossless:
                stored.copy_(source, non_blocking=True)
                return
            from respkv.kernels.page_coding import as_page, encode_page

            raw = torch.empty_like(source, device=self.device)
            raw.copy_(source, non_blocking=True)
            fits.append(self._to_host(encode_page(as_page(raw, form), form, out=stored)))

        await self._move("in", slot, copy_in, is_copy=form.is_lossless)
        if fits and not bool(fits[0]):
            self.stats.unfit += 1
            return False
        self.stats.writes += 1
        self.stats.write_bytes += payload.nbytes
        return True

    async def read(self, slot: Slot, into: memoryview, form: PageForm) -> int:
        """Copy a page of a slot to the arena, decoded.

        into:    all bytes of the page; lent until this has ended.
        Returns: the checksum of what is there now.
        Raises TierError when the device fails. Cancelled: not before the copy has ended.
        """
        assert into.nbytes == form.geometry.page_bytes
        stored = self._bytes_of(slot, form.nbytes)
        target = _tensor_of(into)

        def copy_out() -> None:
            source = stored if form.is_lossless else self._decoded(stored, form)
            target.copy_(source, non_blocking=True)

        began_s = perf_counter()
        await self._move("out", slot, copy_out, is_copy=form.is_lossless)
        self._estimate.observe(into.nbytes, perf_counter() - began_s)
        self.stats.reads += 1
        self.stats.read_bytes += into.nbytes
        if into.nbytes <= HASH_ON_LOOP_MAX:
            return hash64(into)
        checksum = 0
        with anyio.CancelScope(shield=True):  # a thread reads what is lent
            checksum = await anyio.to_thread.run_sync(hash64, into, limiter=self._threads())
        return checksum

    def view(self, slot: Slot, form: PageForm) -> Tensor:
        """Return a page on the device without a copy, while the slot is held.

        Returns: [L, 2, T, H, D] of a raw page, [form.nbytes] uint8 of an encoded one.
        """
        from respkv.kernels.page_coding import as_page

        assert slot.holders > 0, "a free slot has no page"
        stored = self._bytes_of(slot, form.nbytes)
        return as_page(stored, form) if form.is_lossless else stored

    @contextmanager
    def lent(self, slot: Slot, form: PageForm) -> Iterator[Tensor]:
        """View a page while the block runs; its slot is not used again meanwhile.

        Work that the block has launched on its stream may end later: the next copy into the device
        waits for it.
        """
        self.slots.hold(slot)
        try:
            yield self.view(slot, form)
        finally:
            self._lanes.wait_for_users()
            self.slots.give_back(slot)

    def handle(self) -> tuple[str, bytes, int]:
        """Return how another process on the same device reads the slots in place.

        Returns: the uuid of the device; the CUDA IPC handle of the allocation that the slots are
        in; where slot offset 0 is in it. Raises TierError when there is none.
        """
        if isinstance(self._shared, str):
            raise TierError(f"the gpu tier's memory cannot be shared: {self._shared}")
        index = 0 if self.device.index is None else self.device.index
        return driver.device_uuid(index), self._shared.handle, self._shared.offset

    def close(self) -> None:
        """Give the host memory back to the system. Nothing may be on its way; views stay valid."""
        pinned, self.pinned = self.pinned, None
        if pinned is not None:
            try:
                pinned.close()
            except RuntimeError as error:  # the device had failed; the process is about to end
                logger.warning("the arena could not be unpinned: %s", _first_line(error))

    # -- inside -------------------------------------------------------------------------------

    async def _move(self, way: Way, slot: Slot, work: Callable[[], None], *, is_copy: bool) -> None:
        """Launch work and wait until it is over; the slot is held until then.

        is_copy: it is one copy; else it launches kernels, whose first launch compiles for seconds.
        """
        if self.reason:
            raise TierError(f"the gpu tier is off: {self.reason}")
        self.slots.hold(slot)
        try:
            with anyio.CancelScope(shield=True):
                if is_copy and self._lanes.is_quick:
                    ending = self._lanes.launch(way, work)
                else:
                    ending = await anyio.to_thread.run_sync(
                        self._lanes.launch, way, work, limiter=self._threads()
                    )
                await ended(ending)
        except RuntimeError as error:
            self._note_failure(error)
            raise TierError(f"the gpu tier: {_first_line(error)}") from error
        finally:
            self.slots.give_back(slot)

    def _note_failure(self, error: RuntimeError) -> None:
        """Count an error of the device; raise again what is none."""
        if isinstance(error, torch.OutOfMemoryError):  # of what encoding takes; it may come free
            self.stats.errors += 1
        elif is_device_error(error):
            self.stats.errors += 1
            self.reason = _first_line(error)
            logger.error("the gpu tier is off until the next start: %s", self.reason)
        else:
            raise error

    def _bytes_of(self, slot: Slot, nbytes: int) -> Tensor:
        return self.memory[slot.offset : slot.offset + nbytes]

    def _decoded(self, stored: Tensor, form: PageForm) -> Tensor:
        from respkv.kernels.page_coding import as_page, decode_page

        raw = torch.empty(form.geometry.page_bytes, dtype=torch.uint8, device=self.device)
        decode_page(stored, form, out=as_page(raw, form))
        return raw

    def _to_host(self, flag: Tensor) -> Tensor:
        host = torch.empty((), dtype=torch.bool, pin_memory=self.device.type == "cuda")
        return host.copy_(flag, non_blocking=True)

    def _threads(self) -> anyio.CapacityLimiter:
        if self._limiter is None:  # not before: it belongs to the loop that is running
            self._limiter = anyio.CapacityLimiter(THREADS_MAX)
        return self._limiter


def is_device_error(error: RuntimeError) -> bool:
    """Whether the device is to blame and not the program; torch has one class for nearly all."""
    known = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
    return isinstance(error, known) or "CUDA" in str(error)


def _share(memory: Tensor) -> driver.Shared | str:
    """Return the handle of device memory, or why there is none."""
    if memory.device.type != "cuda":
        return f"it is on the {memory.device.type}, which is for tests"
    try:
        return driver.share(memory.data_ptr())
    except TierError as error:
        return (
            f"{error}; containers must share the IPC namespace, and PYTORCH_CUDA_ALLOC_CONF must "
            "not have expandable_segments"
        )


def _find_device(name: str) -> torch.device:
    """Return a device that is there. Raises TierError."""
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        build = "this torch is built without CUDA" if not torch.version.cuda else "no GPU is usable"
        raise TierError(
            f"gpu-device {name}: {build}; install respkv[torch] with a torch for CUDA and its "
            "driver, or leave gpu-bytes at 0 (gpu-device cpu is for tests)"
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise TierError(f"gpu-device {name}: this process sees {count} GPUs")
    return device


def _tensor_of(memory: memoryview) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
