"""Mapping an arena: the right file, in the right mode, or an error that says why not."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from respkv.client.arena import LAYOUT_VERSION, Arenas, arena_identity
from respkv.errors import ConfigError, ProtocolError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "arena"
    made.write_bytes(bytes(range(256)) * 64)
    return made


def answer(file: Path, mode: bytes = b"rw", **changes: Any) -> list[Any]:
    """Return what KV.ATTACH answers for a file."""
    with file.open("rb") as opened:
        identity = arena_identity(opened.fileno())
    said = {"path": bytes(file), "nbytes": 16384, "version": LAYOUT_VERSION, "mode": mode}
    return list({**said, "identity": identity, **changes}.values())


def test_a_file_is_mapped_once_and_again_when_it_is_another(path: Path) -> None:
    arenas = Arenas()
    first = arenas.find(answer(path))
    assert arenas.find(answer(path)) is first
    assert bytes(first.view(256, 4)) == b"\x00\x01\x02\x03"
    path.rename(path.with_name("old"))
    path.write_bytes(b"x" * 16384)
    second = arenas.find(answer(path))
    assert bytes(second.view(256, 4)) == b"xxxx"
    assert bytes(first.view(256, 4)) == b"\x00\x01\x02\x03", (
        "views of the old one are not pulled away"
    )


def test_only_a_writable_arena_can_be_written(path: Path) -> None:
    Arenas().find(answer(path)).view(0, 1)[:] = b"w"
    assert path.read_bytes()[:1] == b"w"
    path.chmod(0o400)
    assert Arenas().find(answer(path, b"ro")).view(0, 1).readonly


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (16384, 1), (0, 16385), (5, -1)])
def test_a_place_outside_the_arena_is_refused(path: Path, offset: int, nbytes: int) -> None:
    with pytest.raises(ProtocolError, match="not within"):
        Arenas().find(answer(path)).view(offset, nbytes)


def test_the_file_of_another_server_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="another server's"):
        Arenas().find(answer(path, identity=b"some-other-boot:1:2"))


def test_a_server_that_does_not_say_which_file_is_believed(path: Path) -> None:
    assert bytes(Arenas().find(answer(path)[:4]).view(0, 1)) == b"\0"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": LAYOUT_VERSION + 1}, "layout"),
        ({"nbytes": 1 << 20}, "16384 bytes, not 1048576"),
        ({"path": b"/nowhere/arena"}, "No such file"),
    ],
)
def test_an_arena_that_cannot_be_had_says_why(
    path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        Arenas().find(answer(path, **changes))


@pytest.mark.parametrize("reply", [None, b"OK", [], [b"/path", 1, 1], [1, 2, 3, 4]])
def test_what_is_no_answer_to_attach_is_a_protocol_error(reply: Any) -> None:
    with pytest.raises(ProtocolError, match=r"KV\.ATTACH"):
        Arenas().find(reply)


def test_mapping_leaves_no_descriptor_open_when_it_fails(path: Path) -> None:
    with pytest.raises(ConfigError):
        Arenas().find(answer(path, identity=b"other"))
    assert not is_open(path)
    with path.open("rb"):
        assert is_open(path)


def is_open(path: Path) -> bool:
    """Whether a descriptor of this process is of a file; others come and go meanwhile."""
    for each in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{each}") == str(path):
                return True
    return False
