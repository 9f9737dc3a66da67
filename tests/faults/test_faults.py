"""Each fault is seen by a small process, on its directory alone: through the library and FUSE."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fuse import can_mount, mounted
from tests.faults.preload import COMPILER, faults
from tests.faults.table import Call, Faults, Kind

WAYS = [
    pytest.param(
        "preload", marks=pytest.mark.skipif(COMPILER is None, reason="no C compiler"), id="preload"
    ),
    pytest.param(
        "fuse", marks=pytest.mark.skipif(not can_mount(), reason="may not mount"), id="fuse"
    ),
]

A = 4096
RIGHT = b"".join(bytes([index + 1]) * A for index in range(8))

# Runs one statement of its own after another, and says what came of each: a process under test
# that lives through changes of the table.
CHILD = """
import ctypes, mmap, os, sys
folder = sys.argv[1]
name = os.path.join(folder, "f")
f = os.open(name, os.O_RDWR)
folder_fd = os.open(folder, os.O_RDONLY)
buffer = mmap.mmap(-1, 8 * 4096)
def fill(byte):
    buffer[:] = b"".join(bytes([byte + index]) * 4096 for index in range(8))
    return buffer
for line in sys.stdin:
    try:
        print("ok", repr(eval(line)), flush=True)
    except OSError as error:
        print("error", error.errno, flush=True)
"""


class Child:
    """The process; ``ask`` returns what an expression gave there, or raises the OSError it raised."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(directory)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, expression: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(expression + "\n")
        self._process.stdin.flush()

    def answer(self) -> object:
        assert self._process.stdout
        kind, _, value = self._process.stdout.readline().strip().partition(" ")
        if kind == "error":
            raise OSError(int(value), os.strerror(int(value)))
        return eval(value)  # what our own process printed

    def ask(self, expression: str) -> object:
        self.start(expression)
        return self.answer()

    def stop(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture(scope="module", params=WAYS)
def child(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Child, Faults, Path]]:
    """The process, what can go wrong below it, and where its files lie in truth."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "f").write_bytes(RIGHT)
    with mounted(source, target) if request.param == "fuse" else faults(source) as disk:
        running = Child(target if request.param == "fuse" else source, disk.environment)
        yield running, disk, source
        running.stop()


@pytest.fixture
def process(child: tuple[Child, Faults, Path]) -> Iterator[Child]:
    (child[2] / "f").write_bytes(RIGHT)
    child[0].ask("fill(50) and None")
    yield child[0]
    child[1].heal()


@pytest.fixture
def disk(child: tuple[Child, Faults, Path]) -> Faults:
    return child[1]


@pytest.fixture
def file(child: tuple[Child, Faults, Path]) -> Path:
    return child[2] / "f"


NEW = b"".join(bytes([index + 50]) * A for index in range(8))
WRITES = [
    "os.pwrite(f, buffer, 0)",
    "os.pwritev(f, [memoryview(buffer)[:100], memoryview(buffer)[100:]], 0)",
    "os.lseek(f, 0, 0) or os.write(f, buffer)",
    "os.lseek(f, 0, 0) or os.writev(f, [buffer])",
]
READS = [
    "os.pread(f, 32768, 0)",
    "os.preadv(f, [buffer], 0) and bytes(buffer)",
    "os.lseek(f, 0, 0) or os.read(f, 32768)",
    "os.lseek(f, 0, 0) or os.readv(f, [buffer]) and bytes(buffer)",
]
OTHERS: list[tuple[Call, str]] = [
    ("sync", "os.fsync(f)"),
    ("sync", "os.fdatasync(f)"),
    ("open", "os.close(os.open(name, os.O_RDONLY))"),
    ("open", "os.close(os.open('new', os.O_RDWR | os.O_CREAT, dir_fd=folder_fd))"),
    ("open", "open(name, 'rb').close()"),
    ("rename", "open(name + '4', 'w').close() or os.replace(name + '4', name + '5')"),
    (
        "rename",
        "open(name + '6', 'w').close() or"
        " os.rename('f6', 'f7', src_dir_fd=folder_fd, dst_dir_fd=folder_fd)",
    ),
    ("truncate", "os.ftruncate(f, 32768)"),
    ("allocate", "os.posix_fallocate(f, 0, 32768)"),
    ("remove", "open(name + '2', 'w').close() or os.unlink(name + '2')"),
    ("remove", "open(name + '3', 'w').close() or os.unlink('f3', dir_fd=folder_fd)"),
]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(
    ("call", "expression"),
    [*(("write", each) for each in WRITES), *(("read", each) for each in READS), *OTHERS],
)
def test_an_error_is_seen_and_ends(
    process: Child, disk: Faults, call: Call, expression: str, code: int
) -> None:
    process.ask(expression)
    rule = disk.set("error", call, code=code)
    with pytest.raises(OSError, match=os.strerror(code)):
        process.ask(expression)
    disk.heal()
    process.ask(expression)
    assert disk.hits(rule) == 1


def test_an_interrupted_call_is_asked_again_by_python(process: Child, disk: Faults) -> None:
    asked: list[tuple[Call, str]] = [("write", WRITES[0]), ("read", READS[0]), *OTHERS[:3]]
    for call, expression in asked:
        rule = disk.set("error", call, code=errno.EINTR, times=2)
        process.ask(expression)
        assert disk.hits(rule) == 2
        disk.heal()


@pytest.mark.parametrize("expression", WRITES)
@pytest.mark.parametrize("kind", ["short", "torn"])
def test_a_short_write_says_so_and_a_torn_one_does_not(
    process: Child, disk: Faults, file: Path, kind: Kind, expression: str
) -> None:
    disk.set(kind, "write")
    assert process.ask(expression) == len(RIGHT) // (2 if kind == "short" else 1)
    half = len(RIGHT) // 2
    assert file.read_bytes() == NEW[:half] + RIGHT[half:]


@pytest.mark.parametrize("expression", WRITES)
def test_a_dropped_write_is_reported_and_lost(
    process: Child, disk: Faults, file: Path, expression: str
) -> None:
    disk.set("dropped", "write")
    assert process.ask(expression) == len(RIGHT)
    assert process.ask("os.lseek(f, 0, 1)") in (0, len(RIGHT))
    assert file.read_bytes() == RIGHT


def test_writes_go_on_after_the_position_of_a_lost_one(
    process: Child, disk: Faults, file: Path
) -> None:
    disk.set("dropped", "write", times=1)
    expression = "os.lseek(f, 0, 0), os.write(f, buffer[:4096]), os.write(f, buffer[4096:8192])"
    assert process.ask(expression) == (0, A, A)
    assert file.read_bytes() == RIGHT[:A] + NEW[A : 2 * A] + RIGHT[2 * A :]


def test_a_misdirected_write_hits_another_place(process: Child, disk: Faults, file: Path) -> None:
    disk.set("misdirected", "write")
    for index in range(8):
        file.write_bytes(RIGHT)
        expression = f"os.pwrite(f, buffer[4096 * {index}:4096 * {index + 1}], {index} * 4096)"
        assert process.ask(expression) == A
        data = file.read_bytes()
        changed = [place for place in range(8) if data[place * A] != RIGHT[place * A]]
        assert len(changed) == 1
        assert changed != [index]
        assert len(data) == len(RIGHT)


@pytest.mark.parametrize("expression", [*WRITES, *READS])
def test_a_flip_changes_one_bit(process: Child, disk: Faults, file: Path, expression: str) -> None:
    call: Call = "write" if expression in WRITES else "read"
    disk.set("flip", call, times=1)
    got = process.ask(expression)
    data, right = (got, RIGHT) if call == "read" else (file.read_bytes(), NEW)
    assert isinstance(data, bytes)
    assert sum((a ^ b).bit_count() for a, b in zip(data, right, strict=True)) == 1
    assert (file.read_bytes() == RIGHT) == (call == "read")


def test_reads_are_short_torn_dropped_and_misdirected(process: Child, disk: Faults) -> None:
    is_through_fuse = not disk.environment  # the kernel has to give what is not there as zeros
    rest = bytes(len(NEW)) if is_through_fuse else NEW
    half = len(RIGHT) // 2
    rule = disk.set("short", "read")
    assert process.ask("os.pread(f, 32768, 0)") == RIGHT[:half]
    disk.heal(rule)
    rule = disk.set("torn", "read")
    assert process.ask("os.preadv(f, [buffer], 0), bytes(buffer)") == (
        len(RIGHT),
        RIGHT[:half] + rest[half:],
    )
    disk.heal(rule)
    process.ask("fill(50) and None")
    rule = disk.set("dropped", "read")
    assert process.ask("os.preadv(f, [buffer], 0), bytes(buffer)") == (len(RIGHT), rest)
    disk.heal(rule)
    disk.set("misdirected", "read")
    got = process.ask("os.pread(f, 4096, 4096 * 3)")
    assert got != RIGHT[3 * A : 4 * A]
    assert isinstance(got, bytes)
    assert got in {RIGHT[index * A : (index + 1) * A] for index in range(8)}


def test_slow_calls_take_their_time(process: Child, disk: Faults) -> None:
    disk.set("slow", "read", delay_s=0.1)
    before = time.monotonic()
    assert process.ask("os.pread(f, 10, 0)") == RIGHT[:10]
    assert time.monotonic() - before >= 0.1


def test_a_call_hangs_until_it_is_healed(process: Child, disk: Faults) -> None:
    rule = disk.set("hang", "sync")
    process.start("os.fsync(f)")
    deadline = time.monotonic() + 60
    while not disk.hits(rule):
        assert time.monotonic() < deadline
    time.sleep(0.05)
    before = time.monotonic()
    disk.heal(rule)
    assert process.answer() is None
    assert time.monotonic() - before < 5


def test_skip_every_times_and_name_choose_the_calls(process: Child, disk: Faults) -> None:
    rule = disk.set("error", "read", name="f", skip=2, every=3, times=2)
    disk.set("error", "read", name="g")
    outcomes = ""
    for _ in range(12):
        try:
            process.ask("os.pread(f, 1, 0)")
            outcomes += "."
        except OSError:
            outcomes += "x"
    assert outcomes == "..x..x......"
    assert disk.hits(rule) == 2


def test_several_faults_hit_one_call(process: Child, disk: Faults) -> None:
    disk.set("slow", "write", delay_s=0.05)
    disk.set("error", "write", code=errno.ENOSPC)
    before = time.monotonic()
    with pytest.raises(OSError, match="No space"):
        process.ask("os.pwrite(f, b'x', 0)")
    assert time.monotonic() - before >= 0.05


def test_a_dropped_sync_says_that_all_is_well(process: Child, disk: Faults) -> None:
    rule = disk.set("dropped", "sync")
    process.ask("os.fsync(f)")
    assert disk.hits(rule) == 1


def test_other_directories_go_on(process: Child, disk: Faults, tmp_path: Path) -> None:
    disk.set("error", "read", "write", "sync", "open", "rename", "remove")
    place = str(tmp_path / "elsewhere")
    assert process.ask(f"open({place!r}, 'wb').write(b'abc')") == 3
    assert process.ask(f"open({place!r}, 'rb').read(), os.unlink({place!r})") == (b"abc", None)


def test_direct_writes_keep_their_alignment(process: Child, disk: Faults, file: Path) -> None:
    try:
        process.ask(
            "os.fstat(d := os.open(name, os.O_RDWR | os.O_DIRECT)) and globals().update(d=d)"
        )
    except OSError:
        pytest.skip("no O_DIRECT here")
    for kind in ("short", "torn"):
        file.write_bytes(RIGHT)
        rule = disk.set(kind, "write")
        assert process.ask("os.pwrite(d, memoryview(buffer)[:12288], 0)") == (
            A if kind == "short" else 3 * A
        )
        assert file.read_bytes() == NEW[:A] + RIGHT[A:]
        disk.heal(rule)
    disk.set("flip", "write")
    assert process.ask("os.pwrite(d, memoryview(buffer)[:12288], 0)") == 3 * A
    assert file.read_bytes()[: 3 * A] != NEW[: 3 * A]


@pytest.mark.parametrize("child", WAYS[:1], indirect=True)  # FUSE does not see it
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_io_uring_can_be_refused(process: Child, disk: Faults, code: int) -> None:
    ask = "(ctypes.CDLL(None, use_errno=True).syscall(425, 0, 0), ctypes.get_errno())"
    assert process.ask(ask) != (-1, code)
    disk.set("error", "io_uring", code=code)
    assert process.ask(ask) == (-1, code)
