"""Events over ZMQ, if they are wanted: the way to zmq_events.py, which needs the extra ``events``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from respkv.engine.supervisor import contain
from respkv.errors import ConfigError

if TYPE_CHECKING:
    from respkv.config import Config
    from respkv.server.state import Server
    from respkv.server.zmq_events import Publisher


@contextmanager
def publishing(server: "Server") -> Iterator[None]:
    """Have the sockets while the block runs; nothing is said before ``begin_publishing``.

    Raises ConfigError when there is no pyzmq, or an endpoint cannot be had.
    """
    if not server.config.events_endpoint:
        yield
        return
    publisher = server.publisher = _open(server, server.config)
    try:
        yield
    finally:
        server.publisher = None
        publisher.close()


def begin_publishing(server: "Server") -> None:
    """Say what becomes of pages from now on, and first which are there."""
    if server.publisher is not None:
        server.spawn(contain, server.publisher.run, server.publisher.close)


def event_fields(server: "Server") -> dict[str, object]:
    """Return what INFO says about events."""
    fields: dict[str, object] = {"events_dropped": server.event_channels.listener.dropped}
    publisher = server.publisher
    if publisher is not None:
        fields |= {
            "events_endpoint": publisher.endpoint,
            "events_replay_endpoint": publisher.replay_endpoint,
            "events_published": publisher.num_events,
            "events_batches": publisher.num_batches,
            "events_batches_buffered": publisher.num_buffered,
            "events_unpublished": publisher.listener.dropped,
            "events_replays": publisher.num_replays,
            "events_bad_requests": publisher.num_bad_requests,
        }
    return fields


def _open(server: "Server", config: "Config") -> "Publisher":
    try:
        from respkv.server.zmq_events import Publisher
    except ImportError as error:
        raise ConfigError(
            f"events-endpoint = {config.events_endpoint!r}: publishing needs pyzmq ({error});"
            " install respkv[events], or leave it empty"
        ) from error
    return Publisher(server, config)
