"""The layers of a prompt, one after the other, while those behind them are on their way."""

import time
from collections.abc import Sequence
from typing import Any, Unpack

from respkv.client.commands import Key, option, unexpected
from respkv.client.connection import Connection
from respkv.client.core import Core
from respkv.client.effects import Operation
from respkv.client.kv import Range
from respkv.client.replies import Reply
from respkv.client.requests import Arg, Buffer, request, writable_bytes
from respkv.client.sequences import (
    ChainOptions,
    Tokens,
    chain_words,
    find_shape,
    portion_words,
    token_bytes,
)
from respkv.errors import ConnectionLost


class LayersHold:
    """One KV.SEQ.GET from its question to its last layer. It keeps a connection until then.

    matched:   tokens of the prompt that are stored.
    num_tokens: of each layer: from the first that was asked for to the last that matched. Of a
                group with a sliding window only those of the window come.
    num_layers: that come.
    logits, hidden: of the prompt's end, if they were asked for and are stored.
    """

    def __init__(
        self,
        core: Core[Any],
        namespace: Key,
        tokens: Tokens,
        *,
        first: int = 0,
        layers: Range | None = None,
        heads: Range | None = None,
        group: Key | None = None,
        logits: bool = False,
        hidden: bool = False,
        deadline_ms: int | None = None,
        into: Sequence[Buffer] | None = None,
        **options: Unpack[ChainOptions],
    ) -> None:
        self.matched = self.num_tokens = self.num_layers = 0
        self.logits: memoryview | None = None
        self.hidden: memoryview | None = None
        self._core = core
        self._namespace, self._group, self._heads = namespace, group, heads
        self._first = first
        self._asked = [
            name for name, is_asked in (("logits", logits), ("hidden", hidden)) if is_asked
        ]
        self._args: list[Arg] = ["KV.SEQ.GET", namespace, token_bytes(tokens)]
        if first:
            self._args += ("FROM", first)
        portion_words(self._args, layers, heads, group)
        self._args += [name.upper() for name in self._asked]
        option(self._args, "DEADLINE", deadline_ms)
        chain_words(self._args, options)
        self._targets = None if into is None else [writable_bytes(each) for each in into]
        self._conn: Connection | None = None
        self._next = 0

    def begin(self) -> Operation[None]:
        """Ask, and wait for how much is stored.

        Raises ServerError, ConnectionLost, TimedOut; nothing is held then.
        Cancelled: nothing is held.
        """
        assert self._conn is None, "a get begins once"
        targets: list[memoryview] = []
        if self._targets is not None:
            targets = [memoryview(b"")] * (1 + len(self._asked)) + self._targets

        def talk(conn: Connection, deadline: float) -> Operation[list[Reply]]:
            yield from conn.begin(request([self._args], targets), deadline)
            found = []
            for number in range(1 + len(self._asked)):
                found.append((yield from conn.take_item(number, deadline)))
            return found

        self._conn, (matched, *parts) = yield from self._core.converse(talk, repeatable=True)
        try:
            self._take_head(matched, parts, self._conn)
        except BaseException:
            self.close()
            raise

    def _take_head(self, matched: Reply, parts: Sequence[Reply], conn: Connection) -> None:
        if not isinstance(matched, int):
            raise unexpected("a number of tokens", matched)
        self.matched = matched
        self.num_tokens = max(0, matched - self._first)
        self.num_layers = conn.num_items() - 1 - len(self._asked)
        for name, part in zip(self._asked, parts, strict=True):
            setattr(self, name, None if part is None else _bulk(part))
        if self._targets is not None and len(self._targets) != self.num_layers:
            raise ValueError(f"into has {len(self._targets)} buffers for {self.num_layers} layers")
        if not self.num_layers:
            self.close()

    def next(self) -> Operation[memoryview | None]:
        """Return the next layer, ``[2, num_tokens, heads, dim]``; None: there is none any more.

        Raises ConnectionLost, TimedOut; ValueError: ``into`` is too small.
        Cancelled: the connection is closed.
        """
        if self._next == self.num_layers:
            return None
        conn = self._conn
        if conn is None:
            raise ConnectionLost("the get was closed before its last layer")
        deadline = time.monotonic() + self._core.settings.timeout_s
        try:
            item = yield from conn.take_item(1 + len(self._asked) + self._next, deadline)
            layer = _bulk(item)
            if self._targets is not None and len(layer) > len(self._targets[self._next]):
                room = len(self._targets[self._next])
                raise ValueError(f"into has {room} bytes, layer {self._next} has {len(layer)}")
        except BaseException:
            self.close()
            raise
        self._next += 1
        if self._next == self.num_layers:
            self.close()
        return layer

    def form(self) -> Operation[tuple[str, tuple[int, ...]]]:
        """Return the dtype of a layer, and its shape.

        Raises ConfigError when the namespace has no schema, and what a call raises.
        """
        is_seated = self._conn is not None
        shape = yield from find_shape(self._core, self._namespace, self._group, is_seated=is_seated)
        return shape.dtype, shape.layer(self.num_tokens, self._heads)

    def close(self) -> None:
        """Give the connection back; it is closed unless the last layer has come."""
        conn, self._conn = self._conn, None
        if conn is not None:
            self._core.pool.give_back(conn)

    def __del__(self) -> None:
        # For a loop that was left early without ``with``: the seat would be taken for good.
        if getattr(self, "_conn", None) is not None:
            self.close()


def _bulk(item: Reply) -> memoryview:
    if item is None:  # there is no state
        return memoryview(b"")
    if not isinstance(item, bytes | memoryview):
        raise unexpected("bytes", item)
    return memoryview(item)


def get(
    core: Core[Any],
    namespace: Key,
    tokens: Tokens,
    *,
    first: int = 0,
    layers: Range | None = None,
    heads: Range | None = None,
    group: Key | None = None,
    logits: bool = False,
    hidden: bool = False,
    deadline_ms: int | None = None,
    into: Sequence[Buffer] | None = None,
    **options: Unpack[ChainOptions],
) -> Operation[LayersHold]:
    """Get what is stored of tokens[first:], layer by layer: ``for layer in client.seq.get(...)``.

    In the asynchronous face it is ``async for layer in await client.seq.get(...)``.

    layers, heads: (first, count); all when None. logits, hidden: of the prompt's end, too.
    group:   of layers, in a hybrid model. Of a sliding window come the tokens of the window alone;
             a state is one item, empty when there is none.
    deadline_ms: what is not in memory by then, and what stands behind it, does not match.
    into:    a writable buffer for each layer, which it lands in without a copy on the way.
    Returns: when the server has said how much matched; the layers come as they are taken, and keep
             a connection of the pool until the last one, or until they are closed.
    Raises:  ServerError: OOM when memory never holds all of it at once.
    """
    hold = LayersHold(
        core,
        namespace,
        tokens,
        first=first,
        layers=layers,
        heads=heads,
        group=group,
        logits=logits,
        hidden=hidden,
        deadline_ms=deadline_ms,
        into=into,
        **options,
    )
    yield from hold.begin()
    return hold


def get_layer(
    core: Core[Any],
    namespace: Key,
    tokens: Tokens,
    layer: int,
    *,
    first: int = 0,
    heads: Range | None = None,
    deadline_ms: int | None = None,
    into: Buffer | None = None,
    **options: Unpack[ChainOptions],
) -> Operation[tuple[int, memoryview]]:
    """Return how many tokens of a prompt matched, and one layer of those from ``first`` on.

    Returns: the tokens matched, and ``[2, matched - first, heads, dim]``.
    """
    hold = LayersHold(
        core,
        namespace,
        tokens,
        first=first,
        layers=(layer, 1),
        heads=heads,
        deadline_ms=deadline_ms,
        into=None if into is None else [into],
        **options,
    )
    try:
        yield from hold.begin()
        found = yield from hold.next()
    finally:
        hold.close()
    assert found is not None
    return hold.matched, found
