"""The processes of the demo: a server that can be started again, and workers beside it."""

import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from respkv.client import Client
from respkv.errors import CacheError

ROOT = Path(__file__).resolve().parent.parent
START_S = 60.0
STOP_S = 15.0


class DemoFailed(Exception):
    """The demo cannot go on; the message is for the person who started it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker says about one prompt; worker.py makes it."""

    prompt_tokens: int
    pages_hit: int
    tokens_hit: int
    found_in: str
    bytes_read: int
    load_s: float
    first_token_s: float
    new_tokens: list[int]
    logits: str
    pages_stored: int
    bytes_stored: int
    store_s: float


class Step:
    """One line on the terminal: what is being done, how far it is, what it took."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.start = time.perf_counter()
        self.result = ""

    def __enter__(self) -> Self:
        print(f"{self.text} ...", end="", flush=True)
        return self

    def progress(self, done: int, of: int) -> None:
        if sys.stdout.isatty():
            print(f"\r{self.text} ... {done:,} of {of:,} tokens", end="", flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            print(flush=True)
            return
        clear = "\r\x1b[K" + self.text + " ..." if sys.stdout.isatty() else ""
        took = f"{time.perf_counter() - self.start:.1f} s"
        print(f"{clear} {self.result or took}", flush=True)


class Worker:
    """A worker process, spoken to in lines of JSON."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self.process = process

    def ask(self, step: Step, prompt: list[int], **job: Any) -> Answer:
        """Let the worker read a prompt. Raises DemoFailed when its process ends."""
        assert self.process.stdin
        with suppress(BrokenPipeError):  # its end is noticed below
            self.process.stdin.write(json.dumps({"tokens": prompt, **job}) + "\n")
            self.process.stdin.flush()
        return Answer(**self.wait_for("answer", step))

    def wait_for(self, event: str, step: Step) -> dict[str, Any]:
        """Return the fields of the next ``event``, showing progress until then."""
        assert self.process.stdout
        for line in self.process.stdout:
            fields: dict[str, Any] = json.loads(line)
            if (kind := fields.pop("event")) == event:
                return fields
            if kind == "progress":
                step.progress(**fields)
        raise DemoFailed(f"worker {self.name} ended with status {self.process.wait()}")


class Server:
    """respkv on a Unix socket. Workers may write its memory; what it holds outlives its process.

    folder: of its socket, its log and the files of its nvme tier.
    """

    def __init__(self, folder: Path, options: Namespace) -> None:
        self.url = f"unix://{folder / 'socket'}"
        self.log = folder / "log"
        self._socket = folder / "socket"
        self._arena = arena_path(folder)
        self._command = [
            *(sys.executable, "-m", "respkv", "serve", "--port", "0"),
            *("--unixsocket", str(self._socket), "--maxmemory", options.maxmemory),
            *("--shm", "rw", "--set", f"shm-path={self._arena}"),
            *("--nvme-path", str(folder / "tier"), "--nvme-bytes", options.nvme_bytes),
        ]
        self._process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        """Start the process; return when it answers. Raises DemoFailed."""
        with self.log.open("a") as output:
            self._process = subprocess.Popen(
                self._command, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while not self._socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DemoFailed("the server did not start")
            time.sleep(0.05)
        with Client(self.url, connect_timeout_s=START_S) as client:
            client.ping()

    def stop(self) -> None:
        """End the process, if there is one, with SIGTERM."""
        if self._process is not None:
            stop(self._process)
        self._arena.unlink(missing_ok=True)


@contextmanager
def running_server(folder: Path, options: Namespace) -> Iterator[Server]:
    """Run a server; whatever is then raised comes with its log."""
    server = Server(folder, options)
    try:
        server.start()
        yield server
    except (DemoFailed, CacheError) as error:
        print(f"\nthe server's log:\n{server.log.read_text()}", file=sys.stderr)
        raise DemoFailed(str(error)) from error
    finally:
        server.stop()


def arena_path(folder: Path) -> Path:
    """Return the file of the server's memory: one that never meets a disk, if there is room."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 2 << 30:
        return memory / f"{folder.name}.arena"
    return folder / "arena"


@contextmanager
def running_worker(name: str, model: Path, url: str, options: Namespace) -> Iterator[Worker]:
    """Run a worker process."""
    command = [sys.executable, "-m", "examples.worker", "--model", str(model), "--server", url]
    command += ["--page-tokens", str(options.page_tokens), "--threads", str(options.threads)]
    command += ["--nvme-codec", options.nvme_codec]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Worker(name, process)
    finally:
        stop(process)


def environment() -> dict[str, str]:
    """Return the environment of children: nothing may be downloaded, not even asked for."""
    return os.environ | {"HF_HUB_OFFLINE": "1"}


def stop(process: subprocess.Popen[Any]) -> None:
    """End a child: asked first, killed when it does not listen or when we are interrupted again."""
    # Children have sessions of their own, so that Ctrl-C comes to us alone and they end in order.
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        print("a process had to be killed", file=sys.stderr)
    finally:
        process.kill()
        process.wait()
