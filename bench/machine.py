"""What the figures were measured on."""

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import respkv
from bench.fio import fio_version, is_direct

PACKAGES = ("uvloop", "hiredis", "anyio", "xxhash", "numpy", "torch")


def describe(folder: Path) -> dict[str, str]:
    """Return the hardware, the kernel, the versions and the date, in words.

    folder: where files are measured.
    """
    redis = subprocess.run(["redis-server", "--version"], capture_output=True, text=True).stdout
    files = {"files": _file_system(folder)}
    peers = {
        "redis-server": redis.partition(" v=")[2].partition(" ")[0],
        "fio": fio_version(),
    }
    return hardware() | files | load() | peers | software(PACKAGES)


def hardware() -> dict[str, str]:
    """Return the date, the machine and its kernel."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / (1 << 20):.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
    }


def load() -> dict[str, str]:
    """Return what else the machine does, and what is measured."""
    return {
        "load average at start": " ".join(f"{each:.2f}" for each in os.getloadavg()),
        "respkv": respkv.__version__,
    }


def software(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of packages."""
    return {
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def _file_system(folder: Path) -> str:
    """Return the type of the file system and the device under it."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = {str(folder.resolve()), *map(str, folder.resolve().parents)}
    device, _, kind = max(
        (each[:3] for each in mounts if each[1] in above), key=lambda each: len(each[1])
    )
    cache = "" if is_direct(folder) else ", through the page cache"
    return f"{kind} on {device}{cache}"


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"
