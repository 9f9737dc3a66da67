"""``client.seq`` of both faces: prompts in, matches, puts and layers out.

As in commands.py, names, arguments and results are written once, where the commands and operations
are, and a face makes its methods of them.
"""

import inspect
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, get_args

from respkv.client import commands, layers, retention, sequences
from respkv.client.commands import Command
from respkv.client.core import Core
from respkv.client.effects import Operation
from respkv.client.layers import LayersHold
from respkv.client.views import as_torch
from respkv.page import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

    from respkv.client.aio import AsyncClient
    from respkv.client.sync import Client

P = ParamSpec("P")
T = TypeVar("T")
Operate = Callable[Concatenate[Core[Any], P], Operation[T]]


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

    def tensors(self) -> "Iterator[torch.Tensor]":
        """Yield the layers as CPU tensors ``[2, num_tokens, heads, dim]``, without a copy.

        Of latents ``[num_tokens, dim]``, of a state ``[bytes]`` uint8. They keep the memory that
        they are made of. If the schema is not known yet, asking for it takes one more connection.
        Raises ConfigError when the namespace has none.
        """
        dtype, shape = self._client._run(self._hold.form())
        for layer in self:
            yield _tensor(layer, dtype, shape)

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

    async def tensors(self) -> "AsyncIterator[torch.Tensor]":
        """Yield the layers as tensors; see ``Layers.tensors``."""
        dtype, shape = await self._client._run(self._hold.form())
        async for layer in self:
            yield _tensor(layer, dtype, shape)

    async def close(self) -> None:
        """Take no more layers."""
        self._hold.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._hold.close()


def _tensor(layer: memoryview, dtype: str, shape: tuple[int, ...]) -> "torch.Tensor":
    # Of a sliding window there are fewer tokens than of the prompt; of a state, nothing or all.
    if not layer.nbytes:
        shape = tuple(0 if axis == max(len(shape) - 3, 0) else n for axis, n in enumerate(shape))
    elif len(shape) > 1:
        tokens = max(len(shape) - 3, 0)
        row = math.prod(n for axis, n in enumerate(shape) if axis != tokens) * DTYPE_BYTES[dtype]
        shape = (*shape[:tokens], layer.nbytes // row, *shape[tokens + 1 :])
    return as_torch(layer, dtype, shape)


def _describe(method: Callable[..., Any], source: Callable[..., Any], returned: Any) -> None:
    """Give a method the name, docstring and signature of an operation, whose core it brings."""
    method.__name__, method.__doc__ = source.__name__, source.__doc__
    signature = inspect.signature(source)
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    _, *parameters = signature.parameters.values()
    found = get_args(signature.return_annotation)
    vars(method)["__signature__"] = signature.replace(
        parameters=[self, *parameters], return_annotation=returned or found[-1]
    )


def _method(build: Callable[P, Command[T]]) -> "Callable[Concatenate[Sequences, P], T]":
    def method(self: "Sequences", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._client._run(self._client._core.call(build(*args, **kwargs)))

    commands.describe(method, build)
    return method


def _operation(operate: "Operate[P, T]") -> "Callable[Concatenate[Sequences, P], T]":
    def method(self: "Sequences", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._client._run(operate(self._client._core, *args, **kwargs))

    _describe(method, operate, None)
    return method


def _stream(operate: "Operate[P, LayersHold]") -> "Callable[Concatenate[Sequences, P], Layers]":
    def method(self: "Sequences", /, *args: P.args, **kwargs: P.kwargs) -> Layers:
        hold = self._client._run(operate(self._client._core, *args, **kwargs))
        return Layers(self._client, hold)

    _describe(method, operate, Layers)
    return method


class Sequences:
    """``Client.seq``: prompts as tokens. The server makes the ids and finds the pages."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    match = _operation(sequences.match)
    explain = _method(retention.explain_prompt)
    retain = _method(retention.retain_prompt)
    put = _operation(sequences.put)
    put_layer = _operation(sequences.put_layer)
    get = _stream(layers.get)
    get_layer = _operation(layers.get_layer)


def _async_method(
    build: Callable[P, Command[T]],
) -> "Callable[Concatenate[AsyncSequences, P], Coroutine[Any, Any, T]]":
    async def method(self: "AsyncSequences", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._client._run(self._client._core.call(build(*args, **kwargs)))

    commands.describe(method, build)
    return method


def _async_operation(
    operate: "Operate[P, T]",
) -> "Callable[Concatenate[AsyncSequences, P], Coroutine[Any, Any, T]]":
    async def method(self: "AsyncSequences", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._client._run(operate(self._client._core, *args, **kwargs))

    _describe(method, operate, None)
    return method


def _async_stream(
    operate: "Operate[P, LayersHold]",
) -> "Callable[Concatenate[AsyncSequences, P], Coroutine[Any, Any, AsyncLayers]]":
    async def method(self: "AsyncSequences", /, *args: P.args, **kwargs: P.kwargs) -> AsyncLayers:
        hold = await self._client._run(operate(self._client._core, *args, **kwargs))
        return AsyncLayers(self._client, hold)

    _describe(method, operate, AsyncLayers)
    return method


class AsyncSequences:
    """``AsyncClient.seq``; see ``Sequences``.

    Cancelled: as for every call of the client; a put may have stored any number of pages.
    """

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    match = _async_operation(sequences.match)
    explain = _async_method(retention.explain_prompt)
    retain = _async_method(retention.retain_prompt)
    put = _async_operation(sequences.put)
    put_layer = _async_operation(sequences.put_layer)
    get = _async_stream(layers.get)
    get_layer = _async_operation(layers.get_layer)
