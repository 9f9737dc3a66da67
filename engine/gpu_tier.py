"""What the engine asks of the gpu tier.

The engine knows it by this protocol alone and never sees torch, so it is tested without. What each
method does in detail is said where it is built, in tiers/gpu.py.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

from respkv.kernels.page_form import PageForm
from respkv.tiers.slab import Slab, Slot


class GpuSlots(Protocol):
    """What is where on the device. Slots are counted as those of the arena are."""

    def hold(self, slot: Slot) -> None: ...

    def give_back(self, slot: Slot) -> None: ...

    def is_alike(self, slot: Slot, nbytes: int) -> bool: ...

    def slabs_to_clear(self, nbytes: int, cost: Callable[[Slab], float]) -> list[Slab] | None: ...

    def used(self) -> Iterator[Slot]: ...

    def check(self) -> None: ...

    @property
    def capacity_bytes(self) -> int: ...

    @property
    def used_bytes(self) -> int: ...

    @property
    def nbytes_max(self) -> int: ...


class GpuTier(Protocol):
    """Pages in the memory of one device, each of them in memory or in a file as well."""

    name: str
    letter: str

    @property
    def slots(self) -> GpuSlots: ...

    @property
    def state(self) -> str: ...

    @property
    def reason(self) -> str: ...

    def take(self, nbytes: int) -> Slot | None: ...

    async def write(self, slot: Slot, payload: memoryview, form: PageForm) -> bool: ...

    async def read(self, slot: Slot, into: memoryview, form: PageForm) -> int: ...

    def handle(self) -> tuple[str, bytes, int]: ...

    def load_us(self, nbytes: int) -> int: ...
