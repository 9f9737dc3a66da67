"""Two inference workers share the KV of a document through respkv.

    python examples/shared_prompt.py [--model PATH]

Starts a server and two worker processes on this machine, and ends by itself. In the first round
worker A reads a document and a question and stores its pages. Worker B then reads the same document
and another question: once without the cache, once with pages sent over the socket and once with
pages taken from shared memory. In the second round they change places over another document.

The documents are this project's own documentation. The model is a small Llama with random weights,
made on the spot, or your own checkpoint. The exit code is 1 when no page was found or any token
came out different with the cache.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from tokenizers import Tokenizer

from respkv.client import Client
from respkv.errors import CacheError

ROOT = Path(__file__).resolve().parent.parent
START_S = 60.0
STOP_S = 15.0
QUESTIONS = (
    "\n\nQuestion: what is a page, and what is its key?\nAnswer:",
    "\n\nQuestion: what becomes of a page that nobody asks for?\nAnswer:",
)
WAYS = {"socket": "socket", "memory": "shared memory"}
# Who computes and stores, who reads what was stored, and the way of storing.
ROUNDS = (("A", "B", "memory"), ("B", "A", "socket"))


class DemoFailed(Exception):
    """The demo cannot go on; the message is for the person who started it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker says about one prompt; worker.py makes it."""

    prompt_tokens: int
    pages_hit: int
    tokens_hit: int
    bytes_read: int
    load_s: float
    first_token_s: float
    new_tokens: list[int]
    logits: str
    pages_stored: int
    bytes_stored: int
    store_s: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt, read by one worker without the cache and with it."""

    worker: str
    way: str
    plain: Answer
    cached: Answer

    def facts(self) -> dict[str, str]:
        plain, cached = self.plain, self.cached
        return {
            "worker": self.worker,
            "pages come by": WAYS[self.way],
            "prompt tokens": f"{cached.prompt_tokens:,}",
            "tokens from the cache": f"{cached.tokens_hit:,}",
            "hit rate": f"{cached.tokens_hit / cached.prompt_tokens:.1%}",
            "pages hit": f"{cached.pages_hit:,}",
            "KV read": mebibytes(cached.bytes_read),
            "time to load it": f"{cached.load_s:.3f} s",
            "first token without": f"{plain.first_token_s:.3f} s",
            "first token with cache": f"{cached.first_token_s:.3f} s",
            "speed-up": f"{plain.first_token_s / cached.first_token_s:.1f} x",
            f"{len(plain.new_tokens)} new tokens": "identical" if self.is_identical() else "DIFFER",
            "logits of the first": "same bits" if plain.logits == cached.logits else "close",
        }

    def is_identical(self) -> bool:
        return self.plain.new_tokens == self.cached.new_tokens


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


def main(argv: list[str] | None = None) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    start = time.perf_counter()
    try:
        comparisons = run(parse_options(argv))
    except DemoFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print("\n" + table(comparisons))
    failure = find_failure(comparisons)
    verdict = f"FAILED: {failure}." if failure else "The cache changed no token."
    print(f"\n{verdict} {time.perf_counter() - start:.0f} s in all.")
    return 1 if failure else 0


def find_failure(comparisons: list[Comparison]) -> str | None:
    if not all(each.is_identical() for each in comparisons):
        return "tokens differ with the cache"
    if not all(each.cached.pages_hit for each in comparisons):
        return "nothing was found in the cache"
    return None


def leave(number: int, frame: FrameType | None) -> NoReturn:
    # An exception, so that the way out stops every child.
    sys.exit(128 + number)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="a local transformers checkpoint with its tokenizer.json")
    add("--text", type=Path, nargs="+", help="files to read instead of this project's docs")
    add("--document-tokens", type=int, default=2000)
    add("--page-tokens", type=int, default=128)
    add("--new-tokens", type=int, default=32)
    add("--maxmemory", default="256mb", help="what the server may hold")
    add("--threads", type=int, default=1, help="threads of each worker")
    add("--layers", type=int, default=10, help="of the model with random weights")
    add("--hidden", type=int, default=512, help="of the model with random weights")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> list[Comparison]:
    """Run both rounds and stop all that was started, whatever happens."""
    text = "\n\n".join(path.read_text() for path in options.text or documentation())
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="respkv-demo-")))
        with Step("starting the server") as step:
            url = cleanup.enter_context(running_server(folder, options.maxmemory))
            step.result = url
        model = options.model.resolve() if options.model else make_model(folder, text, options)
        if not (model / "tokenizer.json").exists():
            raise DemoFailed(f"{model} has no tokenizer.json")
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        documents = cut(tokenizer.encode(text).ids, options.document_tokens, len(ROUNDS))
        workers = {}
        with Step("starting workers A and B") as step:
            for name in "AB":
                workers[name] = cleanup.enter_context(running_worker(name, model, url, options))
            for worker in workers.values():
                ready = worker.wait_for("ready", step)
                step.result = (
                    f"a page is {ready['shape']} {ready['dtype']}, {mebibytes(ready['bytes'])}"
                )
        questions = [tokenizer.encode(question).ids for question in QUESTIONS]
        comparisons = []
        for document, (writer, reader, way) in zip(documents, ROUNDS, strict=True):
            prompts = [document + question for question in questions]
            compute(workers[writer], prompts[0], way, options.new_tokens)
            comparisons += compare(workers[reader], prompts[1], options.new_tokens)
    if options.model:
        for each in comparisons[:: len(WAYS)]:
            print(f"\n{each.worker}: {tokenizer.decode(each.cached.new_tokens)}")
    return comparisons


def compute(worker: Worker, prompt: list[int], way: str, new_tokens: int) -> None:
    """Let a worker compute a whole prompt and store its pages."""
    with Step(f"{worker.name} reads {len(prompt):,} tokens and stores its pages") as step:
        answer = worker.ask(step, prompt, load="", store=way, new_tokens=new_tokens)
        step.result = (
            f"first token after {answer.first_token_s:.2f} s;"
            f" {answer.pages_stored} pages, {mebibytes(answer.bytes_stored)},"
            f" stored by {WAYS[way]} in {answer.store_s:.3f} s"
        )


def compare(worker: Worker, prompt: list[int], new_tokens: int) -> list[Comparison]:
    """Let a worker read a prompt without the cache, then with it in both ways."""
    answers = {}
    for load in ("", *WAYS):
        how = f"with pages by {WAYS[load]}" if load else "without the cache"
        with Step(f"{worker.name} reads {len(prompt):,} tokens {how}") as step:
            answer = worker.ask(step, prompt, load=load, store="", new_tokens=new_tokens)
            step.result = f"first token after {answer.first_token_s:.2f} s"
        answers[load] = answer
    return [Comparison(worker.name, way, answers[""], answers[way]) for way in WAYS]


def documentation() -> list[Path]:
    """Return the project's own documents."""
    first = [ROOT / name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [path for path in (*first, *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]


def cut(tokens: list[int], length: int, count: int) -> list[list[int]]:
    """Return ``count`` documents of ``length`` tokens that follow each other in a text."""
    if len(tokens) < count * length:
        raise DemoFailed(
            f"the text has {len(tokens):,} tokens, {count} documents of {length:,} need"
            f" {count * length:,}; give more --text or fewer --document-tokens"
        )
    return [tokens[start : start + length] for start in range(0, count * length, length)]


def make_model(folder: Path, text: str, options: argparse.Namespace) -> Path:
    """Make a checkpoint with random weights and a tokenizer trained on the text."""
    (folder / "text").write_text(text)
    command = [sys.executable, "-m", "examples.checkpoint", str(folder / "model")]
    command += ["--text", str(folder / "text")]
    command += ["--layers", str(options.layers), "--hidden", str(options.hidden)]
    with Step("making a model with random weights"):
        if status := subprocess.run(command, cwd=ROOT, env=environment()).returncode:
            raise DemoFailed(f"no model could be made, status {status}")
    return folder / "model"


@contextmanager
def running_server(folder: Path, maxmemory: str) -> Iterator[str]:
    """Run a server on a Unix socket, with shared memory that workers may write; yields its URL."""
    socket, arena, log = folder / "socket", arena_path(folder), folder / "log"
    command = [sys.executable, "-m", "respkv", "serve", "--port", "0", "--unixsocket", str(socket)]
    command += ["--maxmemory", maxmemory, "--shm", "rw", "--set", f"shm-path={arena}"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoFailed("the server did not start")
            time.sleep(0.05)
        with Client(f"unix://{socket}", connect_timeout_s=START_S) as client:
            client.ping()
        yield f"unix://{socket}"
    except (DemoFailed, CacheError) as error:
        print(f"\nthe server's log:\n{log.read_text()}", file=sys.stderr)
        raise DemoFailed(str(error)) from error
    finally:
        stop(process)
        arena.unlink(missing_ok=True)


def arena_path(folder: Path) -> Path:
    """Return the file of the server's memory: one that never meets a disk, if there is room."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 2 << 30:
        return memory / f"{folder.name}.arena"
    return folder / "arena"


@contextmanager
def running_worker(
    name: str, model: Path, url: str, options: argparse.Namespace
) -> Iterator[Worker]:
    command = [sys.executable, "-m", "examples.worker", "--model", str(model), "--server", url]
    command += ["--page-tokens", str(options.page_tokens), "--threads", str(options.threads)]
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
    # Nothing may be downloaded, not even asked for.
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


def mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def table(comparisons: list[Comparison]) -> str:
    """Set the facts in columns, one for each comparison."""
    columns = [each.facts() for each in comparisons]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "   ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for name, *cells in rows
    ]
    lines.insert(2, "-" * len(lines[0]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
