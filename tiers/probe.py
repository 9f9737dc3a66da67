"""Which engine can read and write here: tried at start, not guessed."""

import errno
import logging
import os
from pathlib import Path
from typing import Literal

import anyio

from respkv.errors import TierError
from respkv.tiers.aio import AioDevice
from respkv.tiers.claim import Opened, open_directory
from respkv.tiers.directory import Directory
from respkv.tiers.pool import PoolDevice
from respkv.tiers.ring import RingDevice

_REASONS = {
    errno.ENOSYS: "this kernel has none, or the container hides it",
    errno.EPERM: "forbidden here (kernel.io_uring_disabled, or the container's seccomp)",
    errno.EACCES: "forbidden here (a security module)",
    errno.ENOMEM: "no locked memory left (ulimit -l)",
}

_logger = logging.getLogger(__name__)


async def open_device(
    path: Path | str, engine: Literal["auto", "io_uring", "threads", "aiofiles"], depth: int
) -> Directory:
    """Take a directory and return a Device for it. ``auto`` is io_uring, or else threads.

    depth: the most reads and writes at a time.
    Raises TierError when another process has it, or when it or the engine cannot be had.
    """
    opened = await anyio.to_thread.run_sync(_open, Path(path), engine != "aiofiles")
    if engine == "aiofiles":
        return AioDevice(opened, depth)
    if engine == "threads":
        return PoolDevice(opened, depth)
    try:
        return RingDevice(opened, depth)
    except OSError as error:
        reason = f"io_uring: {_REASONS.get(error.errno or 0, error.strerror)}"
        if engine == "io_uring":
            os.close(opened.lock_fd)
            raise TierError(f"{path}: {reason}") from error
        _logger.warning("%s: threads read and write here; %s", path, reason)
        device = PoolDevice(opened, depth)
        device.fallback_reason = reason
        return device


def _open(path: Path, want_direct: bool) -> Opened:
    return open_directory(path, want_direct=want_direct)
