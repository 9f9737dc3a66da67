"""Publishes events over ZMQ as vLLM does: numbered batches, and the last of them again on request.

Messages are [topic, number, batch]; the number, 8 bytes big-endian, counts the batches of all topics.
Who sees a gap asks the other socket for what came since, and gets [number, batch] for each batch that
is still kept, and in the end [-1, empty].

There is no thread: a PUB socket never waits (a subscriber that is too slow misses batches, which
their numbers say), and the ROUTER that answers is read when its descriptor says so. The descriptor
of a ZMQ socket tells of changes alone, hence everything is read before the next wait, and the wait
is not for ever. Events wait in a bounded queue (engine/events.py); when it was too short, one number
is left out.
"""

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.lowlevel
import msgspec
import zmq

from respkv.engine.events import Event, Listener
from respkv.errors import ConfigError
from respkv.page import namespace_of
from respkv.server.vllm_events import Batch, Translator, number_of, whole

if TYPE_CHECKING:
    from respkv.config import Config
    from respkv.server.state import Server

logger = logging.getLogger(__name__)

EVENTS_PER_STEP = 200  # become a batch, or one for each of their topics; some milliseconds
REPLAYS_MAX = 8  # that are answered at a time; others wait
REPLAY_BATCHES_PER_STEP = 32
STALL_S = 5.0  # an asker that takes nothing for so long is not answered further
PAUSE_S = 0.01
LOOK_S = 1.0
KEPT_BYTES_MAX = 256 << 20  # of the batches that can be sent again
ANSWERS_MAX = 64  # batches that wait for one asker; a batch may have half a megabyte
REQUEST_BYTES_MAX = 4096  # of a frame, or a stranger could fill the memory with one
_END = (-1).to_bytes(8, "big", signed=True)


class Publisher:
    """The sockets, and the batches that are kept.

    Raises ConfigError when an endpoint cannot be had.
    """

    def __init__(self, server: "Server", config: "Config") -> None:
        self._server = server
        self._namespaces = frozenset(config.event_namespaces())
        self._topic = config.events_topic.encode()
        self._translator = Translator(
            number_of if config.events_int_hashes else whole,
            has_tokens=config.events_tokens,
            has_files=config.has_files,
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._kept: deque[_Kept] = deque()
        self._kept_max, self._kept_bytes = config.events_buffer, 0
        self._number = 0  # of the next batch
        self._missed = 0  # events that have already cost a number
        self.num_events = self.num_batches = self.num_replays = self.num_bad_requests = 0
        self._news = anyio.Event()
        self._named = set(self._namespaces)  # namespaces that have been told of by their names
        self.listener = Listener(self._wants, lambda: self._named, lambda: self._news.set())
        self._context = zmq.Context()
        self._context.setsockopt(zmq.MAXMSGSIZE, REQUEST_BYTES_MAX)
        self._replays: zmq.Socket[bytes] | None = None
        self.replay_endpoint = ""
        try:
            self._publisher = self._context.socket(zmq.PUB)
            self._publisher.set_hwm(config.events_hwm)
            self.endpoint = _open(self._publisher, "events-endpoint", config.events_endpoint)
            if config.events_replay_endpoint:
                self._replays = self._context.socket(zmq.ROUTER)
                self._replays.setsockopt(
                    zmq.ROUTER_MANDATORY, 1
                )  # a full queue is an error, not a loss
                self._replays.setsockopt(zmq.SNDHWM, ANSWERS_MAX)
                self.replay_endpoint = _open(
                    self._replays, "events-replay-endpoint", config.events_replay_endpoint
                )
        except BaseException:
            self.close()
            raise
        logger.log(
            20, "events on %s", " and ".join(filter(None, [self.endpoint, self.replay_endpoint]))
        )

    @property
    def num_buffered(self) -> int:
        """How many batches can be sent again."""
        return len(self._kept)

    def close(self) -> None:
        """Close the sockets; what has not left is lost."""
        self._context.destroy(linger=0)

    async def run(self) -> None:
        """Publish, and answer who missed something, until cancelled.

        Begins with what is there already, behind the news that all before is void: numbers begin at
        0 with each start of the server.
        """
        self.listener.is_on = True
        self._server.events.add(self.listener)
        try:
            async with anyio.create_task_group() as tasks:
                if self._replays is not None:
                    tasks.start_soon(self._serve, self._replays)
                await self._announce()
                while True:
                    self._news = anyio.Event()
                    if not self.listener.queue:
                        await self._news.wait()
                    self._publish(self.listener.take(EVENTS_PER_STEP))
                    await anyio.lowlevel.checkpoint()
        finally:
            self.listener.is_on = False
            self._server.events.changed()

    # -- publishing ---------------------------------------------------------------------------

    def _wants(self, namespace: bytes) -> bool:
        return not self._namespaces or namespace in self._namespaces

    async def _announce(self) -> None:
        """Tell of every page that is there."""
        cache, events = self._server.cache, self._server.events
        entries = [each for each in cache.entries.values() if each.kind == "kvpage"]
        names = {namespace_of(each.key) for each in entries}.union(
            cache.namespaces.names(), self._namespaces
        )
        self._named.update(filter(self._wants, names))
        self._publish([Event("cleared", name, 0) for name in sorted(self._named)])
        for start in range(0, len(entries), EVENTS_PER_STEP):
            await anyio.lowlevel.checkpoint()
            self._publish(
                [
                    events.describe("stored", each, events.tier_of(each), "present", 0)
                    for each in entries[start : start + EVENTS_PER_STEP]
                    if each.position >= 0 and self._wants(namespace_of(each.key))
                ]
            )

    def _publish(self, events: Sequence[Event]) -> None:
        """Send events, those of each namespace in their order."""
        if self.listener.dropped != self._missed:
            self._missed = self.listener.dropped
            self._number += 1
            logger.warning("events came too fast: %d were not published", self._missed)
        by_topic: dict[bytes, list[Event]] = {}
        for event in events:
            by_topic.setdefault(self._topic_of(event.namespace), []).append(event)
        for topic, own in by_topic.items():
            told = self._translator.translate(own)
            if told:
                self.num_events += len(own)
                self._send(topic, self._encoder.encode(Batch(time.time(), told)))

    def _topic_of(self, namespace: bytes) -> bytes:
        return self._topic.replace(b"{namespace}", namespace)

    def _send(self, topic: bytes, batch: bytes) -> None:
        number = self._number
        self._number += 1
        self.num_batches += 1
        self._kept.append(_Kept(number, topic, batch))
        self._kept_bytes += len(batch)
        while len(self._kept) > self._kept_max or self._kept_bytes > KEPT_BYTES_MAX:
            self._kept_bytes -= len(self._kept.popleft().batch)
        self._publisher.send_multipart([topic, number.to_bytes(8, "big"), batch], zmq.NOBLOCK)

    # -- sending again ------------------------------------------------------------------------

    async def _serve(self, socket: "zmq.Socket[bytes]") -> None:
        """Answer requests, some at a time, until cancelled."""
        places = anyio.Semaphore(REPLAYS_MAX)
        async with anyio.create_task_group() as tasks:
            while True:
                await places.acquire()
                asked = None
                while asked is None:
                    asked = self._read(await _receive(socket))
                    # Or a flood of what is no request would hold up the whole server.
                    await anyio.lowlevel.checkpoint()
                tasks.start_soon(self._answer, socket, asked, places)

    def _read(self, frames: list[bytes]) -> "_Asked | None":
        """Return what is asked for: a number, and of a client that knows topics the start of one."""
        sender, *words = frames
        has_delimiter = words[:1] == [b""]
        words = words[has_delimiter:]
        if not 1 <= len(words) <= 2 or len(words[0]) != 8:
            self.num_bad_requests += 1
            return None
        envelope = [sender, b""] if has_delimiter else [sender]
        return _Asked(envelope, int.from_bytes(words[0], "big"), b"".join(words[1:]))

    async def _answer(
        self, socket: "zmq.Socket[bytes]", asked: "_Asked", places: anyio.Semaphore
    ) -> None:
        """Send what is kept from a number on, then the end. Who takes nothing is left alone.

        What is published meanwhile is not sent again, or there might never be an end.
        """
        self.num_replays += 1
        try:
            following, until = asked.number, self._number
            while kept := self._kept_from(following, until):
                for each in kept:
                    if each.topic.startswith(asked.topic) and not await _push(
                        socket, [*asked.envelope, each.number.to_bytes(8, "big"), each.batch]
                    ):
                        return
                following = kept[-1].number + 1
                await anyio.lowlevel.checkpoint()
            await _push(socket, [*asked.envelope, _END, b""])
        finally:
            places.release()

    def _kept_from(self, number: int, until: int) -> list["_Kept"]:
        """Return some batches from a number on. It is looked for anew, as old ones go meanwhile."""
        kept = self._kept
        start = bisect_left(kept, number, key=attrgetter("number"))
        stop = min(start + REPLAY_BATCHES_PER_STEP, len(kept))
        # Each by its place: to come to it from the first would take long in a long buffer.
        return [each for at in range(start, stop) if (each := kept[at]).number < until]


class _Kept(NamedTuple):
    number: int
    topic: bytes
    batch: bytes


class _Asked(NamedTuple):
    envelope: list[bytes]
    number: int
    topic: bytes


async def _receive(socket: "zmq.Socket[bytes]") -> list[bytes]:
    """Wait for a message."""
    while True:
        try:
            return socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            with anyio.move_on_after(LOOK_S):
                await anyio.wait_readable(socket.FD)


async def _push(socket: "zmq.Socket[bytes]", frames: list[bytes]) -> bool:
    """Send a message as soon as there is room for it; False when its receiver does not take it."""
    give_up = anyio.current_time() + STALL_S
    while anyio.current_time() < give_up:
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            await anyio.sleep(PAUSE_S)
        except zmq.ZMQError:  # it has gone
            return False
        else:
            return True
    return False


def _open(socket: "zmq.Socket[bytes]", name: str, endpoint: str) -> str:
    """Bind or connect a socket; return where it is."""
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    try:
        if endpoint.startswith(">"):
            socket.connect(endpoint[1:])
        else:
            socket.bind(endpoint.removeprefix("@"))
    except zmq.ZMQError as error:
        raise ConfigError(f"{name} = {endpoint!r}: {zmq.strerror(error.errno or 0)}") from error
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
