"""What the routes that generate have in common."""

from email.message import Message

from fastapi import Request

from respkv.gateway.answers import Reply
from respkv.gateway.events import Events
from respkv.gateway.failures import Refused
from respkv.gateway.generation import Answer, Generation, Job
from respkv.gateway.model import Model
from respkv.gateway.state import Gateway
from respkv.gateway.streaming import CLIENT_GONE, EventStream, unless_gone


def here(request: Request) -> Gateway:
    """Return the gateway that a request came to."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway


async def json_body(request: Request) -> None:
    """Raise Refused when there is a body and it is not said to be JSON."""
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    kind = header.get_content_subtype() if header.get_content_maintype() == "application" else ""
    if not (kind == "json" or kind.endswith("+json")) and await request.body():
        raise Refused(415, "not_json", "the body has to be JSON: content-type: application/json")


def reply_of(request: Request, model: Model, prefix: str) -> Reply:
    """Return what every part of the answer to a request says."""
    return Reply(f"{prefix}-{request.state.request_id}", model.name, int(request.state.wall))


def generation_of(gateway: Gateway, model: Model, job: Job) -> Generation:
    """Return a generation that nobody has begun yet."""
    return Generation(model.loop, job, model.coder.decode, gateway.settings.retry_after_s)


async def whole(request: Request, gateway: Gateway, generation: Generation) -> None:
    """Wait for all answers. Raises Refused, also when the client has gone: then nobody reads it."""

    async def work() -> None:
        await generation.run(_drop)

    if not await unless_gone(request.receive, work):
        raise Refused(CLIENT_GONE, "client_gone", "the client has gone")
    gateway.metrics.generated(generation)


def event_stream(gateway: Gateway, generation: Generation, events: Events) -> EventStream:
    """Return a generation as a stream."""
    return EventStream(
        generation,
        events,
        gateway.settings.heartbeat_s,
        lambda: gateway.metrics.generated(generation),
    )


async def _drop(answer: Answer, text: str) -> None:
    """Nobody reads along."""
