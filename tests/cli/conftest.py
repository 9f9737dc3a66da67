"""The command line as a person runs it, and a real redis-server for it to talk to."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.redis_server import RedisServer, free_port, why_not

START_S = 60.0
COMMAND_S = 120.0


class Cli(Protocol):
    """Run ``respkv`` with these words."""

    def __call__(
        self, *args: str, url: str | None = None
    ) -> "subprocess.CompletedProcess[str]": ...


def environment(url: str | None) -> dict[str, str]:
    """Return this process's, pointing at a server or at none."""
    kept = {name: value for name, value in os.environ.items() if name != "RESPKV_URL"}
    return kept | ({} if url is None else {"RESPKV_URL": url})


@pytest.fixture
def cli() -> Cli:
    def run(*args: str, url: str | None = None) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "respkv", *args],
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            env=environment(url),
        )

    return run


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    if reason := why_not():
        pytest.skip(reason)
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.port


@pytest.fixture
def redis_url(redis_port: int) -> str:
    return f"redis://127.0.0.1:{redis_port}"


@pytest.fixture
def nowhere() -> str:
    """A URL that nobody answers."""
    return f"respkv://127.0.0.1:{free_port()}"


@pytest.fixture
def without_rich(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command line meet a Python in which rich cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['rich'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of ours with shared memory, started as a person starts it."""
    folder = tmp_path_factory.mktemp("respkv")
    path = folder / "s"
    args = ["--port", "-1", "--unixsocket", str(path), "--maxmemory", "64mb", "--shm", "rw"]
    args += ["--set", f"shm-path={folder / 'arena'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "respkv", "serve", *args], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        assert "ready on" in process.stderr.readline()
        yield f"unix://{path}"
    finally:
        process.terminate()
        _, said = process.communicate(timeout=START_S)
    assert process.returncode == 0, said
    assert "Traceback" not in said, said
