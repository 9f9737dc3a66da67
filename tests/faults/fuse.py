"""A file system that passes everything through to a directory, but for the faults in a table.

``python -m tests.faults.fuse SOURCE MOUNT TABLE`` mounts it and serves until it is unmounted or
killed; table.py lays out the table, ``mounted`` below is the front. It speaks the kernel's FUSE
protocol by itself, so it needs /dev/fuse and the right to mount (root), and no library. Unlike
the preload library it reaches io_uring, whatever the process under test is.

Every read and write of a program arrives here as such: files are opened for direct I/O, nothing is
cached. A dropped read gives zeros. Calls io_uring and rename faults by errno work as there; a call
that the program does not make, but the kernel, may be hit too: closing is never one of them.
"""

import ctypes
import errno
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.faults.table import Call, Faults, Rule, Table, lay_out

THREADS = 96  # more than the server ever has in flight: what hangs must not stop the rest
MAX_WRITE_BYTES = 1 << 20
PLACE_BYTES = 4096
ROOT = 1
MOUNT_S = 10.0

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_INIT = struct.Struct("<IIIIHHIIHHII24x")
_IO = struct.Struct("<QQIIQII")
_SETATTR = struct.Struct("<IIQQ")
_STATFS = struct.Struct("<QQQQQIIII24x")
_DIRENT = struct.Struct("<QQII")
_INIT_FLAGS = 1 << 0 | 1 << 5 | 1 << 15 | 1 << 18 | 1 << 22  # async, big, parallel, max_pages
_DIRECT_IO, _PARALLEL_WRITES = 1 << 0, 1 << 6
_SIZE_IS_SET, _MODE_IS_SET, _FILE_IS_GIVEN = 1 << 3, 1 << 0, 1 << 6
_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Request(NamedTuple):
    """What the kernel asks: of which node, and what follows the head."""

    node: int
    body: bytes


class PassThrough:
    """The nodes and the answers. An answer is bytes; an OSError is sent as such.

    Paths are relative to the source; the root's is "".
    """

    def __init__(self, source: Path, table: Table) -> None:
        self._source = source
        self._table = table
        self._lock = threading.Lock()
        self._paths = {ROOT: ""}
        self._nodes = {"": ROOT}
        self._next_node = ROOT + 1
        self._open_nodes: dict[int, int] = {}  # by open file
        self.answers: dict[int, Callable[[Request], bytes]] = {
            1: self._lookup,
            3: self._getattr,
            4: self._setattr,
            9: self._mkdir,
            10: self._unlink,
            11: self._rmdir,
            12: self._rename,
            14: self._open,
            15: self._read,
            16: self._write,
            17: self._statfs,
            18: self._release,
            20: self._sync,
            25: lambda request: b"",  # flush: a descriptor was closed
            26: self._init,
            27: lambda request: bytes(16),
            28: self._readdir,
            29: lambda request: b"",
            30: lambda request: b"",
            35: self._create,
            43: self._allocate,
            45: lambda request: self._rename(Request(request.node, _without_flags(request.body))),
        }

    # Nodes

    def _init(self, request: Request) -> bytes:
        pages = MAX_WRITE_BYTES // PLACE_BYTES
        return _INIT.pack(
            7, 31, MAX_WRITE_BYTES, _INIT_FLAGS, 512, 384, MAX_WRITE_BYTES, 1, pages, 0, 0, 0
        )

    def _path(self, node: int) -> Path:
        with self._lock:
            return self._source / self._paths[node]

    def _target(self, node: int) -> Path | int:
        """Return where a node is: its path, or when it has lost its name, an open file of it."""
        with self._lock:
            path = self._paths[node]
            if self._nodes.get(path) == node:
                return self._source / path
            files = [file for file, other in self._open_nodes.items() if other == node]
        if not files:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return files[0]

    def _child(self, request: Request, skip: int = 0) -> str:
        name = request.body[skip:].split(b"\0")[0].decode()
        with self._lock:
            return os.path.join(self._paths[request.node], name)

    def _node(self, path: str) -> int:
        with self._lock:
            if path not in self._nodes:
                self._nodes[path] = self._next_node
                self._paths[self._next_node] = path
                self._next_node += 1
            return self._nodes[path]

    def _entry(self, path: str) -> bytes:
        attributes = _attributes(os.lstat(self._source / path))
        return struct.pack("<QQQQII", self._node(path), 0, 0, 0, 0, 0) + attributes

    def _lookup(self, request: Request) -> bytes:
        return self._entry(self._child(request))

    def _getattr(self, request: Request) -> bytes:
        flags, _, file = struct.unpack_from("<IIQ", request.body)
        status = os.stat(file if flags & 1 else self._target(request.node))
        return bytes(16) + _attributes(status)

    def _setattr(self, request: Request) -> bytes:
        valid, _, file, nbytes = _SETATTR.unpack_from(request.body)
        target = file if valid & _FILE_IS_GIVEN else self._target(request.node)
        if valid & _SIZE_IS_SET:
            self._suffer("truncate", self._paths[request.node])
            os.truncate(target, nbytes)
        if valid & _MODE_IS_SET:
            os.chmod(target, struct.unpack_from("<I", request.body, 68)[0] & 0o7777)
        return bytes(16) + _attributes(os.stat(target))

    def _mkdir(self, request: Request) -> bytes:
        path = self._child(request, 8)
        os.mkdir(self._source / path, struct.unpack_from("<I", request.body)[0])
        return self._entry(path)

    def _unlink(self, request: Request) -> bytes:
        path = self._child(request)
        self._suffer("remove", path)
        os.unlink(self._source / path)
        self._forget(path)
        return b""

    def _rmdir(self, request: Request) -> bytes:
        path = self._child(request)
        os.rmdir(self._source / path)
        self._forget(path)
        return b""

    def _forget(self, path: str) -> None:
        with self._lock:
            self._nodes.pop(path, None)  # the node keeps its path: it may still be open

    def _rename(self, request: Request) -> bytes:
        folder = struct.unpack_from("<Q", request.body)[0]
        name, new_name = request.body[8:].split(b"\0")[:2]
        path = self._child(Request(request.node, name))
        new_path = self._child(Request(folder, new_name))
        self._suffer("rename", new_path)
        os.rename(self._source / path, self._source / new_path)
        with self._lock:
            node = self._nodes.pop(path)
            self._nodes[new_path] = node
            self._paths[node] = new_path
        return b""

    # Files

    def _open(self, request: Request) -> bytes:
        flags = struct.unpack_from("<I", request.body)[0]
        return self._opened(self._paths[request.node], flags, 0)

    def _create(self, request: Request) -> bytes:
        flags, mode = struct.unpack_from("<II", request.body)
        path = self._child(request, 16)
        opened = self._opened(path, flags | os.O_CREAT, mode)
        return self._entry(path) + opened

    def _opened(self, path: str, flags: int, mode: int) -> bytes:
        self._suffer("open", path)
        wanted = flags & ~(os.O_DIRECT | os.O_NOFOLLOW) | os.O_CLOEXEC
        file = os.open(self._source / path, wanted, mode & 0o7777)
        self._open_nodes[file] = self._node(path)
        return struct.pack("<QIi", file, _DIRECT_IO | _PARALLEL_WRITES, 0)

    def _release(self, request: Request) -> bytes:
        file = struct.unpack_from("<Q", request.body)[0]
        with self._lock:
            del self._open_nodes[file]
        os.close(file)
        return b""

    def _read(self, request: Request) -> bytes:
        file, at, nbytes, *_ = _IO.unpack_from(request.body)
        rule = self._suffer("read", self._name(file))
        match rule and rule.kind:
            case "short":
                return os.pread(file, _half(nbytes) or nbytes, at)
            case "torn":
                part = os.pread(file, _half(nbytes), at)
                return part + bytes(min(nbytes, os.fstat(file).st_size - at) - len(part))
            case "dropped":
                return bytes(nbytes)
            case "misdirected":
                return os.pread(file, nbytes, _elsewhere(file, at, nbytes))
            case "flip":
                return _flipped(os.pread(file, nbytes, at))
        return os.pread(file, nbytes, at)

    def _write(self, request: Request) -> bytes:
        file, at, nbytes, *_ = _IO.unpack_from(request.body)
        data = request.body[_IO.size : _IO.size + nbytes]
        rule = self._suffer("write", self._name(file))
        match rule and rule.kind:
            case "short":
                nbytes = os.pwrite(file, data[: _half(nbytes) or nbytes], at)
            case "torn":
                os.pwrite(file, data[: _half(nbytes)], at)
            case "dropped":
                pass
            case "misdirected":
                if (place := _elsewhere(file, at, nbytes)) != at:
                    os.pwrite(file, data, place)
            case "flip":
                os.pwrite(file, _flipped(data), at)
            case _:
                nbytes = os.pwrite(file, data, at)
        return struct.pack("<II", nbytes, 0)

    def _sync(self, request: Request) -> bytes:
        file, only_data = struct.unpack_from("<QI", request.body)
        if self._suffer("sync", self._name(file)) is None:
            (os.fdatasync if only_data else os.fsync)(file)
        return b""

    def _allocate(self, request: Request) -> bytes:
        file, at, nbytes, mode = struct.unpack_from("<QQQI", request.body)
        self._suffer("allocate", self._name(file))
        if mode:
            raise OSError(errno.EOPNOTSUPP, "")
        os.posix_fallocate(file, at, nbytes)
        return b""

    def _readdir(self, request: Request) -> bytes:
        _, at, nbytes, *_ = _IO.unpack_from(request.body)
        found = b""
        for index, name in enumerate(sorted(os.listdir(self._path(request.node)))):
            encoded = name.encode()
            entry = _DIRENT.pack(index + 100, index + 1, len(encoded), 0) + encoded
            entry += bytes(-len(entry) % 8)
            if index >= at and len(found) + len(entry) <= nbytes:
                found += entry
            elif index >= at:
                break
        return found

    def _statfs(self, request: Request) -> bytes:
        s = os.statvfs(self._source)
        return _STATFS.pack(
            *(s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree),
            *(s.f_bsize, s.f_namemax, s.f_frsize, 0),
        )

    def _name(self, file: int) -> str:
        return self._paths[self._open_nodes[file]]

    def _suffer(self, call: Call, path: str) -> Rule | None:
        """Take the time and raise the error of the rules that hit a call, or return the one left."""
        with self._lock:
            hits = self._table.hit(call, path)
        for rule in hits:
            if rule.kind == "slow":
                time.sleep(rule.delay_s)
            while rule.kind == "hang" and self._table.is_active(rule):
                time.sleep(0.001)
        others = [rule for rule in hits if rule.kind not in ("slow", "hang")]
        if others and others[0].kind == "error":
            raise OSError(others[0].code, os.strerror(others[0].code))
        return others[0] if others else None


def serve(device: int, files: PassThrough) -> None:
    """Answer requests until the file system is unmounted; one of several threads."""
    while True:
        try:
            message = os.read(device, MAX_WRITE_BYTES + PLACE_BYTES)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # the asker went away
                continue
            return
        _, opcode, unique, node, *_ = _IN.unpack_from(message)
        if opcode in (2, 36, 42):  # forget, interrupt, forget many: no answer is wanted
            continue
        answer = files.answers.get(opcode)
        data, code = b"", errno.ENOSYS
        if answer:
            try:
                data, code = answer(Request(node, message[_IN.size :])), 0
            except OSError as error:
                code = error.errno or errno.EIO
        with suppress(FileNotFoundError):  # the asker went away
            os.write(device, _OUT.pack(_OUT.size + len(data), -code, unique) + data)


def _attributes(s: os.stat_result) -> bytes:
    times = (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)
    return _ATTR.pack(
        *(s.st_ino, s.st_size, s.st_blocks, *(each // 10**9 for each in times)),
        *(each % 10**9 for each in times),
        *(s.st_mode, s.st_nlink, s.st_uid, s.st_gid, 0, PLACE_BYTES, 0),
    )


def _without_flags(body: bytes) -> bytes:
    return body[:8] + body[16:]


def _half(nbytes: int) -> int:
    return nbytes // 2 // PLACE_BYTES * PLACE_BYTES


def _flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    bit = int.from_bytes(os.urandom(8), "little") % (8 * max(1, len(data)))
    if changed:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _elsewhere(file: int, at: int, nbytes: int) -> int:
    places = (os.fstat(file).st_size - nbytes) // PLACE_BYTES + 1
    others = [place * PLACE_BYTES for place in range(max(0, places)) if place * PLACE_BYTES != at]
    return others[at // PLACE_BYTES * 7 % len(others)] if others else at


def _mount(device: int, target: Path) -> None:
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    if _libc.mount(b"faulty", os.fsencode(target), b"fuse", 0, options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def _unmount(target: Path) -> None:
    _libc.umount2(os.fsencode(target), _DETACH)


def can_mount() -> bool:
    """Say whether this process may mount a FUSE file system."""
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
        os.close(device)
    except OSError:
        return False
    status = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0]
    return bool(int(status, 16) >> 21 & 1)  # CAP_SYS_ADMIN


@contextmanager
def mounted(source: Path, target: Path) -> Iterator[Faults]:
    """Mount the source onto the target, both existing directories; yield its faults.

    What it stores lies in the source all the time, whatever happens to the file system.
    """
    with lay_out(target) as (control, faults):
        command = [sys.executable, "-m", "tests.faults.fuse", source, target, control]
        process = subprocess.Popen([str(word) for word in command])
        try:
            deadline = time.monotonic() + MOUNT_S
            while not os.path.ismount(target):
                assert process.poll() is None, "the file system was not mounted"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield faults
        finally:
            faults.heal()
            _unmount(target)
            process.terminate()
            process.wait()


def main() -> None:
    """Mount and serve."""
    source, target, control = (Path(word) for word in sys.argv[1:])
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    with control.open("r+b") as file, mmap.mmap(file.fileno(), 0) as table:
        files = PassThrough(source, Table(table))
        _mount(device, target)
        threads = [
            threading.Thread(target=serve, args=(device, files), daemon=True)
            for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
