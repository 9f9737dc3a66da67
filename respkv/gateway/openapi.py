"""The OpenAPI document: what FastAPI makes of the routes, with this gateway's own limits in it.

A client that reads the document knows exactly what this gateway takes: the largest max_tokens, the
name of the model, whether a token is needed. And a test that is generated from it tests just that.
"""

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from respkv.gateway.guard import OPEN_PATHS
from respkv.gateway.inputs import GenerateRequest, Input
from respkv.gateway.openai_inputs import ChatCompletionRequest, CompletionRequest
from respkv.gateway.outputs import Error
from respkv.gateway.state import Gateway

_MEANINGS = {
    400: "It cannot be done as it was asked: no JSON, or over a limit.",
    401: "The bearer token is missing or wrong.",
    403: "A web page of another origin asks, or under a name that is not the gateway's.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too long.",
    415: "The body is not said to be JSON.",
    422: "The body is JSON, but not of this form.",
    500: "The model failed.",
    503: "Not now: the queue is full, the model is being loaded, or the gateway is being stopped.",
}
_SECONDS = {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
_HEADERS = {
    401: {"WWW-Authenticate": {"description": "Bearer", "schema": {"type": "string"}}},
    503: {"Retry-After": _SECONDS},
}
# What every endpoint that generates may answer.
GENERATING = (400, 401, 403, 408, 413, 415, 500, 503)
_NOT_OURS = ("HTTPValidationError", "ValidationError")
_SCHEMA = "#/components/schemas/{model}"
_INPUTS: tuple[tuple[type[Input], Literal["validation"]], ...] = (
    (GenerateRequest, "validation"),
    (CompletionRequest, "validation"),
    (ChatCompletionRequest, "validation"),
)


def responses(*statuses: int, stream: Sequence[str] = ()) -> dict[int | str, dict[str, Any]]:
    """Return what FastAPI is to document beside the success; stream: names of events, if
    it may be a stream; an event without a name is a message."""
    documented: dict[int | str, dict[str, Any]] = {}
    if stream:
        documented[200] = {"content": {"text/event-stream": _stream(stream)}}
    for status in statuses:
        documented[status] = {"model": Error, "description": _MEANINGS[status]}
        if status in _HEADERS:
            documented[status]["headers"] = _HEADERS[status]
    return documented


def json_body(kind: type[Input]) -> dict[str, Any]:
    """Return what is to be documented of a route's body, which bodies.py reads and not FastAPI."""
    schema = {"$ref": _SCHEMA.format(model=kind.__name__)}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def document(app: FastAPI, gateway: Gateway) -> dict[str, Any]:
    """Return the document of a gateway as it is now."""
    made = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = made["components"]["schemas"]
    schemas |= models_json_schema(_INPUTS, ref_template=_SCHEMA)[1]["$defs"]
    for name in _NOT_OURS:
        schemas.pop(name, None)
    has_token = gateway.settings.token is not None
    if has_token:
        scheme = {"type": "http", "scheme": "bearer"}
        made["components"]["securitySchemes"] = {"token": scheme}
    for path, operations in made["paths"].items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                # FastAPI gives errors the type of the success, which of /metrics is text.
                if status >= "400" and "text/plain" in answer.get("content", {}):
                    answer["content"] = {"application/json": answer["content"]["text/plain"]}
            if path.startswith("/v1/"):  # as OpenAI, these say 400
                operation["responses"].pop("422", None)
            operation["responses"].pop("403" if has_token else "401", None)
            if not has_token:
                continue
            if path not in OPEN_PATHS:
                operation["security"] = [{"token": []}]
    _add_limits(schemas, gateway)
    if gateway.loaded is not None:
        (name,) = made["paths"]["/v1/models/{name}"]["get"]["parameters"]
        name["schema"]["enum"] = [gateway.loaded.name]
    return made


def _add_limits(schemas: dict[str, Any], gateway: Gateway) -> None:
    settings, model = gateway.settings, gateway.loaded
    most_new, most_prompt = settings.max_new_tokens, settings.max_prompt_tokens
    if model is not None:
        most_prompt = min(most_prompt, model.tokens_max - 1)
        for name in ("CompletionRequest", "ChatCompletionRequest"):
            _of_kind(schemas[name]["properties"]["model"], "string")["enum"] = [model.name]
    for name, field in (
        ("GenerateRequest", "max_new_tokens"),
        ("CompletionRequest", "max_tokens"),
        ("ChatCompletionRequest", "max_tokens"),
        ("ChatCompletionRequest", "max_completion_tokens"),
    ):
        _of_kind(schemas[name]["properties"][field], "integer")["maximum"] = most_new
    use_cache = schemas["GenerateRequest"]["properties"]["use_cache"]
    if not settings.recompute:
        use_cache["enum"] = [True]
    else:
        most = settings.max_recompute_tokens
        use_cache["description"] += f" Then prompt and answer have at most {most} tokens together."
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        number = _of_kind(schemas[name]["properties"]["n"], "integer")
        number["maximum"] = settings.choices_max
    for prompt in schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]:
        ids = prompt.get("items", {}) if prompt.get("items", {}).get("type") == "array" else prompt
        if ids.get("items", {}).get("type") == "integer":
            ids["maxItems"] = most_prompt
            if model is not None:
                ids["items"]["maximum"] = model.vocab_size - 1


def _stream(names: Sequence[str]) -> dict[str, Any]:
    """Return the media type of events; their data is JSON, or OpenAI's `[DONE]`.

    itemSchema is OpenAPI 3.2's, which 3.1 lets pass.
    """
    properties = {
        "event": {"enum": [*names]},
        "data": {"type": "string", "minLength": 1},
    }
    item = {"type": "object", "properties": properties, "required": ["data"]}
    return {"itemSchema": item | {"additionalProperties": False}}


def _of_kind(field: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the part of a field's schema that is of a kind."""
    found = next(each for each in field.get("anyOf", [field]) if each.get("type") == kind)
    assert isinstance(found, dict)
    return found
