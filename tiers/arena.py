"""The memory of the CPU tier: one shared mapping, reserved whole at start.

A named arena (for clients that map it too) is a file on a tmpfs, an unnamed one a memfd. Three
things go wrong with shared memory, and each is settled before the first byte is served:
- A full tmpfs kills the writer with SIGBUS. So every block is allocated by fallocate, and a lack of
  space is an error with figures.
- A file that a dead server left behind keeps its memory, and a live one must not be taken over. So
  the owner holds an flock, which the kernel ends with the process, and the file gets its name only
  when it is locked, sized and reserved: nobody ever sees half an arena.
- Hugepages on tmpfs are off almost everywhere, by mount option or sysfs. MADV_COLLAPSE (Linux 6.1)
  does not ask either: it makes them of what is there, in about the time of plain prefaulting, and
  every later mapping of the file has them. It needs an aligned mapping, which mmap.mmap cannot ask for
  and ctypes can. Whether it worked is read back from the kernel, not assumed.

The mapping outlives ``close`` as long as a view of it does, so a late reader sees old bytes, never
a fault. Linux only.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import weakref
from collections.abc import Callable
from pathlib import Path

from respkv.errors import CacheError

_PAGE_BYTES = 4096
_HUGEPAGE_BYTES = 2 << 20
_STEP_BYTES = 64 << 20
_RESERVE_STEP_BYTES = 1 << 30
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MADV_COLLAPSE = 25  # Linux 6.1
_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """Shared memory of ``nbytes``, zero at first. Make it with ``create``.

    view:      all bytes, writable; views taken from it keep the memory mapped after ``close``.
    path, fd:  of the file; path is None for an unnamed arena.
    hugepages: whether at least half of it was found in hugepages when ``prefault`` ended.
    """

    def __init__(self, fd: int, nbytes: int, path: str | None, *, hugepages: bool) -> None:
        self.fd = fd
        self.nbytes = nbytes
        self.path = path
        self.hugepages = False
        self._wants_hugepages = hugepages
        self._address = _map_aligned(fd, nbytes)
        if hugepages:
            # For kernels that make them on request; refused where they are not built in.
            _advise(self._address, nbytes, mmap.MADV_HUGEPAGE)
        memory = (ctypes.c_char * nbytes).from_address(self._address)
        # Every view holds ``memory``, so the bytes are unmapped with the last view. Not at exit:
        # threads may still be copying then.
        weakref.finalize(memory, _libc.munmap, self._address, nbytes).atexit = False
        self.view = memoryview(memory).cast("B")

    @classmethod
    def create(cls, nbytes: int, *, path: str | None, hugepages: bool) -> "Arena":
        """Reserve shared memory and map it.

        nbytes:    rounded up to whole pages of 4 KiB.
        path:      of a file on a tmpfs, which a dead server's arena may occupy; None for a memfd.
        hugepages: ask for them; see ``Arena.hugepages`` for what came of it.
        Raises CacheError when a live server has the path, when something else stands there, or
        when the memory cannot be had.
        """
        if nbytes < 1:
            raise ValueError(f"nbytes must be at least 1, not {nbytes}")
        nbytes = -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
        if path is not None:
            _remove_stale(path)  # first: it may hold the memory that is needed now
        try:
            fd = _open_unnamed(path)
        except OSError as error:
            raise CacheError(f"cannot make the arena {path}: {error.strerror}") from error
        try:
            _reserve(fd, nbytes, path)
            if path is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _link(fd, path)
            return cls(fd, nbytes, path, hugepages=hugepages)
        except BaseException:
            _unlink(fd, path)
            os.close(fd)
            raise

    def prefault(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Touch every page now, so that no request waits for the kernel to clear one.

        Changes no byte, so it may run in a thread beside readers and writers; it holds the GIL
        only between steps of 64 MiB, and stops early when the arena is closed.

        on_progress: called in the same thread with the bytes done so far, after each step.
        Raises CacheError when the kernel has no memory left.
        """
        view = self.view[:]  # keeps the memory mapped until this ends
        collapse = self._wants_hugepages
        for start in range(0, self.nbytes, _STEP_BYTES):
            if self.fd < 0:
                return
            length = min(_STEP_BYTES, self.nbytes - start)
            if collapse:
                # EINVAL: not known here. Anything else concerns this step only.
                collapse = _advise(self._address + start, length, _MADV_COLLAPSE) != errno.EINVAL
            self._populate(view, start, length)
            if on_progress is not None:
                on_progress(start + length)
        huge_bytes = _huge_bytes(self._address, self._address + self.nbytes)
        self.hugepages = huge_bytes * 2 >= self.nbytes
        view.release()

    def close(self) -> None:
        """Remove the name and give up the file; a second call does nothing.

        The memory itself goes with the last view of it.
        """
        if self.fd < 0:
            return
        _unlink(self.fd, self.path)
        os.close(self.fd)
        self.fd = -1
        # A view that is still exported (an array made of it) cannot be released, and need not be.
        with contextlib.suppress(BufferError):
            self.view.release()

    def _populate(self, view: memoryview, start: int, length: int) -> None:
        error = _advise(self._address + start, length, _MADV_POPULATE_WRITE)
        if error == errno.EINVAL:
            # Before Linux 5.14. Reading is enough, since every page is reserved, and unlike a
            # write it cannot undo somebody else's.
            view[start : start + length : _PAGE_BYTES].tobytes()
        elif error:
            raise CacheError(
                f"cannot touch the arena's memory at {start} of {self.nbytes} bytes: "
                f"{os.strerror(error)}; lower maxmemory"
            )


def memory_available() -> int:
    """Return the bytes that this process can still have without swapping.

    The least of what the machine has left and what the limit of its control group leaves.
    """
    machine = _fields(Path("/proc/meminfo"))["MemAvailable:"] << 10
    group = Path("/proc/self/cgroup").read_text().strip().rpartition("0::/")[2]
    return min([machine, *group_memory_available(Path("/sys/fs/cgroup"), group)])


def group_memory_available(root: Path, group: str) -> list[int]:
    """Return what each memory limit of a control group (v2) and of those above it leaves.

    root:  where the groups are mounted. group: the path below it, e.g. ``kubepods/pod1``; in a
    container it may name a folder that only the host can see.
    """
    available = []
    for folder in [root / group, *(root / group).parents]:
        if not folder.is_relative_to(root):
            break
        limit = folder / "memory.max"
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            # Page cache is given back under pressure, so it does not count as taken.
            cache = _fields(folder / "memory.stat")
            taken = int((folder / "memory.current").read_text())
            taken -= cache["inactive_file"] + cache["active_file"]
            available.append(max(0, int(text) - taken))
    return available


def _fields(path: Path) -> dict[str, int]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {words[0]: int(words[1]) for words in lines}


def _open_unnamed(path: str | None) -> int:
    if path is None:
        return os.memfd_create("respkv-arena", os.MFD_CLOEXEC)
    fd = os.open(Path(path).parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)  # whatever the umask
    return fd


def _reserve(fd: int, nbytes: int, path: str | None) -> None:
    # Without this check a memfd larger than the machine ends with the kernel killing something.
    available = memory_available()
    if nbytes > available:
        raise CacheError(
            f"the arena needs {_mib(nbytes)}, but only {_mib(available)} of memory are available; "
            f"lower maxmemory or raise the memory limit of the container"
        )
    try:
        os.ftruncate(fd, nbytes)
        for start in range(0, nbytes, _RESERVE_STEP_BYTES):
            os.posix_fallocate(fd, start, min(_RESERVE_STEP_BYTES, nbytes - start))
    except OSError as error:
        raise CacheError(_why_not_reserved(nbytes, path, error)) from error


def _why_not_reserved(nbytes: int, path: str | None, error: OSError) -> str:
    what = f"cannot reserve {_mib(nbytes)} for the arena {path or 'in a memfd'}: {error.strerror}"
    if error.errno == errno.ENOSPC and path is not None:
        folder = Path(path).parent
        space = os.statvfs(folder)
        free, size = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
        return (
            f"{what}; {folder} has {_mib(free)} free of {_mib(size)}; lower maxmemory or enlarge "
            f"it (mount -o remount,size=..., in a container --shm-size or a memory emptyDir)"
        )
    if error.errno == errno.EFBIG:
        return f"{what}; raise the limit on file sizes (ulimit -f) or lower maxmemory"
    return f"{what}; lower maxmemory"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def _link(fd: int, path: str) -> None:
    # A loop, because another starting server may replace the same stale file at the same time.
    for _ in range(16):
        try:
            _link_once(fd, path)
            return
        except FileExistsError:
            _remove_stale(path)
        except OSError as error:
            raise CacheError(f"cannot name the arena {path}: {error.strerror}") from error
    raise CacheError(f"other servers keep taking the arena {path}; choose another shm-path")


def _link_once(fd: int, path: str) -> None:
    # os.link follows the symlink in /proc only when it is given a folder (linkat, not link).
    folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(str(fd), path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _remove_stale(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CacheError(f"{path} is no arena of ours ({error.strerror}); remove it") from error
    try:
        found = os.fstat(fd)
        ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if not ours or stat.S_IMODE(found.st_mode) != 0o600:
            raise CacheError(f"{path} is no arena of ours (owner, kind or mode); remove it")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheError(
                f"the arena {path} belongs to a server that is running; "
                f"stop it or choose another shm-path"
            ) from error
        _unlink(fd, path)
    finally:
        os.close(fd)


def _unlink(fd: int, path: str | None) -> None:
    # Only while the name is still this file's: somebody may have removed and replaced it.
    if path is not None:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd)):
                os.unlink(path)


def _map_aligned(fd: int, nbytes: int) -> int:
    # Reserve addresses for one hugepage more, and map the file over the aligned part.
    spare = nbytes + _HUGEPAGE_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _mmap(None, spare, 0, flags, -1)
    address = -(-start // _HUGEPAGE_BYTES) * _HUGEPAGE_BYTES
    _mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd)
    if address > start:
        _libc.munmap(start, address - start)
    _libc.munmap(address + nbytes, start + spare - address - nbytes)
    return address


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        raise CacheError(f"cannot map {_mib(nbytes)}: {os.strerror(ctypes.get_errno())}")
    return int(found)


def _advise(address: int, nbytes: int, advice: int) -> int:
    # Through ctypes, which releases the GIL; mmap.madvise keeps it. Returns the errno, 0 if done.
    while _libc.madvise(address, nbytes, advice):
        error = ctypes.get_errno()
        if error != errno.EINTR:
            return error
    return 0


def _huge_bytes(start: int, stop: int) -> int:
    # The kernel may split a mapping into several entries; sum those that lie within it.
    total, inside = 0, False
    with contextlib.suppress(OSError), open("/proc/self/smaps") as lines:
        for line in lines:
            word, _, rest = line.partition(" ")
            if not word.endswith(":"):
                first, last = (int(part, 16) for part in word.split("-"))
                inside = start <= first and last <= stop
            elif inside and word in ("ShmemPmdMapped:", "FilePmdMapped:"):
                total += int(rest.split()[0]) << 10
    return total
