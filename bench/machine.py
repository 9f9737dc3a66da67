"""What the figures were measured on."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import respkv

PACKAGES = ("uvloop", "hiredis", "anyio", "xxhash", "numpy", "torch")


def describe() -> dict[str, str]:
    """Return the hardware, the kernel, the versions and the date, in words."""
    load = " ".join(f"{each:.2f}" for each in os.getloadavg())
    redis = subprocess.run(["redis-server", "--version"], capture_output=True, text=True).stdout
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / (1 << 20):.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "load average at start": load,
        "respkv": respkv.__version__,
        "redis-server": redis.partition(" v=")[2].partition(" ")[0],
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"
