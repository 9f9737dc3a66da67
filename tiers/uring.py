"""The rings of io_uring, by three system calls and two mappings. Knows no event loop.

A package would be a dependency for two hundred lines, and the one there is holds the GIL while it
waits. ctypes lets the GIL go around every call.

A request goes in with ``push`` and to the kernel with ``enter``; ``completions`` gives back its
number and result. There is room for ``depth`` requests at a time, which the owner counts, and for
twice as many completions, so those can never overflow.

Order of memory: requests are read by the kernel inside our own call, in program order. Completions
are written by another processor, entry first, then tail. x86-64 keeps our loads in that order;
elsewhere ``membarrier`` stands between our load of the tail and those of the entries.
"""

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import platform
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator

_SETUP, _ENTER, _REGISTER = 425, 426, 427  # the same everywhere
READ, WRITE, FSYNC = 22, 23, 3
_NOP = 0
_FIXED = {READ: 4, WRITE: 5}  # from and to registered memory
_REGISTER_FILES, _REGISTER_EVENTFD, _UPDATE_FILES = 2, 4, 6
_REGISTER_BUFFERS, _UPDATE_BUFFERS = 15, 16  # tables with holes: Linux 5.13
_SPARSE = 1
_FIXED_FILE, _ASYNC = 1, 16  # flags of a request
_DATASYNC = 1
_GET_EVENTS = 1
_SINGLE_MMAP, _FAST_POLL = 1 << 0, 1 << 5  # features; the second came with Linux 5.7
_SQES_OFFSET = 0x10000000
_NUM_FILES_MAX = 4096
_NUM_BUFFERS = 1024
_BUFFER_BYTES_MAX = 1 << 30  # the kernel's limit of one registered buffer

_SQE = struct.Struct("=BBHiQQIIQHHiQQ")
_CQE = struct.Struct("=Qi4x")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_logger = logging.getLogger(__name__)


class Ring:
    """A pair of queues shared with the kernel.

    depth:   the most requests that are queued or in flight at a time; the owner sees to it.
    blocks:  whether the files may be buffered ones, whose copying must not be done in our call.
    eventfd: readable when something was completed.
    Raises OSError where the kernel or the container has no io_uring for us.
    """

    def __init__(self, depth: int, *, blocks: bool = False) -> None:
        self.depth = depth
        self.num_queued = 0  # requests that the kernel has not taken yet
        self.num_enters = 0
        self._flags = _ASYNC if blocks else 0
        self._buffers: list[tuple[int, int, int]] = []  # start, end, index; by start
        self._registered: list[memoryview] = []
        self._fence = _fence()
        params = ctypes.create_string_buffer(120)
        self._fd = _call(_SETUP, depth, params)
        try:
            self._map(params.raw)
            self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:
            os.close(self._fd)
            raise
        try:
            self._register(_REGISTER_EVENTFD, struct.pack("=i", self.eventfd), 1)
            self._try_out()
        except OSError:
            self.close()
            raise
        self._free_files = self._make_file_table()
        self._num_buffers_max = self._make_buffer_table()

    def _map(self, params: bytes) -> None:
        num_requests, num_completions = struct.unpack_from("=2I", params)
        if ~struct.unpack_from("=I", params, 20)[0] & (_SINGLE_MMAP | _FAST_POLL):
            raise OSError(errno.ENOSYS, "io_uring of Linux 5.7 or later is needed")
        sq, cq = struct.unpack_from("=7I", params, 40), struct.unpack_from("=6I", params, 80)
        nbytes = max(sq[6] + num_requests * 4, cq[5] + num_completions * 16)
        flags, protection = mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE
        self._ring = mmap.mmap(self._fd, nbytes, flags, protection)
        self._sqes = mmap.mmap(self._fd, num_requests * 64, flags, protection, offset=_SQES_OFFSET)
        # A store to an element is one 32-bit store.
        self._words = memoryview(self._ring)[: nbytes // 4 * 4].cast("I")
        self._sq_tail, self._sq_mask = sq[1] // 4, self._words[sq[2] // 4]
        self._cq_head, self._cq_tail, self._cqes = cq[0] // 4, cq[1] // 4, cq[5]
        self._cq_mask = self._words[cq[2] // 4]
        for index in range(num_requests):
            self._words[sq[6] // 4 + index] = index
        assert num_requests >= self.depth
        assert num_completions >= 2 * self.depth

    def _try_out(self) -> None:
        # A sandbox may grant the ring and refuse its use.
        _SQE.pack_into(self._sqes, 0, _NOP, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        self._words[self._sq_tail] += 1
        _call(_ENTER, self._fd, 1, 1, _GET_EVENTS, None, 0)
        self._words[self._cq_head] += 1

    # What the kernel knows beforehand

    def _make_file_table(self) -> list[int]:
        for count in (_NUM_FILES_MAX, 512):  # not more than RLIMIT_NOFILE
            try:
                self._register(_REGISTER_FILES, struct.pack("=i", -1) * count, count)
                return list(range(count))
            except OSError:
                continue
        return []

    def _make_buffer_table(self) -> int:
        table = struct.pack("=IIQQQ", _NUM_BUFFERS, _SPARSE, 0, 0, 0)
        try:
            self._register(_REGISTER_BUFFERS, table, len(table))
        except OSError as error:
            _logger.info("io_uring without registered buffers: %s", error.strerror)
            return 0
        return _NUM_BUFFERS

    def add_file(self, fd: int) -> int:
        """Make a file known. Returns its place in the table, -1 when it has to do without."""
        if not self._free_files:
            return -1
        index = self._free_files.pop()
        try:
            self._update_file(index, fd)
        except OSError:
            self._free_files.append(index)
            return -1
        return index

    def drop_file(self, index: int) -> None:
        """Forget a file with which no transfer is left. Harmless for -1."""
        if index >= 0:
            self._update_file(index, -1)
            self._free_files.append(index)

    def _update_file(self, index: int, fd: int) -> None:
        number = ctypes.c_int(fd)
        update = struct.pack("=IIQ", index, 0, ctypes.addressof(number))
        self._register(_UPDATE_FILES, update, 1)

    def register(self, memory: memoryview) -> None:
        """Pin memory, so that transfers from and to it need not; where refused they go without.

        Takes about 0.1 s for a GiB of touched memory of 4 KiB pages, and may be called in a thread
        while no transfer is in flight.
        """
        start, nbytes = address_of(memory), memory.nbytes
        for offset in range(0, nbytes, _BUFFER_BYTES_MAX):
            index, length = len(self._buffers), min(_BUFFER_BYTES_MAX, nbytes - offset)
            if index >= self._num_buffers_max:
                return
            where = struct.pack("=QQ", start + offset, length)
            place = ctypes.create_string_buffer(where, len(where))
            update = struct.pack("=IIQQII", index, 0, ctypes.addressof(place), 0, 1, 0)
            try:
                self._register(_UPDATE_BUFFERS, update, len(update))
            except OSError as error:  # RLIMIT_MEMLOCK, above all
                _logger.info("memory not registered with io_uring: %s", error.strerror)
                return
            self._registered.append(memory)
            self._buffers = sorted(
                [*self._buffers, (start + offset, start + offset + length, index)]
            )

    def _register(self, what: int, argument: bytes, count: int) -> None:
        _call(_REGISTER, self._fd, what, argument, count)

    def _buffer_of(self, address: int, nbytes: int) -> int:
        """Return the index of the registered buffer around that memory, -1 for none."""
        at = bisect_right(self._buffers, (address, 1 << 64, 0)) - 1
        if at < 0 or address + nbytes > self._buffers[at][1]:
            return -1
        return self._buffers[at][2]

    # Requests and completions

    def push(
        self,
        number: int,
        operation: int,
        fd: int,
        file: int,
        offset: int,
        address: int,
        nbytes: int,
    ) -> None:
        """Queue a request. ``file``: what ``add_file`` gave for ``fd``; ``number`` comes back."""
        flags = self._flags
        buffer = self._buffer_of(address, nbytes)
        if buffer >= 0:
            operation = _FIXED.get(operation, operation)
        if file >= 0:
            flags, fd = flags | _FIXED_FILE, file
        tail = self._words[self._sq_tail]
        _SQE.pack_into(
            self._sqes,
            (tail & self._sq_mask) * 64,
            operation,
            flags,
            0,
            fd,
            offset,
            address,
            nbytes,
            _DATASYNC if operation == FSYNC else 0,
            number,
            max(buffer, 0),
            *(0, 0, 0, 0),
        )
        self._words[self._sq_tail] = (tail + 1) & 0xFFFFFFFF
        self.num_queued += 1
        assert self.num_queued <= self.depth

    def enter(self) -> None:
        """Hand what is queued to the kernel. What it cannot take now stays queued."""
        try:
            self.num_queued -= _call(_ENTER, self._fd, self.num_queued, 0, 0, None, 0)
            self.num_enters += 1
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EBUSY, errno.ENOMEM):
                raise

    def completions(self) -> Iterator[tuple[int, int]]:
        """Yield the number and the result, or minus the errno, of all that was completed."""
        # First, so that what is completed from now on makes the eventfd readable again.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.eventfd)
        head, tail = self._words[self._cq_head], self._words[self._cq_tail]
        self._fence()
        while head != tail:
            found = _CQE.unpack_from(self._ring, self._cqes + (head & self._cq_mask) * 16)
            head = (head + 1) & 0xFFFFFFFF
            self._words[self._cq_head] = head
            yield found

    def close(self) -> None:
        """Give the ring back. The kernel keeps what it needs for requests in flight."""
        self._words.release()
        self._ring.close()
        self._sqes.close()
        os.close(self._fd)
        os.close(self.eventfd)
        self._registered.clear()


class _Buffer(ctypes.Structure):
    # CPython's Py_buffer
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in ("shape", "strides", "suboffsets", "internal")),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_Buffer),)


def address_of(memory: memoryview) -> int:
    """Return where contiguous memory starts; it may be read-only, which from_buffer refuses."""
    buffer = _Buffer()
    _get_buffer(memory, buffer, 0)
    address = buffer.buf
    _release_buffer(buffer)
    return int(address or 0)


def _call(number: int, *arguments: object) -> int:
    while True:
        result = _libc.syscall(number, *arguments)
        if result >= 0:
            return int(result)
        if (error := ctypes.get_errno()) != errno.EINTR:
            raise OSError(error, os.strerror(error))


def _fence() -> Callable[[], object]:
    if platform.machine() in ("x86_64", "AMD64"):
        return lambda: None
    # membarrier, private and expedited; 16 says that this process will use it.
    number = 283
    _libc.syscall(number, 16, 0, 0)
    return lambda: _libc.syscall(number, 8, 0, 0)
