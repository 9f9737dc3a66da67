"""What the rows of the file tiers share: their sizes, and servers that keep files."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.load import Load
from bench.servers import BenchError, Server, respkv_server

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class FileScale:
    """How much work is done in files.

    file_bytes:  of the file that blocks are read from and written to; turn_bytes: in one measurement.
    restart_*:   the pages that a server finds when it starts, and those that it had no time for.
    cold_*:      the pages that are in files alone, by size, and the bytes of all.
    mixed_*:     memory and files of a server, its pages, how many are asked for, steps of one turn.
    """

    file_bytes: int = 2 * GIB
    turn_bytes: int = 512 * MIB
    block_bytes: tuple[int, ...] = (64 << 10, MIB, 16 * MIB)
    depths: tuple[int, ...] = (1, 8, 32)
    restart_pages: int = 100_000
    restart_new_pages: int = 1_000
    restart_page_bytes: int = 64 << 10
    cold_page_bytes: tuple[int, ...] = (MIB, 4 * MIB)
    cold_set_bytes: int = GIB
    mixed_memory_bytes: int = 256 * MIB
    mixed_file_bytes: int = 1536 * MIB
    mixed_page_bytes: int = MIB
    mixed_pages: int = 1024
    mixed_steps: int = 800


FILES = FileScale()
QUICK_FILES = FileScale(
    file_bytes=8 * MIB,
    turn_bytes=MIB,
    block_bytes=(64 << 10, MIB),
    depths=(1, 2),
    restart_pages=200,
    restart_new_pages=20,
    restart_page_bytes=16 << 10,
    cold_page_bytes=(MIB,),
    cold_set_bytes=8 * MIB,
    mixed_memory_bytes=16 * MIB,
    mixed_file_bytes=128 * MIB,
    mixed_page_bytes=128 << 10,
    mixed_pages=256,
    mixed_steps=50,
)


@contextmanager
def tier_folder(folder: Path) -> Iterator[Path]:
    """Make a directory for a file tier, which goes with all that is in it."""
    with tempfile.TemporaryDirectory(prefix="bench-nvme-", dir=folder) as name:
        yield Path(name)


def file_server(maxmemory: int, path: Path, nbytes: int, **settings: str | int) -> Server:
    """Return a respkv server, not started yet, that keeps up to ``nbytes`` of files in ``path``."""
    settings = {"shutdown_timeout": 60, **settings}
    return respkv_server(maxmemory, nvme_path=str(path), nvme_bytes=nbytes, **settings)


def tier_counts(server: Server) -> dict[str, int]:
    """Return the counters of the nvme tier."""
    with Load(server.unix) as load:
        text = load.ask_bulk("INFO")
    fields = dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)
    nvme = {name: value for name, value in fields.items() if name.startswith("kv_nvme_")}
    counts = {name: int(value) for name, value in nvme.items() if value.isdigit()}
    if not counts:
        raise BenchError(f"{server.name} says nothing of its nvme tier")
    return counts
