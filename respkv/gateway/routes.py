"""What respkv's own endpoints do: generate, statistics, clear, health, metrics."""

from typing import Annotated

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import PlainTextResponse, Response

from respkv.errors import CacheError
from respkv.gateway.answers import generate_response
from respkv.gateway.bodies import body_of
from respkv.gateway.events import GenerateEvents
from respkv.gateway.failures import unavailable
from respkv.gateway.inputs import GenerateRequest
from respkv.gateway.metrics import CONTENT_TYPE
from respkv.gateway.openapi import GENERATING, json_body, responses
from respkv.gateway.outputs import (
    CacheCleared,
    CacheStats,
    GenerateResponse,
    Health,
    Readiness,
)
from respkv.gateway.requests import (
    event_stream,
    generation_of,
    here,
    reply_of,
    whole,
)
from respkv.gateway.state import Gateway

# Threads that wait for the store, of all requests together.
ASKING_MAX = 4

router = APIRouter()
_asking = anyio.CapacityLimiter(ASKING_MAX)

Here = Annotated[Gateway, Depends(here)]


@router.post(
    "/generate",
    summary="Generate text",
    response_model=GenerateResponse,
    responses=responses(*GENERATING, 422, stream=("token", "done", "error")),
    openapi_extra=json_body(GenerateRequest),
    tags=["respkv"],
)
async def generate(
    body: Annotated[GenerateRequest, Depends(body_of(GenerateRequest))],
    request: Request,
    gateway: Here,
) -> Response:
    """Go on with a prompt; one answer, at once or as a stream of `token` events and one `done`."""
    model = gateway.model
    job = await gateway.prompts.of_generate(body, model, request.state.started)
    generation, reply = generation_of(gateway, model, job), reply_of(request, model, "gen")
    if body.stream:
        return event_stream(gateway, generation, GenerateEvents(reply))
    return whole(gateway, generation, lambda: generate_response(reply, generation))


@router.get(
    "/cache/stats",
    summary="Show what the cache has done",
    responses=responses(401, 403, 503),
    tags=["respkv"],
)
async def cache_stats(gateway: Here) -> CacheStats:
    """Show the cache's counts since the start, of this process and of the store behind it."""
    model = gateway.model
    return await anyio.to_thread.run_sync(model.stats, abandon_on_cancel=True, limiter=_asking)


@router.post(
    "/cache/clear",
    summary="Forget all prompts",
    responses=responses(401, 403, 413, 503),
    tags=["respkv"],
)
async def cache_clear(gateway: Here) -> CacheCleared:
    """Forget the KV of all prompts that no request uses now: here, and the model's pages in the store.

    Others that use the same store for the same model have to compute their prompts again, too.
    """
    model = gateway.model
    try:
        freed, pages = await anyio.to_thread.run_sync(
            model.clear, abandon_on_cancel=True, limiter=_asking
        )
    except CacheError as error:
        wait = gateway.settings.retry_after_s
        raise unavailable("store_away", f"the store could not be asked: {error}", wait) from error
    return CacheCleared(status="cleared", local_bytes=freed, store_pages=pages)


@router.get(
    "/healthz",
    summary="Say that the process lives",
    responses=responses(503),
    tags=["operation"],
)
async def healthz(gateway: Here) -> Health:
    """Answer 503 when the model has crashed, as it will not come back: a restart helps."""
    gateway.check_alive()
    return Health(status="alive")


@router.get(
    "/readyz",
    summary="Say whether requests are taken",
    responses=responses(503),
    tags=["operation"],
)
async def readyz(gateway: Here) -> Readiness:
    """Answer 503 while the model is loaded, when it has crashed, and once the gateway is stopped."""
    return Readiness(status="ready", model=gateway.model.name)


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=PlainTextResponse,
    responses=responses(401, 403),
    tags=["operation"],
)
async def metrics(gateway: Here) -> Response:
    """Show counts and times in Prometheus's text format."""
    return Response(gateway.metrics.text(), media_type=CONTENT_TYPE)
