"""Taking a directory for one tier of one process, and touching nothing that is not the tier's.

A path is easily mistyped. So a directory without a superblock has to be empty, but for what a crash
of the very first start may leave; what is deleted is only what we make under a temporary name.
"""

import contextlib
import errno
import fcntl
import logging
import mmap
import os
from pathlib import Path
from typing import NamedTuple

from respkv.errors import TierError
from respkv.tiers.checkpoint import CHECKPOINT_NAMES
from respkv.tiers.segment_head import segment_id_of
from respkv.tiers.superblock import SUPERBLOCK_NAME

LOCK = "lock"
TEMPORARY = ".tmp"
_PROBE = "probe" + TEMPORARY
_REPLACED = (SUPERBLOCK_NAME, "schemas.json", "run", "probe")  # made under a temporary name
_NEUTRAL = {LOCK, "lost+found"}  # may be in an otherwise empty directory
_DIRECT_BYTES = 4096

_logger = logging.getLogger(__name__)


class Opened(NamedTuple):
    """A directory that is ours until ``lock_fd`` is closed."""

    path: Path
    lock_fd: int
    is_direct: bool


def open_directory(path: Path, *, want_direct: bool) -> Opened:
    """Make a directory if it is missing, and take it for this process. Blocks.

    Deletes what a crash left half replaced, and nothing else. Raises TierError when another process
    has it, when it holds other files, or when files cannot be made there.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_is_ours(path)
        lock_fd = _lock(path / LOCK)
    except OSError as error:
        raise TierError(f"{path} cannot hold files: {error.strerror}") from error
    try:
        for stray in _half_replaced(path):
            stray.unlink()
        is_direct = want_direct and _is_direct(path / _PROBE)
    except OSError as error:
        os.close(lock_fd)
        raise TierError(f"{path} cannot hold files: {error.strerror}") from error
    if want_direct and not is_direct:
        _logger.warning("%s: no O_DIRECT here, so reads and writes go through the cache", path)
    return Opened(path, lock_fd, is_direct)


def _check_is_ours(path: Path) -> None:
    """Raise TierError for a directory of other files; nothing in it has been touched yet."""
    names = set(os.listdir(path))
    if SUPERBLOCK_NAME in names:
        return
    foreign = sorted(names - _NEUTRAL - {stray.name for stray in _half_replaced(path)})
    if not foreign:
        return
    is_left_over = any(
        name in CHECKPOINT_NAMES or segment_id_of(name) is not None for name in foreign
    )
    what = "has no superblock but other files of a tier" if is_left_over else "holds other files"
    raise TierError(f"{path} {what} ({foreign[0]}): give the tier a directory of its own")


def _half_replaced(path: Path) -> list[Path]:
    found = [path / (name + TEMPORARY) for name in _REPLACED]
    return [each for each in found if not each.is_symlink() and each.is_file()]


def _lock(path: Path) -> int:
    # The file stays: to delete it would let two processes lock two files of this name.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    except BlockingIOError as error:
        owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise TierError(
            f"{path.parent} is in use by process {owner}; stop it or choose another directory"
        ) from error
    except OSError:
        os.close(fd)
        raise
    return fd


def _is_direct(path: Path) -> bool:
    # Opening is not enough: some file systems refuse the first transfer. A full one refuses the
    # write for another reason, and an empty file can still be read.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT | os.O_NOFOLLOW
    page = mmap.mmap(-1, _DIRECT_BYTES)
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    try:
        with contextlib.suppress(_NoSpace):
            _transfer_page(fd, page)
        os.preadv(fd, [page], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        os.close(fd)
        path.unlink()
    return True


class _NoSpace(Exception):
    pass


def _transfer_page(fd: int, page: mmap.mmap) -> None:
    try:
        os.pwritev(fd, [page], 0)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _NoSpace from error
        raise
