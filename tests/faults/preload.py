"""Faults in the files of one directory, for a process that runs: the front of preload.c.

    with faults(directory) as disk:
        server = ServerProcess(environment=disk.environment, nvme_path=directory, ...)
        disk.set("error", "sync", code=errno.EIO)

table.py says what can be set. What goes through io_uring is not seen: the process must use threads.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.table import Faults, lay_out

COMPILER = shutil.which("cc") or shutil.which("gcc")
_SOURCE = Path(__file__).with_name("preload.c")


@contextmanager
def faults(directory: Path) -> Iterator[Faults]:
    """Build the library, and yield the faults of one directory, which need not exist yet."""
    assert COMPILER is not None
    with lay_out(directory) as (table, disk), tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "preload.so")
        command = [COMPILER, "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", library, _SOURCE, "-ldl"], check=True)
        disk.environment = {"LD_PRELOAD": str(library), "RESPKV_FAULTS": str(table)}
        yield disk
