"""The server's shared memory, mapped into this process.

A mapping is known by path and inode, so a server that was started again, with a new file under the
same name, is never read through the memory of its predecessor. Nor is another server's: hosts and
containers give their arenas the same names, so the server says which file of which boot it means.
Views handed out keep their mapping alive; dropping the last of them and the client unmaps it.
"""

import mmap
import os
from pathlib import Path

from respkv.client.replies import Reply
from respkv.errors import ConfigError, ProtocolError

LAYOUT_VERSION = 1
ADVICE = "start the server with --shm ro or rw"


class Arena:
    """A mapped arena.

    writable: the server lets clients write into slots that they have reserved.
    """

    def __init__(self, memory: memoryview, *, writable: bool) -> None:
        self.writable = writable
        self._memory = memory

    def __len__(self) -> int:
        return len(self._memory)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return bytes of the arena. Raises ProtocolError when they are not within it."""
        if offset < 0 or nbytes < 0 or offset + nbytes > len(self._memory):
            raise ProtocolError(f"{nbytes} bytes at {offset} are not within the arena")
        return self._memory[offset : offset + nbytes]

    def view_to_read(self, offset: int, nbytes: int) -> memoryview:
        """Return bytes of the arena, not to be written. Raises ProtocolError as ``view`` does."""
        return self.view(offset, nbytes).toreadonly()


def arena_identity(fd: int) -> bytes:
    """Return what tells this file from all others: its kernel's boot, its device and inode."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = os.fstat(fd)
    return f"{boot}:{found.st_dev}:{found.st_ino}".encode()


class Arenas:
    """The arena that one client has mapped: a client has one server, so one at a time."""

    def __init__(self) -> None:
        self._mapped: tuple[object, Arena] | None = None

    def find(self, answer: Reply) -> Arena:
        """Map the arena that KV.ATTACH answered with, or return the mapping there is.

        Raises ConfigError when this process cannot have it, ProtocolError when it is not such an
        answer.
        """
        match answer:
            case [bytes(name), int(nbytes), int(version), bytes(mode), *rest]:
                path, identity = os.fsdecode(name), rest[0] if rest else None
            case _:
                raise ProtocolError(f"KV.ATTACH was answered with {answer!r}")
        if version != LAYOUT_VERSION:
            raise ConfigError(f"arena layout {version}; this client reads {LAYOUT_VERSION}")
        try:
            return self._open(path, nbytes, identity, writable=mode == b"rw")
        except OSError as error:
            raise ConfigError(
                f"arena {path} cannot be mapped: {error}; a lease needs the server's shared memory,"
                " on the same machine and with rights to the file"
            ) from error

    def _open(self, path: str, nbytes: int, identity: Reply, *, writable: bool) -> Arena:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if identity is not None and identity != arena_identity(fd):
                raise ConfigError(f"arena {path} of this machine or container is another server's")
            return self._map(fd, path, nbytes, writable=writable)
        finally:
            os.close(fd)

    def _map(self, fd: int, path: str, nbytes: int, *, writable: bool) -> Arena:
        found = os.fstat(fd)
        if found.st_size < nbytes:
            raise ConfigError(f"arena {path} has {found.st_size} bytes, not {nbytes}")
        key = (path, found.st_dev, found.st_ino, writable)
        # Threads may come here together; a mapping too many is dropped with its last view.
        if self._mapped is not None and self._mapped[0] == key:
            return self._mapped[1]
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        memory = memoryview(mmap.mmap(fd, nbytes, mmap.MAP_SHARED, protection))
        arena = Arena(memory, writable=writable)
        self._mapped = (key, arena)
        return arena
