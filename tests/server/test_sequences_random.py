"""Random sequences of puts, rectangles, gets and broken connections, with every count checked.

The prompts are paths of a tree whose KV follows from their tokens, so what a get answers can be held
against what it must be, whoever stored it and whatever was evicted.
"""

import random
from typing import Any

import anyio
import numpy
import pytest

from respkv.chain import pack_tokens
from tests.fakes import FakeWire
from tests.server.cold import Cold, cold_server, parsed
from tests.server.raw import Word, request

pytestmark = pytest.mark.anyio

L, H, D, T = 2, 4, 64, 8
SCHEMA: list[Word] = ["KV.SCHEMA", "SET", "s", "LAYERS", L, "HEADS", H, "DIM", D, "TOKENS", T]
WIDE = 512  # makes pages of 64 KiB, which land


class Tree:
    """Prompts that share beginnings, and the KV of each token: a function of all before it."""

    def __init__(self, seed: int, dim: int) -> None:
        self.random = random.Random(seed)
        self.dim = dim
        self._known: dict[tuple[int, ...], Any] = {}

    def prompt(self) -> list[int]:
        """Return a prompt; the fewer tokens there are, the more they have in common."""
        length = self.random.randint(1, 5 * T)
        return [self.random.choice([1, 1, 1, 1, 1, 1, 2]) for _ in range(length)]

    def kv(self, tokens: list[int]) -> Any:
        """Return [L, 2, n, H, D]."""
        rows = [self._row(tuple(tokens[: stop + 1])) for stop in range(len(tokens))]
        return numpy.stack(rows, axis=2)

    def _row(self, prefix: tuple[int, ...]) -> Any:
        row = self._known.get(prefix)
        if row is None:
            shape = (L, 2, H, self.dim)
            generator = numpy.random.default_rng(abs(hash(prefix)))
            row = generator.integers(0, 1 << 16, shape, dtype=numpy.uint16)
            self._known[prefix] = row
        return row


def cut(kv: Any, first: int = 0) -> list[bytes]:
    """Return the payloads of the pages from a token on."""
    starts = range(first, kv.shape[2], T)
    return [numpy.ascontiguousarray(kv[:, :, start : start + T]).tobytes() for start in starts]


class Players:
    """Clients that do what a seed says, and know what they must be told."""

    def __init__(self, cold: Cold, tree: Tree) -> None:
        self.cold = cold
        self.tree = tree
        self.random = tree.random
        self.wires = [FakeWire(cold.server) for _ in range(3)]

    async def play(self, steps: int) -> None:
        for _ in range(steps):
            number = self.random.randrange(len(self.wires))
            wire, tokens = self.wires[number], self.tree.prompt()
            match self.random.randrange(12):
                case 0 | 1 | 2:
                    await self._put(wire, tokens)
                case 3 | 4 | 5:
                    await self._put_rectangle(wire, tokens)
                case 6 | 7 | 8:
                    await self._get(wire, tokens)
                case 9:
                    self._break(number, tokens)
                case 10:
                    await self.cold.chill()
                case _:
                    await self._rarely(wire)
            self._check()

    async def _rarely(self, wire: FakeWire) -> None:
        if self.random.random() < 0.15:
            await self._ask(wire, ["FLUSHALL"])
        elif self.random.random() < 0.1:
            await self._ask(wire, ["KV.SCHEMA", "DEL", "s"])
            await self._ask(wire, [*SCHEMA[:8], self.tree.dim, *SCHEMA[9:], "DTYPE", "bfloat16"])

    async def _ask(self, wire: FakeWire, words: list[Word]) -> Any:
        data, taken, sent = request(*words), 0, bytearray()
        with anyio.fail_after(60):
            while taken < len(data):
                taken += wire.feed(data[taken:])
                if taken < len(data):
                    await anyio.sleep(0.001)
            while not (found := parsed(sent)):
                sent += wire.drain()
                if not parsed(sent):
                    await anyio.sleep(0.001)
        (reply,) = found
        return reply

    async def _put(self, wire: FakeWire, tokens: list[int]) -> None:
        kv = self.tree.kv(tokens)
        options: list[Word] = ["LOGITS", b"%d" % len(tokens)] if self.random.random() < 0.3 else []
        reply = await self._ask(wire, [*self._words("PUT", tokens, cut(kv)), *options])
        assert isinstance(reply, Exception) or sum(reply) == len(cut(kv)), reply

    async def _put_rectangle(self, wire: FakeWire, tokens: list[int]) -> None:
        layers = self.random.choice([(0, 1), (1, 1), (0, 2)])
        heads = self.random.choice([(0, 2), (2, 2), (0, 4), (1, 2)])
        kv = self.tree.kv(tokens)[layers[0] : sum(layers), :, :, heads[0] : sum(heads)]
        words: list[Word] = ["LAYERS", *layers, "HEADS", *heads]
        reply = await self._ask(wire, [*self._words("PUT", tokens, cut(kv)), *words])
        assert isinstance(reply, Exception) or sum(reply) <= len(cut(kv)), reply

    async def _get(self, wire: FakeWire, tokens: list[int]) -> None:
        found = await self._ask(wire, ["KV.SEQ.MATCH", "s", pack_tokens(tokens)])
        first = self.random.randrange(len(tokens))
        words: list[Word] = ["KV.SEQ.GET", "s", pack_tokens(tokens), "FROM", first]
        reply = await self._ask(wire, words)
        matched = reply[0]
        assert matched == found[0], "what matched is kept"
        expected = self.tree.kv(tokens)[:, :, first:matched]
        assert reply[1:] == [layer.tobytes() for layer in expected]

    def _break(self, number: int, tokens: list[int]) -> None:
        data = request(*self._words("PUT", tokens, cut(self.tree.kv(tokens))))
        self.wires[number].feed(data[: self.random.randrange(len(data))])
        self.wires[number].lose()
        self.wires[number] = FakeWire(self.cold.server)

    def _words(self, name: str, tokens: list[int], payloads: list[bytes]) -> list[Word]:
        return [f"KV.SEQ.{name}", "s", pack_tokens(tokens), len(payloads), *payloads]

    def _check(self) -> None:
        server = self.cold.server
        server.cache.check()
        server.sequences.check()
        server.assemblies.check()


@pytest.mark.parametrize("dim", [D, WIDE], ids=["small", "landed"])
@pytest.mark.parametrize("seed", range(4))
async def test_a_get_is_what_was_put_and_nothing_is_lost_count_of(seed: int, dim: int) -> None:
    limits: dict[str, Any] = {
        "maxmemory": 3 << 20,
        "small_value_memory": 1 << 19,
        "reserve_timeout": 20,
    }
    async with cold_server(**limits) as cold:
        tree = Tree(seed, dim)
        players = Players(cold, tree)
        schema: list[Word] = [*SCHEMA[:8], dim, *SCHEMA[9:], "DTYPE", "bfloat16"]
        assert await players._ask(players.wires[0], schema) == b"OK"
        await players.play(120)
        for wire in players.wires:
            wire.lose()
        for assembly in list(cold.server.assemblies._open.values()):
            cold.server.assemblies.drop(assembly)
        await cold.check()
