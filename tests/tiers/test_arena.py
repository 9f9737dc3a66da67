"""The arena on the real kernel: names, locks, reserved space, prefaulting, closing."""

import contextlib
import fcntl
import gc
import mmap
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from respkv.errors import CacheError
from respkv.tiers import arena as arena_module
from respkv.tiers.arena import Arena, group_memory_available, memory_available

MIB = 1 << 20
CREATE = """
import resource, sys
from respkv.errors import CacheError
from respkv.tiers.arena import Arena
if sys.argv[3] != "-":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    arena = Arena.create(int(sys.argv[2]), path=sys.argv[1], hugepages=False)
except CacheError as error:
    print("refused:", error)
    sys.exit(3)
arena.view[:4] = b"mine"
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path() -> Iterator[str]:
    path = f"/dev/shm/respkv-test-{uuid4().hex}.arena"
    yield path
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def server(path: str) -> Iterator["subprocess.Popen[str]"]:
    """Run another process that owns the arena; killed at the end."""
    command = [sys.executable, "-c", CREATE, path, str(MIB), "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def create(path: str | None, nbytes: int = MIB, *, hugepages: bool = False) -> Arena:
    return Arena.create(nbytes, path=path, hugepages=hugepages)


@pytest.mark.parametrize("umask", [0, 0o022, 0o277, 0o777], ids=oct)
def test_the_file_is_for_its_owner_alone_whatever_the_umask(path: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        arena = create(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    arena.close()
    assert not os.path.exists(path)


def test_another_mapping_of_the_file_sees_the_same_bytes(path: str) -> None:
    arena = create(path)
    assert bytes(arena.view) == bytes(MIB)
    arena.view[5:10] = b"hello"
    with open(path, "rb") as file, mmap.mmap(file.fileno(), MIB, prot=mmap.PROT_READ) as mapped:
        assert mapped[5:10] == b"hello"
    arena.close()


def test_an_unnamed_arena_has_the_same_interface() -> None:
    arena = create(None, 5000)
    assert arena.path is None
    assert arena.nbytes == arena.view.nbytes == 8192
    assert (arena.view.format, arena.view.readonly, arena.view.c_contiguous) == ("B", False, True)
    arena.view[-1] = 7
    assert os.pread(arena.fd, 1, 8191) == b"\7"
    arena.close()


def test_all_space_is_reserved_at_start(path: str) -> None:
    for name in (path, None):
        arena = create(name, 3 * MIB)
        assert os.fstat(arena.fd).st_blocks * 512 >= 3 * MIB
        arena.close()


def test_the_file_of_a_dead_server_is_replaced(path: str) -> None:
    with server(path) as process:
        pass
    assert process.returncode == -signal.SIGKILL
    assert Path(path).read_bytes()[:4] == b"mine"
    arena = create(path)
    assert bytes(arena.view[:4]) == bytes(4)
    assert os.path.samestat(os.stat(path), os.fstat(arena.fd))
    arena.close()


def test_the_file_of_a_live_server_is_left_alone(path: str) -> None:
    with server(path):
        with pytest.raises(CacheError, match="belongs to a server that is running"):
            create(path)
        assert Path(path).read_bytes()[:4] == b"mine"


def test_a_reader_without_a_lock_does_not_keep_a_dead_servers_file(path: str) -> None:
    with server(path):
        reader = os.open(path, os.O_RDONLY)
    create(path).close()
    os.close(reader)


@pytest.mark.parametrize("kind", ["mode", "symlink", "folder"])
def test_what_is_no_arena_is_not_removed(path: str, tmp_path: Path, kind: str) -> None:
    if kind == "mode":
        Path(path).write_text("notes")
        os.chmod(path, 0o644)
    elif kind == "symlink":
        (tmp_path / "notes").write_text("notes")
        os.chmod(tmp_path / "notes", 0o600)
        os.symlink(tmp_path / "notes", path)
    else:
        os.mkdir(path)
    with pytest.raises(CacheError, match="no arena of ours"):
        create(path)
    if kind == "folder":
        os.rmdir(path)
    else:
        assert Path(path).read_text() == "notes"


def test_a_missing_folder_is_an_error_with_its_name() -> None:
    with pytest.raises(CacheError, match=r"/dev/shm/none-here/x\.arena: No such file"):
        create("/dev/shm/none-here/x.arena")


def test_servers_that_start_together_do_not_share_an_arena(path: str) -> None:
    Path(path).touch(0o600)
    os.chmod(path, 0o600)
    command = [sys.executable, "-c", CREATE, path, str(MIB), "-"]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    lines = [process.stdout.readline() for process in started if process.stdout]
    try:
        assert lines.count("ready\n") == 1
        assert all("belongs to a server" in line for line in lines if line != "ready\n")
        with open(path) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for process in started:
            process.communicate("")


def on_a_small_tmpfs(folder: Path, before: str, nbytes: int) -> "subprocess.CompletedProcess[str]":
    """Make an arena on a tmpfs of 5 MiB that only that process sees."""
    script = f'mount -t tmpfs -o size=5m none {folder} && cd {folder} && {before} && exec "$@"'
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs in a namespace")
    command = [*inside, sys.executable, "-c", CREATE, f"{folder}/x.arena", str(nbytes), "-"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        command, input="", env=environment, capture_output=True, text=True, check=False
    )


def test_a_full_tmpfs_is_an_error_that_names_the_figures_and_the_remedy(tmp_path: Path) -> None:
    done = on_a_small_tmpfs(tmp_path, "true", 6 * MIB)
    assert (done.returncode, done.stderr) == (3, "")
    assert "cannot reserve 6.0 MiB" in done.stdout
    assert "5.0 MiB free of 5.0 MiB; lower maxmemory or enlarge it" in done.stdout


def test_the_memory_of_a_dead_servers_file_is_used_for_the_new_one(tmp_path: Path) -> None:
    stale = "head -c 4194304 /dev/zero > x.arena && chmod 600 x.arena"
    done = on_a_small_tmpfs(tmp_path, stale, 4 * MIB)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")


def test_a_limit_on_file_sizes_is_an_error_that_leaves_no_file(path: str) -> None:
    command = [sys.executable, "-c", CREATE, path, str(4 * MIB), str(MIB)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert "cannot reserve 4.0 MiB" in done.stdout
    assert "ulimit -f" in done.stdout
    assert not os.path.exists(path)


def test_an_arena_larger_than_the_machine_is_refused_before_it_takes_memory(path: str) -> None:
    for name in (path, None):
        with pytest.raises(CacheError, match=r"needs 1073741824\.0 MiB, but only .* available"):
            create(name, 1 << 50)
    assert not os.path.exists(path)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory_available() <= total


def test_the_limit_of_every_control_group_above_counts(tmp_path: Path) -> None:
    inner = tmp_path / "pods" / "one"
    inner.mkdir(parents=True)
    for folder, limit in [(tmp_path / "pods", "1000"), (inner, "max")]:
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 100\nactive_file 50\n")
    assert group_memory_available(tmp_path, "pods/one") == [450]
    (inner / "memory.max").write_text("600\n")
    assert group_memory_available(tmp_path, "pods/one") == [50, 450]
    assert group_memory_available(tmp_path, "pods/unseen") == [450]
    assert group_memory_available(tmp_path, "") == []


@pytest.mark.parametrize("hugepages", [False, True])
@pytest.mark.parametrize("kernel", ["new", "before 6.1", "before 5.14"])
def test_prefault_changes_no_byte_and_leaves_no_fault_for_later(
    monkeypatch: pytest.MonkeyPatch, kernel: str, hugepages: bool
) -> None:
    # Advice that the running kernel does not know is answered as an old kernel answers.
    if kernel != "new":
        monkeypatch.setattr(arena_module, "_MADV_COLLAPSE", 9999)
    if kernel == "before 5.14":
        monkeypatch.setattr(arena_module, "_MADV_POPULATE_WRITE", 9999)
    arena = create(None, 66 * MIB, hugepages=hugepages)
    arena.view[MIB : MIB + 5] = b"hello"
    progress: list[int] = []
    arena.prefault(progress.append)
    assert progress == [64 * MIB, 66 * MIB]
    assert bytes(arena.view[MIB : MIB + 5]) == b"hello"
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for offset in range(0, arena.nbytes, 4096):
        arena.view[offset + 9] = 1
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    assert faults < 66 * MIB // 4096 // 20
    assert hugepages or not arena.hugepages or _shmem_hugepages_forced()
    arena.close()


def _shmem_hugepages_forced() -> bool:
    policy = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return policy.exists() and "[never]" not in policy.read_text()


def test_hugepages_are_reported_as_the_kernel_counts_them() -> None:
    arena = create(None, 8 * MIB, hugepages=True)
    assert not arena.hugepages
    arena.prefault()
    # The mapping's own entry: other tests of this process may have arenas, too.
    inode = os.fstat(arena.fd).st_ino
    _, _, entry = Path("/proc/self/smaps").read_text().partition(f" {inode} ")
    assert entry.lstrip().startswith("/memfd:respkv-arena")
    mapped_kib = int(entry.partition("ShmemPmdMapped:")[2].split()[0])
    assert arena.hugepages == (mapped_kib >= 4 * 1024)
    arena.close()


def test_prefault_stops_when_the_arena_is_closed() -> None:
    arena = create(None, 66 * MIB)
    progress: list[int] = []

    def close(done: int) -> None:
        progress.append(done)
        arena.close()

    arena.prefault(close)
    assert progress == [64 * MIB]


def test_views_outlive_close_and_the_memory_goes_with_the_last(path: str) -> None:
    arena = create(path)
    array = memoryview(arena.view[:8]).cast("Q")
    late = arena.view[100:200]
    arena.view[0] = 1
    fd = arena.fd
    inode = os.fstat(fd).st_ino
    arena.close()
    arena.close()
    assert not os.path.exists(path)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    late[:4] = b"late"
    assert (array[0], bytes(late[:4])) == (1, b"late")
    assert is_mapped(inode)
    del arena, array, late
    gc.collect()
    assert not is_mapped(inode)


def test_close_does_not_remove_a_name_that_has_become_somebody_elses(path: str) -> None:
    arena = create(path)
    os.unlink(path)
    Path(path).write_text("notes")
    arena.close()
    assert Path(path).read_text() == "notes"


def is_mapped(inode: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any("/dev/shm/" in line and line.split()[4] == str(inode) for line in lines)


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        create(None, 0)
