"""fio, the load generator that block devices are measured with: what a device gives to a C program."""

import functools
import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bench.result import size
from bench.servers import BenchError

TIMEOUT_S = 120
# The order of preference: a container may refuse io_uring.
ENGINES = ("io_uring", "libaio")
_FILL_BYTES = 1 << 20

Word: TypeAlias = Literal["read", "write"]
WORDS: tuple[Word, ...] = ("read", "write")


@dataclass(frozen=True, slots=True)
class Job:
    """Blocks read or written at random places of a file, ``depth`` of them at a time, past the page cache.

    count: of blocks in one measurement.
    """

    file: Path
    file_bytes: int
    word: Word
    block_bytes: int
    depth: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.word} {size(self.block_bytes)}, depth {self.depth}"


class Fio:
    """One job, by fio. Raises BenchError when it cannot be done."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def measure(self) -> float:
        """Return the seconds that one block took, by fio's own clock: its start does not count."""
        job = self._job
        done = _fio(
            *(f"--filename={job.file}", f"--size={job.file_bytes}", f"--rw=rand{job.word}"),
            *(f"--bs={job.block_bytes}", f"--iodepth={job.depth}", f"--ioengine={engine()}"),
            *(f"--io_size={job.block_bytes * job.count}", "--norandommap"),
            f"--direct={is_direct(job.file.parent):d}",
            *("--randrepeat=0", "--fallocate=none", "--allow_file_create=0"),
        )[job.word]
        if done["total_ios"] != job.count:
            raise BenchError(f"fio did {done['total_ios']} of {job.count} blocks: {job.name}")
        # In whole milliseconds: a measurement takes hundreds of them.
        return max(float(done["runtime"]), 1.0) / 1000 / job.count


@contextmanager
def filled_file(folder: Path, nbytes: int) -> Iterator[Path]:
    """Make a file of which every block has been written, so that no write has to allocate one."""
    path = folder / "bench.blocks"
    try:
        _fio(
            *(f"--filename={path}", f"--size={nbytes}", "--rw=write", f"--bs={_FILL_BYTES}"),
            *("--iodepth=16", f"--ioengine={engine()}", "--end_fsync=1"),
            f"--direct={is_direct(folder):d}",
        )
        yield path
    finally:
        path.unlink(missing_ok=True)


@functools.cache
def engine() -> str:
    """Return the best way to the device that fio can take here."""
    if shutil.which("fio") is None:
        raise BenchError("fio is missing: apt-get install fio")
    for name in ENGINES:
        command = ["fio", "--name=probe", "--filename=/dev/zero", "--rw=read", "--size=4k"]
        if subprocess.run([*command, f"--ioengine={name}"], capture_output=True).returncode == 0:
            return name
    raise BenchError("fio can use neither io_uring nor libaio here")


@functools.cache
def is_direct(folder: Path) -> bool:
    """Say whether files of a folder can be read and written past the page cache."""
    path = folder / "bench.probe"
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        except OSError:
            return False
        try:
            os.pwrite(fd, page, 0)
        except OSError:
            return False
        finally:
            os.close(fd)
            path.unlink()
    return True


def fio_version() -> str:
    """Return fio's version, nothing when it is not there."""
    if shutil.which("fio") is None:
        return "none"
    return subprocess.run(["fio", "--version"], capture_output=True, text=True).stdout.strip()


def _fio(*options: str) -> Any:
    command = ["fio", "--name=bench", "--output-format=json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    # What it warns of may stand before the JSON.
    start = done.stdout.find("{")
    if done.returncode != 0 or start < 0:
        raise BenchError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout[start:])["jobs"][0]
