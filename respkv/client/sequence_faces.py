"""``client.seq`` of both faces: prompts in, matches, puts and layers out."""

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from respkv.client import layers as streams
from respkv.client import retention, sequences
from respkv.client.commands import Key
from respkv.client.layers import LayersHold
from respkv.client.requests import Buffer
from respkv.client.retention import Answer, Explanation, RetainPromptOptions
from respkv.client.sequences import (
    ChainOptions,
    KeepOptions,
    Range,
    SequenceMatch,
    SequencePut,
    Tokens,
)

if TYPE_CHECKING:
    from respkv.client.aio import AsyncClient
    from respkv.client.sync import Client


class _Head:
    """What is known of a get before its first layer."""

    _hold: LayersHold

    @property
    def matched(self) -> int:
        """Tokens of the prompt that are stored."""
        return self._hold.matched

    @property
    def num_tokens(self) -> int:
        """Tokens of each layer: from the first asked for to the last that matched."""
        return self._hold.num_tokens

    @property
    def num_layers(self) -> int:
        """Layers that come."""
        return self._hold.num_layers

    @property
    def logits(self) -> memoryview | None:
        """Logits of the prompt's end, if they were asked for, are stored and all of it matched."""
        return self._hold.logits

    @property
    def hidden(self) -> memoryview | None:
        """The hidden state of the prompt's end, likewise."""
        return self._hold.hidden


class Layers(_Head):
    """The layers of a prompt, each ``[2, num_tokens, heads, dim]``, in order, as they come.

    It keeps a connection of the pool until the last layer, or until it is closed.
    """

    def __init__(self, client: "Client", hold: LayersHold) -> None:
        self._client = client
        self._hold = hold

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> memoryview:
        layer = self._client._run(self._hold.next())
        if layer is None:
            raise StopIteration
        return layer

    def close(self) -> None:
        """Take no more layers."""
        self._hold.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncLayers(_Head):
    """The layers of a prompt; see ``Layers``.

    Cancelled: the connection is closed.
    """

    def __init__(self, client: "AsyncClient", hold: LayersHold) -> None:
        self._client = client
        self._hold = hold

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> memoryview:
        layer = await self._client._run(self._hold.next())
        if layer is None:
            raise StopAsyncIteration
        return layer

    async def close(self) -> None:
        """Take no more layers."""
        self._hold.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._hold.close()


class Sequences:
    """``Client.seq``: prompts as tokens. The server makes the ids and finds the pages."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def match(
        self, namespace: Key, tokens: Tokens, **options: Unpack[ChainOptions]
    ) -> SequenceMatch:
        """Find how many tokens of a prompt are stored; see ``sequences.match``."""
        client = self._client
        return client._run(client._core.call(sequences.match(namespace, tokens, **options)))

    def put(
        self,
        namespace: Key,
        tokens: Tokens,
        kv: Any,
        *,
        first: int = 0,
        match: SequenceMatch | None = None,
        layers: Range | None = None,
        heads: Range | None = None,
        group: Key | None = None,
        logits: Buffer | None = None,
        hidden: Buffer | None = None,
        **options: Unpack[KeepOptions],
    ) -> SequencePut:
        """Store the KV of a prompt; pages that are there are not sent. See ``sequences.put``."""
        client = self._client
        return client._run(
            sequences.put(
                client._core,
                namespace,
                tokens,
                kv,
                first=first,
                match=match,
                layers=layers,
                heads=heads,
                group=group,
                logits=logits,
                hidden=hidden,
                **options,
            )
        )

    def put_layer(
        self,
        namespace: Key,
        tokens: Tokens,
        layer: int,
        kv: Any,
        *,
        first: int = 0,
        match: SequenceMatch | None = None,
        heads: Range | None = None,
        **options: Unpack[KeepOptions],
    ) -> SequencePut:
        """Store one layer, ``[2, n, heads, dim]``; pages can be found once all layers have come."""
        client, portion = self._client, (layer, 1)
        return client._run(
            sequences.put(
                client._core,
                namespace,
                tokens,
                kv,
                first=first,
                match=match,
                layers=portion,
                heads=heads,
                **options,
            )
        )

    def get(
        self,
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
    ) -> Layers:
        """Get what is stored of tokens[first:], layer by layer: ``for layer in client.seq.get(...)``.

        layers, heads: (first, count); all when None. logits, hidden: of the prompt's end.
        deadline_ms: what is not in memory by then, and what stands behind it, does not match.
        into:    a writable buffer for each layer, which it lands in without a copy on the way.
        Returns: when the server has said how much matched; the layers come as they are taken.
        Raises:  ServerError: OOM when memory never holds all of it at once.
        """
        hold = LayersHold(
            self._client._core,
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
        self._client._run(hold.begin())
        return Layers(self._client, hold)

    def get_layer(
        self,
        namespace: Key,
        tokens: Tokens,
        layer: int,
        *,
        first: int = 0,
        heads: Range | None = None,
        deadline_ms: int | None = None,
        into: Buffer | None = None,
        **options: Unpack[ChainOptions],
    ) -> tuple[int, memoryview]:
        """Get one layer; see ``layers.get_layer``."""
        client = self._client
        return client._run(
            streams.get_layer(
                client._core,
                namespace,
                tokens,
                layer,
                first=first,
                heads=heads,
                deadline_ms=deadline_ms,
                into=into,
                **options,
            )
        )

    def explain(
        self, namespace: Key, tokens: Tokens, **options: Unpack[ChainOptions]
    ) -> Explanation:
        """Say how many tokens of a prompt are stored, and why not more."""
        client = self._client
        return client._run(
            client._core.call(retention.explain_prompt(namespace, tokens, **options))
        )

    def retain(
        self, namespace: Key, tokens: Tokens, **options: Unpack[RetainPromptOptions]
    ) -> tuple[int, dict[str, Answer]]:
        """Change how the stored pages of a prompt are kept; see ``retention.retain_prompt``."""
        client = self._client
        return client._run(client._core.call(retention.retain_prompt(namespace, tokens, **options)))


class AsyncSequences:
    """``AsyncClient.seq``; see ``Sequences``.

    Cancelled: as for every call of the client; a put may have stored any number of pages.
    """

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    async def match(
        self, namespace: Key, tokens: Tokens, **options: Unpack[ChainOptions]
    ) -> SequenceMatch:
        """Find how many tokens of a prompt are stored; see ``sequences.match``."""
        client = self._client
        return await client._run(client._core.call(sequences.match(namespace, tokens, **options)))

    async def put(
        self,
        namespace: Key,
        tokens: Tokens,
        kv: Any,
        *,
        first: int = 0,
        match: SequenceMatch | None = None,
        layers: Range | None = None,
        heads: Range | None = None,
        group: Key | None = None,
        logits: Buffer | None = None,
        hidden: Buffer | None = None,
        **options: Unpack[KeepOptions],
    ) -> SequencePut:
        """Store the KV of a prompt; pages that are there are not sent. See ``sequences.put``."""
        client = self._client
        return await client._run(
            sequences.put(
                client._core,
                namespace,
                tokens,
                kv,
                first=first,
                match=match,
                layers=layers,
                heads=heads,
                group=group,
                logits=logits,
                hidden=hidden,
                **options,
            )
        )

    async def put_layer(
        self,
        namespace: Key,
        tokens: Tokens,
        layer: int,
        kv: Any,
        *,
        first: int = 0,
        match: SequenceMatch | None = None,
        heads: Range | None = None,
        **options: Unpack[KeepOptions],
    ) -> SequencePut:
        """Store one layer, ``[2, n, heads, dim]``; pages can be found once all layers have come."""
        client, portion = self._client, (layer, 1)
        return await client._run(
            sequences.put(
                client._core,
                namespace,
                tokens,
                kv,
                first=first,
                match=match,
                layers=portion,
                heads=heads,
                **options,
            )
        )

    async def get(
        self,
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
    ) -> AsyncLayers:
        """Get what is stored, layer by layer: ``async for layer in await client.seq.get(...)``."""
        hold = LayersHold(
            self._client._core,
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
        await self._client._run(hold.begin())
        return AsyncLayers(self._client, hold)

    async def get_layer(
        self,
        namespace: Key,
        tokens: Tokens,
        layer: int,
        *,
        first: int = 0,
        heads: Range | None = None,
        deadline_ms: int | None = None,
        into: Buffer | None = None,
        **options: Unpack[ChainOptions],
    ) -> tuple[int, memoryview]:
        """Get one layer; see ``layers.get_layer``."""
        client = self._client
        return await client._run(
            streams.get_layer(
                client._core,
                namespace,
                tokens,
                layer,
                first=first,
                heads=heads,
                deadline_ms=deadline_ms,
                into=into,
                **options,
            )
        )

    async def explain(
        self, namespace: Key, tokens: Tokens, **options: Unpack[ChainOptions]
    ) -> Explanation:
        """Say how many tokens of a prompt are stored, and why not more."""
        client = self._client
        return await client._run(
            client._core.call(retention.explain_prompt(namespace, tokens, **options))
        )

    async def retain(
        self, namespace: Key, tokens: Tokens, **options: Unpack[RetainPromptOptions]
    ) -> tuple[int, dict[str, Answer]]:
        """Change how the stored pages of a prompt are kept; see ``retention.retain_prompt``."""
        client = self._client
        return await client._run(
            client._core.call(retention.retain_prompt(namespace, tokens, **options))
        )
