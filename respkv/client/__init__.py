"""The Python client: ``Client`` for blocking code and ``AsyncClient`` for asyncio and trio.

It lives in a worker's environment, so importing it must cost next to nothing: no numpy, no torch,
and anyio only once the asynchronous face is asked for.
"""

from typing import TYPE_CHECKING, Any

from respkv.client.commands import Match
from respkv.client.gpu import GpuPage
from respkv.client.listen import AsyncListening, Listening, Message, PageEvent
from respkv.client.retention import Answer, Explanation
from respkv.client.schemas import LayerGroup
from respkv.client.sequence_faces import AsyncLayers, AsyncSequences, Layers, Sequences
from respkv.client.sequences import SequenceMatch, SequencePut
from respkv.client.sync import Client, GpuLease, Lease, Pipeline, Reservation
from respkv.client.views import as_bytes, as_numpy, as_torch

if TYPE_CHECKING:
    from respkv.client.aio import (
        AsyncClient,
        AsyncGpuLease,
        AsyncLease,
        AsyncPipeline,
        AsyncReservation,
    )

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncGpuLease",
    "AsyncLayers",
    "AsyncLease",
    "AsyncListening",
    "AsyncPipeline",
    "AsyncReservation",
    "AsyncSequences",
    "Client",
    "Explanation",
    "GpuLease",
    "GpuPage",
    "LayerGroup",
    "Layers",
    "Lease",
    "Listening",
    "Match",
    "Message",
    "PageEvent",
    "Pipeline",
    "Reservation",
    "SequenceMatch",
    "SequencePut",
    "Sequences",
    "as_bytes",
    "as_numpy",
    "as_torch",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from respkv.client import aio

    return getattr(aio, name)
