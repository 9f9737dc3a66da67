"""``respkv serve`` up to the point where the server begins."""

import re
from pathlib import Path

import pytest

from respkv.cli.serve import OPTIONS
from respkv.config import SETTINGS
from tests.cli.conftest import Cli


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--maxmemory", "1x"),
            "command line: maxmemory = '1x': accepted are 1mb to 1024tb,"
            " such as 65536, 64k, 512mb or 1gb",
        ),
        (("--shm", "yes"), "command line: shm = 'yes': accepted are off, ro, rw"),
        (("--port", "http"), "command line: port = 'http': accepted are -1 to 65535"),
        (("--port", "-1"), "command line: port = -1: without TCP, unixsocket must be set"),
        (
            ("--set", "maxmemory-policy=lfru"),
            "command line: maxmemory-policy = 'lfru': accepted are lru, lfu, fifo, sieve, s3fifo",
        ),
        (
            ("--set", "max-memory=1gb"),
            "command line: 'max-memory': unknown key; did you mean maxmemory?",
        ),
        (("--set", "timeout"), "command line: --set 'timeout': accepted are NAME=VALUE"),
        (("--config", "gone.toml"), "gone.toml: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    args: tuple[str, ...], message: str, cli: Cli
) -> None:
    done = cli("serve", *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"respkv: {message}\n"


def test_a_wrong_file_names_itself(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "respkv.toml"
    path.write_text('maxmemory-policy = "lfru"\n')
    done = cli("serve", "--config", str(path), "--port", "0")
    assert done.returncode == 2
    assert done.stderr == (
        f"respkv: {path}: maxmemory-policy = 'lfru': accepted are lru, lfu, fifo, sieve, s3fifo\n"
    )


def test_the_password_is_not_repeated(cli: Cli) -> None:
    done = cli("serve", "--set", "requirepass=hunter2", "--set", "shm=yes")
    assert done.returncode == 2
    assert "hunter2" not in done.stderr


def test_help_explains_the_options_and_names_every_setting(cli: Cli) -> None:
    text = cli("serve", "--help").stdout
    for name in OPTIONS:
        assert f"--{name} " in text
    listed = re.findall(r"[a-z-]+", text.partition("docs/config.md:")[2])
    assert listed == list(SETTINGS)


def test_an_unknown_command_is_refused(cli: Cli) -> None:
    done = cli("sevre")
    assert done.returncode == 2
    assert "No such command 'sevre'" in done.stderr
