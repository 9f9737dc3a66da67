"""OpenAI's endpoints, as far as a model that continues texts can serve them."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from starlette.responses import Response

from respkv.gateway.answers import chat_completion, completion
from respkv.gateway.bodies import body_of
from respkv.gateway.events import OpenAIEvents
from respkv.gateway.openai_inputs import ChatCompletionRequest, CompletionRequest, OpenAIRequest
from respkv.gateway.openai_outputs import ChatCompletion, Completion, Model, Models
from respkv.gateway.openapi import GENERATING, json_body, responses
from respkv.gateway.requests import event_stream, generation_of, reply_of, whole
from respkv.gateway.routes import Here
from respkv.gateway.state import Gateway

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.post(
    "/completions",
    summary="Continue texts",
    response_model=Completion,
    responses=responses(*GENERATING, 404, stream=("message",)),
    openapi_extra=json_body(CompletionRequest),
)
async def completions(
    body: Annotated[CompletionRequest, Depends(body_of(CompletionRequest))],
    request: Request,
    gateway: Here,
) -> Response:
    """Go on with one prompt or several, n times each."""
    model = gateway.named_model(body.model)
    job = await gateway.prompts.of_completion(body, model, request.state.started)
    generation, reply = generation_of(gateway, model, job), reply_of(request, model, "cmpl")
    if body.stream:
        events = OpenAIEvents(reply, is_chat=False, has_usage=_has_usage(body))
        return event_stream(gateway, generation, events)
    return whole(gateway, generation, lambda: completion(reply, generation))


@router.post(
    "/chat/completions",
    summary="Continue a conversation",
    response_model=ChatCompletion,
    responses=responses(*GENERATING, 404, stream=("message",)),
    openapi_extra=json_body(ChatCompletionRequest),
)
async def chat_completions(
    body: Annotated[ChatCompletionRequest, Depends(body_of(ChatCompletionRequest))],
    request: Request,
    gateway: Here,
) -> Response:
    """Say what the assistant says next, n times."""
    model = gateway.named_model(body.model)
    job = await gateway.prompts.of_chat(body, model, request.state.started)
    generation, reply = generation_of(gateway, model, job), reply_of(request, model, "chatcmpl")
    if body.stream:
        events = OpenAIEvents(reply, is_chat=True, has_usage=_has_usage(body))
        return event_stream(gateway, generation, events)
    return whole(gateway, generation, lambda: chat_completion(reply, generation))


@router.get("/models", summary="List the models", responses=responses(401, 403, 503))
async def models(gateway: Here) -> Models:
    """List the one model that there is."""
    return Models(data=[_model(gateway)])


@router.get(
    "/models/{name:path}", summary="Describe a model", responses=responses(401, 403, 404, 503)
)
async def model(name: Annotated[str, Path(min_length=1)], gateway: Here) -> Model:
    """Describe the model if that is its name."""
    gateway.named_model(name)
    return _model(gateway)


def _model(gateway: Gateway) -> Model:
    model = gateway.model
    return Model(id=model.name, created=model.created)


def _has_usage(body: OpenAIRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)
