"""What vLLM 0.33 declares for those who read its events, as its own subscriber does, and a reader."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import msgspec
import zmq

Hash = bytes | int


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    lookahead_token_ids: list[int] | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[Hash]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


DECODER = msgspec.msgpack.Decoder(type=KVEventBatch)


def stored(hashes: list[Hash], parent: Hash | None, tokens: list[int], medium: str = "CPU") -> Any:
    """Return the event of blocks of 4 tokens that are in a medium now."""
    return BlockStored(hashes, parent, tokens, 4, None, medium, None)


class Sockets:
    """Opens sockets of ZMQ and holds them until ``close``."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._opened: list[zmq.Socket[bytes]] = []

    def open(self, kind: int) -> "zmq.Socket[bytes]":
        """Open a socket."""
        self._opened.append(self._context.socket(kind))
        return self._opened[-1]

    def close(self) -> None:
        """Close them all."""
        for each in self._opened:
            each.close(linger=0)
        self._context.term()


class Subscriber:
    """A SUB socket, and a DEALER for what was missed."""

    def __init__(self, sockets: Sockets, info: dict[str, str], topic: bytes) -> None:
        self._socket = sockets.open(zmq.SUB)
        self._socket.connect(info["kv_events_endpoint"])
        self._socket.subscribe(topic)
        self._asking = sockets.open(zmq.DEALER)
        if info["kv_events_replay_endpoint"]:
            self._asking.connect(info["kv_events_replay_endpoint"])

    def subscribe(self, topic: bytes) -> None:
        """Hear one more topic."""
        self._socket.subscribe(topic)

    def unsubscribe(self, topic: bytes) -> None:
        """Hear a topic no more."""
        self._socket.unsubscribe(topic)

    def frames(self, timeout_ms: int = 60_000) -> list[bytes]:
        """Return the frames of the next batch."""
        assert self._socket.poll(timeout_ms), "no batch came"
        return self._socket.recv_multipart()

    def next(self) -> tuple[bytes, int, KVEventBatch]:
        """Return topic, number and contents of the next batch."""
        topic, number, batch = self.frames()
        assert len(number) == 8
        return topic, int.from_bytes(number, "big"), DECODER.decode(batch)

    def events(self, count: int) -> list[Any]:
        """Return the events of so many batches and more, until there are so many events."""
        found: list[Any] = []
        while len(found) < count:
            found += self.next()[2].events
        return found

    def is_quiet(self) -> bool:
        """Whether nothing more comes for a while."""
        return not self._socket.poll(100)

    def replay(self, start: int, *topic: bytes) -> list[tuple[int, KVEventBatch]]:
        """Ask for what came from a number on; return it."""
        self._asking.send_multipart([b"", start.to_bytes(8, "big"), *topic])
        found: list[tuple[int, KVEventBatch]] = []
        while True:
            assert self._asking.poll(60_000), "the replay does not end"
            empty, number, batch = self._asking.recv_multipart()
            assert empty == b""
            if not batch:
                assert int.from_bytes(number, "big", signed=True) == -1
                return found
            found.append((int.from_bytes(number, "big"), DECODER.decode(batch)))

    def ask(self, *frames: bytes) -> Self:
        """Send any request."""
        self._asking.send_multipart(frames)
        return self


@contextmanager
def context() -> Iterator[Sockets]:
    """Yield what opens sockets, which are closed at the end."""
    sockets = Sockets()
    try:
        yield sockets
    finally:
        sockets.close()
