"""Two inference workers share the KV of a document through respkv.

    python -m examples.shared_prompt [--model PATH]

Starts a server and two worker processes on this machine, and ends by itself. In the first round
worker A reads a document and a question and stores its pages. Worker B then reads the same document
and another question: once without the cache, once with pages sent over the socket and once with
pages taken from shared memory. In the second round they change places over another document. In the
third, the server's process is ended and started again between the two: what the second worker finds
then comes out of the files of the nvme tier.

The documents are this project's own documentation. The model is a small Llama with random weights,
made on the spot, or your own checkpoint. The exit code is 1 when no page was found or any token
came out different with the cache.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tokenizers import Tokenizer

from examples.processes import (
    ROOT,
    Answer,
    DemoFailed,
    Server,
    Step,
    Worker,
    environment,
    running_server,
    running_worker,
)
from respkv.client import Client

QUESTIONS = (
    "\n\nQuestion: what is a page, and what is its key?\nAnswer:",
    "\n\nQuestion: what becomes of a page that nobody asks for?\nAnswer:",
)
WAYS = {"socket": "socket", "memory": "shared memory"}
TIERS = {"c": "memory", "n": "nvme files", "d": "disk files"}


@dataclass(frozen=True, slots=True)
class Round:
    """Who computes and stores, in which way, who then reads it, and what happens in between."""

    writer: str
    way: str
    reader: str
    restarts: bool = False


ROUNDS = (
    Round("A", "memory", "B"),
    Round("B", "socket", "A"),
    Round("A", "memory", "B", restarts=True),
)
ACTS = {False: "Two workers, one server:", True: "The server was started again in between:"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt, read by one worker without the cache and with it.

    restarted: whether another process had stored the pages than the one that gave them.
    """

    worker: str
    way: str
    restarted: bool
    plain: Answer
    cached: Answer

    def facts(self) -> dict[str, str]:
        plain, cached = self.plain, self.cached
        return {
            "worker": self.worker,
            "pages come by": WAYS[self.way],
            "found in": ", ".join(TIERS.get(tier, tier) for tier in cached.found_in),
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
    for restarted, title in ACTS.items():
        act = [each for each in comparisons if each.restarted is restarted]
        print(f"\n{title}\n\n{table(act)}")
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
    add("--maxmemory", default="256mb", help="what the server may hold in memory")
    add("--nvme-bytes", default="1gb", help="what it may hold in files")
    add("--nvme-codec", default="xs", help="how: a lossy one may change tokens")
    add("--threads", type=int, default=1, help="threads of each worker")
    add("--layers", type=int, default=10, help="of the model with random weights")
    add("--hidden", type=int, default=512, help="of the model with random weights")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> list[Comparison]:
    """Run all rounds and stop all that was started, whatever happens."""
    text = "\n\n".join(path.read_text() for path in options.text or documentation())
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="respkv-demo-")))
        with Step("starting the server") as step:
            server = cleanup.enter_context(running_server(folder, options))
            step.result = server.url
        model = options.model.resolve() if options.model else make_model(folder, text, options)
        if not (model / "tokenizer.json").exists():
            raise DemoFailed(f"{model} has no tokenizer.json")
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        documents = cut(tokenizer.encode(text).ids, options.document_tokens, len(ROUNDS))
        workers = {}
        with Step("starting workers A and B") as step:
            for name in "AB":
                workers[name] = cleanup.enter_context(
                    running_worker(name, model, server.url, options)
                )
            for worker in workers.values():
                ready = worker.wait_for("ready", step)
                step.result = (
                    f"a page is {ready['shape']} {ready['dtype']}, {mebibytes(ready['bytes'])}"
                )
        questions = [tokenizer.encode(question).ids for question in QUESTIONS]
        comparisons = []
        for document, turn in zip(documents, ROUNDS, strict=True):
            prompts = [document + question for question in questions]
            compute(workers[turn.writer], prompts[0], turn.way, options.new_tokens)
            if turn.restarts:
                restart(server)
            comparisons += compare(
                workers[turn.reader], prompts[1], options.new_tokens, restarted=turn.restarts
            )
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


def restart(server: Server) -> None:
    """End the server's process in order and start another one on the same files."""
    with Step("the server is stopped with SIGTERM and started again") as step:
        server.stop()
        server.start()
        with Client(server.url) as client:
            pages = client.command("DBSIZE")
        took = time.perf_counter() - step.start
        step.result = f"{took:.1f} s; the new process found {pages!r} pages in its files"


def compare(
    worker: Worker, prompt: list[int], new_tokens: int, *, restarted: bool
) -> list[Comparison]:
    """Let a worker read a prompt without the cache, then with it in both ways."""
    answers = {}
    for load in ("", *WAYS):
        how = f"with pages by {WAYS[load]}" if load else "without the cache"
        with Step(f"{worker.name} reads {len(prompt):,} tokens {how}") as step:
            answer = worker.ask(step, prompt, load=load, store="", new_tokens=new_tokens)
            step.result = f"first token after {answer.first_token_s:.2f} s"
        answers[load] = answer
    return [Comparison(worker.name, way, restarted, answers[""], answers[way]) for way in WAYS]


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
