"""The engine's own memory, for leases in its own process: nothing is mapped from another one."""

import mmap
from typing import TYPE_CHECKING

from respkv.client.arena import Arena, Arenas
from respkv.client.gpu import GpuMemories
from respkv.client.replies import Reply
from respkv.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from respkv.server.state import Server


class OwnArena(Arena):
    """The arena of this process.

    Leased pages are read through a mapping of their own that cannot be written: a tensor made of one
    has no such protection of itself, and what is written by mistake would be served to others. Not so
    where the arena is pinned for a GPU: only there is its memory copied to the device at full speed.
    """

    def __init__(self, server: "Server") -> None:
        arena = server.arena
        super().__init__(arena.view, writable=True)
        self._protected: Arena | None = None
        if server.gpu_tier is None or server.gpu_tier.pinned is None:
            memory = mmap.mmap(arena.fd, arena.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
            self._protected = Arena(memoryview(memory), writable=False)

    def view_to_read(self, offset: int, nbytes: int) -> memoryview:
        """Return bytes of the arena, not to be written. Raises ProtocolError as ``view`` does."""
        if self._protected is None:
            return super().view_to_read(offset, nbytes)
        return self._protected.view(offset, nbytes)


class OwnArenas(Arenas):
    """Finds the arena of this process whatever the answer was."""

    def __init__(self, server: "Server") -> None:
        super().__init__()
        self._arena = OwnArena(server)

    def find(self, answer: Reply) -> Arena:
        """Return the arena."""
        return self._arena


class OwnGpus(GpuMemories):
    """Finds the memory of this process's own gpu tier."""

    def __init__(self, server: "Server") -> None:
        super().__init__()
        self._server = server

    def find(self, device: str, handle: bytes) -> "torch.Tensor":
        """Return the memory of the tier, [bytes] uint8."""
        tier = self._server.gpu_tier
        if tier is None:
            raise ConfigError("the engine has no gpu tier; open it with gpu_bytes")
        return tier.memory
