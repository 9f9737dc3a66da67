"""A directory that is not a tier's is refused, and nothing in it is touched."""

import os
from pathlib import Path

import pytest

from respkv.errors import TierError
from respkv.tiers.claim import open_directory
from respkv.tiers.directory import _replace


def claim(path: Path) -> None:
    os.close(open_directory(path, want_direct=False).lock_fd)


@pytest.mark.parametrize(
    "name", ["thesis.tmp", "a.txt", "segment-00000003", "checkpoint.a", "schemas.json", "probe"]
)
def test_a_directory_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(TierError, match=f"{tmp_path}.*{name}.*a directory of its own"):
        claim(tmp_path)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"precious"


def test_an_empty_directory_and_that_of_a_first_start_that_crashed_are_taken(
    tmp_path: Path,
) -> None:
    (tmp_path / "lost+found").mkdir()
    claim(tmp_path)
    (tmp_path / "superblock.tmp").write_bytes(b"half")
    (tmp_path / "probe.tmp").write_bytes(b"")
    claim(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["lock", "lost+found"]


def test_of_a_tiers_directory_only_our_own_temporary_files_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "superblock").write_bytes(b"whatever")
    for name in ("schemas.json.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "probe.tmp").symlink_to(tmp_path / "notes.tmp")
    claim(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["lock", "notes.tmp", "probe.tmp", "superblock"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    folder = tmp_path / "tier"
    folder.mkdir()
    (folder / "superblock.tmp").symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        _replace(folder / "superblock", b"data")
    assert target.read_bytes() == b"precious"
