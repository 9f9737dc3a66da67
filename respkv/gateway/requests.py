"""What the routes that generate have in common."""

from collections.abc import Callable

from fastapi import Request

from respkv.gateway.answers import Reply
from respkv.gateway.events import Events
from respkv.gateway.generation import Generation, Job
from respkv.gateway.model import Model
from respkv.gateway.outputs import Output
from respkv.gateway.state import Gateway
from respkv.gateway.streaming import EventStream, WholeAnswer


def here(request: Request) -> Gateway:
    """Return the gateway that a request came to."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway


def reply_of(request: Request, model: Model, prefix: str) -> Reply:
    """Return what every part of the answer to a request says."""
    return Reply(f"{prefix}-{request.state.request_id}", model.name, int(request.state.wall))


def generation_of(gateway: Gateway, model: Model, job: Job) -> Generation:
    """Return a generation that nobody has begun yet."""
    return Generation(model.loop, job, model.coder.decode, gateway.settings.retry_after_s)


def whole(gateway: Gateway, generation: Generation, written: Callable[[], Output]) -> WholeAnswer:
    """Return a generation as one answer. written: makes its body, when all of it is there."""
    return WholeAnswer(generation, written, lambda: gateway.metrics.generated(generation))


def event_stream(gateway: Gateway, generation: Generation, events: Events) -> EventStream:
    """Return a generation as a stream."""
    return EventStream(
        generation,
        events,
        gateway.settings.heartbeat_s,
        lambda: gateway.metrics.generated(generation),
    )
