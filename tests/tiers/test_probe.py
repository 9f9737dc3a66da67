"""What is chosen where the kernel or the container refuses something. Each in its own process."""

import errno
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.tiers.test_devices import WHY_NO_RING

ROOT = Path(__file__).parent.parent.parent
OPENAT = {"x86_64": 257, "aarch64": 56}
IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427
HEAD = """
import anyio, errno, logging, mmap, os, resource, sys
from respkv.errors import TierError
from respkv.tiers.device import Write
from respkv.tiers.probe import open_device
from tests.tiers import seccomp
logging.basicConfig(level="INFO", stream=sys.stdout)
path, arena = sys.argv[1], memoryview(mmap.mmap(-1, 8 << 20))
page = arena[:4096]
page[:] = b"x" * 4096
async def work(engine):
    device = await open_device(path, engine, 4)
    device.register(arena)
    await device.create("s", 8192)
    await device.write("s", [Write(4096, page)])
    await device.sync("s")
    found = memoryview(mmap.mmap(-1, 8192))
    await device.read("s", 0, found)
    assert found == bytes(4096) + b"x" * 4096
    await device.remove("s")
    await device.close()
    print(device.engine, device.is_direct, device.fallback_reason, sep="|")
"""
needs_ring = pytest.mark.skipif(bool(WHY_NO_RING), reason=WHY_NO_RING)


def run(path: Path, code: str) -> str:
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", HEAD + code, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("call", "code", "reason"),
    [
        (IO_URING_SETUP, errno.ENOSYS, "this kernel has none"),
        (IO_URING_SETUP, errno.EPERM, "forbidden here"),
        (IO_URING_SETUP, errno.ENOMEM, "no locked memory left"),
        (IO_URING_SETUP, errno.EMFILE, "Too many open files"),
        (IO_URING_ENTER, errno.EPERM, "forbidden here"),
    ],
)
def test_a_refused_ring_means_threads(tmp_path: Path, call: int, code: int, reason: str) -> None:
    shown = run(tmp_path, f"seccomp.refuse({call}, {code})\nanyio.run(work, 'auto')")
    assert "threads|" in shown
    assert reason in shown.splitlines()[-1]
    assert "WARNING" in shown


def test_a_ring_that_was_asked_for_by_name_is_an_error(tmp_path: Path) -> None:
    shown = run(
        tmp_path,
        f"""
seccomp.refuse({IO_URING_SETUP}, errno.ENOSYS)
for _ in range(2):
    try:
        anyio.run(work, 'io_uring')
    except TierError as error:
        print(error)
""",
    )
    assert shown.count("io_uring: this kernel has none") == 2


@needs_ring
def test_a_ring_without_its_tables_works(tmp_path: Path) -> None:
    """Registering the eventfd (4) must work; files (2) and buffers (15) need not."""
    for tables in (2, 15, 15 | 2):
        shown = run(
            tmp_path,
            f"""
for table in (2, 15):
    if {tables} & table == table:
        seccomp.refuse_equal({IO_URING_REGISTER}, errno.EINVAL, argument=1, value=table)
anyio.run(work, 'io_uring')
""",
        )
        assert shown.splitlines()[-1].startswith("io_uring|")


@needs_ring
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without rights")
@pytest.mark.parametrize(
    ("limit_bytes", "engine", "message"),
    [(256 << 10, "io_uring", "memory not registered"), (0, "threads", "no locked memory left")],
)
def test_little_locked_memory_means_plain_reads_and_writes_and_none_threads(
    limit_bytes: int, engine: str, message: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        Path(folder).chmod(0o777)
        shown = run(
            Path(folder),
            f"""
anyio.run(anyio.to_thread.run_sync, os.getpid)  # import while all may be read
resource.setrlimit(resource.RLIMIT_MEMLOCK, ({limit_bytes}, {limit_bytes}))
os.setuid(65534)
anyio.run(work, 'auto')
""",
        )
    assert message in shown
    assert shown.splitlines()[-1].startswith(f"{engine}|")


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_no_o_direct_means_the_page_cache_and_a_warning(tmp_path: Path, engine: str) -> None:
    number = OPENAT[platform.machine()]
    shown = run(
        tmp_path,
        f"""
seccomp.refuse({number}, errno.EINVAL, argument=2, bits=os.O_DIRECT)
anyio.run(work, '{engine}')
""",
    )
    assert "no O_DIRECT here" in shown
    assert "|False|" in shown
    assert os.listdir(tmp_path) == ["lock"]


def test_a_path_that_cannot_hold_files_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shown = run(
        tmp_path / "file" / "below",
        """
try:
    anyio.run(work, 'auto')
except TierError as error:
    print(error)
""",
    )
    assert "below cannot hold files: Not a directory" in shown


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    wait = "import time\nasync def hold():\n    await open_device(path, 'auto', 4)\n"
    wait += "    print('held', flush=True)\n    time.sleep(60)\nanyio.run(hold)"
    command = [sys.executable, "-c", HEAD + wait, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        while "held" not in holder.stdout.readline():
            assert holder.poll() is None
        refused = run(
            tmp_path,
            "try:\n    anyio.run(work, 'auto')\nexcept TierError as error:\n    print(error)",
        )
        assert f"in use by process {holder.pid}" in refused
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert "|" in run(tmp_path, "anyio.run(work, 'auto')")
