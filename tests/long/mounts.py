"""Small file systems that a test makes, fills, cuts the power of and takes away.

Mounting needs root and a loop device. It happens in a mount namespace of the test's own, so that
nobody else sees the mounts and none is left when the test dies.
"""

import fcntl
import os
import struct
import subprocess
import sys
import time
import uuid
from pathlib import Path

from tests.long.volatile_disk import VolatileDisk

_IN_OWN_NAMESPACE = "RESPKV_TEST_MOUNTS"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
# _IOR('X', 125, __u32) and its flag "do not even write the journal": linux/ext4.h
_SHUTDOWN = 2 << 30 | 4 << 16 | ord("X") << 8 | 125
_NO_LOG_FLUSH = struct.pack("=I", 2)
UNMOUNT_S = 20.0


def enter_own_namespace() -> None:
    """Run this program again in a mount namespace of its own, unless it is in one.

    Ends the program with a reason when that, or mounting, is not possible here.
    """
    if os.environ.get(_IN_OWN_NAMESPACE):
        return
    tried = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt && test -e /dev/loop-control"],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        sys.exit(
            f"cannot mount file systems here (root and loop devices are needed): {tried.stderr}"
        )
    os.environ[_IN_OWN_NAMESPACE] = "1"
    os.execvp("unshare", ["unshare", "--mount", sys.executable, "-m", _module(), *sys.argv[1:]])


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "start it with python -m"
    return spec.name


def run(*words: object) -> None:
    """Run a command. Raises AssertionError with what it said when it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"


class FileSystem:
    """A file system of ``nbytes`` in ``folder / "mounted"``: ext4 on a loop device, or tmpfs."""

    def __init__(self, folder: Path, kind: str, nbytes: int, image: Path | None = None) -> None:
        self.path = folder / "mounted"
        self.path.mkdir()
        self._kind = kind
        self._nbytes = nbytes
        self._image = image or folder / "image"
        if kind == "ext4":
            with self._image.open("wb") as file:
                file.truncate(nbytes)
            run("mkfs.ext4", "-q", "-F", "-m", 0, self._image)
        self.mount()

    def mount(self) -> None:
        """Mount it; ext4 plays its journal back, if the power was cut."""
        if self._kind == "ext4":
            run("mount", "-o", "loop", self._image, self.path)
        else:
            run("mount", "-t", "tmpfs", "-o", f"size={self._nbytes}", "none", self.path)

    def unmount(self) -> None:
        """Unmount it, as soon as nobody uses it any more."""
        deadline = time.monotonic() + UNMOUNT_S
        while subprocess.run(["umount", self.path], capture_output=True).returncode:
            assert time.monotonic() < deadline, f"{self.path} stays in use"
            time.sleep(0.02)

    def cut_power(self) -> None:
        """Stop it at once: what was not synced is lost, and everything fails until it is mounted."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Take away what it is on."""


class FileSystemOnVolatileDisk(FileSystem):
    """An ext4 on a disk whose cache is lost with the power."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self._disk = VolatileDisk(folder)
        super().__init__(folder, "ext4", nbytes, self._disk.path / "image")

    def mount(self) -> None:
        """Mount it, with the power on."""
        self._disk.switch_on()
        super().mount()

    def cut_power(self) -> None:
        """Let the disk lose much of what was not flushed, and fail every write from now on."""
        self._disk.cut()

    def close(self) -> None:
        """Take the disk away."""
        self._disk.close()


class BootId:
    """What the kernel says to identify this boot, as everybody in our namespace reads it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "boot_id"
        self.change()
        run("mount", "--bind", self._file, _BOOT_ID)

    def change(self) -> None:
        """Be another boot from now on."""
        self._file.write_text(f"{uuid.uuid4()}\n")


def check_that_a_cut_loses_what_was_not_synced(folder: Path) -> None:
    """Raises AssertionError if this machine's power cuts would prove nothing."""
    disk = FileSystem(folder, "ext4", 64 << 20)
    for name in ("synced", "unsynced"):
        with (disk.path / name).open("wb") as file:
            file.write(bytes(100_000))
            file.flush()
            if name == "synced":
                os.fsync(file.fileno())
    disk.cut_power()
    disk.unmount()
    disk.mount()
    synced, unsynced = disk.path / "synced", disk.path / "unsynced"
    assert synced.read_bytes() == bytes(100_000), "a synced file was lost"
    assert not unsynced.exists() or not unsynced.stat().st_size, "an unsynced file was kept"
    disk.unmount()
