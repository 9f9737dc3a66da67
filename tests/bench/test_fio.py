"""fio does what it is asked, or the comparison ends."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from bench.fio import Fio, Job, Word, engine, filled_file, is_direct
from bench.servers import BenchError

MIB = 1 << 20


@pytest.mark.parametrize("word", ["read", "write"])
def test_a_job_takes_time_and_its_file_goes(tmp_path: Path, word: Word) -> None:
    with filled_file(tmp_path, 4 * MIB) as file:
        assert file.stat().st_size == 4 * MIB
        job = Job(file, 4 * MIB, word, 64 << 10, 4, 128)
        # Less than a second for 64 KiB, and no faster than memory.
        assert 1e-6 < Fio(job).measure() < 1
    assert not list(tmp_path.iterdir())


def test_every_block_of_the_file_was_written(tmp_path: Path) -> None:
    with filled_file(tmp_path, 32 * MIB) as file:
        content = file.read_bytes()
        blocks = (content[at : at + 4096] for at in range(0, len(content), 4096))
        assert all(any(block) for block in blocks)


def test_a_job_that_cannot_be_done_names_its_command(tmp_path: Path) -> None:
    job = Job(tmp_path / "none" / "file", MIB, "read", 4096, 1, 1)
    with pytest.raises(BenchError, match=f"--ioengine={engine()}"):
        Fio(job).measure()


def test_a_folder_in_memory_is_no_obstacle() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert not list(Path(folder).iterdir())
        is_direct(Path(folder))  # either, by the age of the kernel
        assert not list(Path(folder).iterdir())
        with filled_file(Path(folder), 4 * MIB) as file:
            assert Fio(Job(file, 4 * MIB, "read", 64 << 10, 4, 1024)).measure() > 0


def test_a_job_is_named_by_its_size_and_depth() -> None:
    job = Job(Path("file"), MIB, "read", 64 << 10, 8, 1)
    assert job.name == "read 64 KiB, depth 8"
    assert replace(job, word="write", block_bytes=MIB).name == "write 1 MiB, depth 8"
