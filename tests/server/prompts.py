"""Prompts with KV of random bytes, and workers that have a part of the model each."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy

from respkv.client import Client
from tests.server_process import ServerProcess

Array = numpy.ndarray[Any, Any]

LAYERS, HEADS, DIM, TOKENS = 4, 8, 16, 16
PAGE_BYTES = LAYERS * 2 * TOKENS * HEADS * DIM * 2


def declare(client: Client, namespace: str = "m", **changes: Any) -> None:
    """Set the schema of a namespace to that of the arrays here."""
    shape: dict[str, Any] = {"layers": LAYERS, "heads": HEADS, "dim": DIM, "tokens": TOKENS}
    shape |= changes
    client.schema_set(namespace, dtype="bfloat16", **shape)


@dataclass
class Text:
    """A prompt and its KV, ``[L, 2, n, H, D]``."""

    tokens: list[int]
    kv: Array

    def part(self, layers: tuple[int, int], heads: tuple[int, int], first: int = 0) -> Array:
        """Return a contiguous rectangle of the tokens from ``first`` on."""
        rows = self.kv[layers[0] : sum(layers), :, first:, heads[0] : sum(heads)]
        return numpy.ascontiguousarray(rows)

    def head(self, num_tokens: int) -> "Text":
        """Return the prompt of the first tokens."""
        return Text(self.tokens[:num_tokens], self.kv[:, :, :num_tokens])

    def followed_by(self, other: "Text") -> "Text":
        """Return the prompt that goes on with another."""
        return Text(self.tokens + other.tokens, numpy.concatenate((self.kv, other.kv), axis=2))


def text(num_tokens: int, seed: int, *, layers: int = LAYERS, heads: int = HEADS) -> Text:
    """Return a prompt that no other seed begins like."""
    random = numpy.random.default_rng(seed)
    shape = (layers, 2, num_tokens, heads, DIM)
    kv = random.integers(0, 1 << 16, shape, dtype=numpy.uint16)
    tokens = random.integers(0, 1 << 31, num_tokens, dtype=numpy.int64)
    return Text([int(each) for each in tokens], kv)


@dataclass
class Worker:
    """One rank: its layers, its heads and its own connections."""

    client: Client
    layers: tuple[int, int]
    heads: tuple[int, int]
    namespace: str = "m"

    def portion(self) -> dict[str, Any]:
        """Return what it says of itself: nothing about what it has all of."""
        said: dict[str, Any] = {"layers": self.layers} if self.layers != (0, LAYERS) else {}
        return said | ({"heads": self.heads} if self.heads != (0, HEADS) else {})

    def put(self, prompt: Text, **options: Any) -> Any:
        """Store this rank's part of a prompt."""
        first = options.get("first", 0)
        part = prompt.part(self.layers, self.heads, first)
        return self.client.seq.put(self.namespace, prompt.tokens, part, **self.portion(), **options)

    def check(self, prompt: Text, matched: int | None = None, *, first: int = 0) -> None:
        """Assert that this rank's part of what matched comes back bit by bit."""
        matched = len(prompt.tokens) if matched is None else matched
        expected = prompt.head(matched).part(self.layers, self.heads, first)
        with self.client.seq.get(
            self.namespace, prompt.tokens, first=first, **self.portion()
        ) as layers:
            assert layers.matched == matched
            got = list(layers)
        assert len(got) == self.layers[1]
        for number, layer in enumerate(got):
            assert bytes(layer) == expected[number].tobytes(), f"layer {number} of {self}"


@dataclass
class Model:
    """Workers that together have all of it: tp ranks of heads times pp ranks of layers."""

    tp: int
    pp: int = 1
    workers: list[Worker] = field(default_factory=list)

    def put(self, prompt: Text, **options: Any) -> None:
        """Have every rank store its part."""
        for worker in self.workers:
            worker.put(prompt, **options)

    def check(self, prompt: Text, matched: int | None = None, *, first: int = 0) -> None:
        """Assert that every rank gets its part."""
        for worker in self.workers:
            worker.check(prompt, matched, first=first)


@contextmanager
def model(server: ServerProcess, tp: int, pp: int = 1) -> Iterator[Model]:
    """Yield a model whose ranks have a client each."""
    with ExitStack() as stack:
        workers = [
            Worker(
                stack.enter_context(Client(server.url)),
                (stage * LAYERS // pp, LAYERS // pp),
                (rank * HEADS // tp, HEADS // tp),
            )
            for stage in range(pp)
            for rank in range(tp)
        ]
        yield Model(tp, pp, workers)
