"""The ASGI application of a gateway: routes, the guard around them, and errors of one shape."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from respkv import __version__
from respkv.gateway.failures import Refused, error_body
from respkv.gateway.guard import Guard
from respkv.gateway.openai_routes import router as openai_routes
from respkv.gateway.openapi import document
from respkv.gateway.routes import router as own_routes
from respkv.gateway.state import Gateway

ERRORS_SHOWN = 3
VALUE_CHARS = 80
_CODES = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed"}
_MESSAGES = {400: "the body cannot be read as JSON", 404: "there is nothing at this path"}
_ABOUT = "Text generation with a cache of the KV of prompts."


class _Documented(FastAPI):
    """FastAPI whose OpenAPI document has the gateway's limits, also those of a model that came later."""

    def openapi(self) -> dict[str, Any]:
        """Return the document; made anew each time, as the model may have come meanwhile."""
        gateway = self.state.gateway
        assert isinstance(gateway, Gateway)
        return document(self, gateway)


def make_app(gateway: Gateway) -> ASGIApp:
    """Return the application; the gateway's model may come later, and is the caller's to close."""
    # The pages of documentation would load scripts from elsewhere, and a redirect loses a body.
    app = _Documented(
        title="respkv gateway",
        version=__version__,
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.gateway = gateway
    app.include_router(own_routes)
    app.include_router(openai_routes)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    return Guard(app, gateway)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return error.response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer what FastAPI and Starlette refuse: no such path, no such method, no JSON."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    message = _MESSAGES.get(status, str(error.detail))
    body = error_body(status, _CODES.get(status, "http_error"), message)
    return JSONResponse(body, status, error.headers)


async def _bug(request: Request, error: Exception) -> JSONResponse:
    """Answer for an error that nobody meant; it is raised again, and the server logs it."""
    message = "an error in the gateway; its log has more"
    return JSONResponse(error_body(500, "internal_error", message), 500)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Answer a body that is not what was asked for: 400 where OpenAI says so, else 422."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if any(each["type"] == "json_invalid" for each in problems):
        return JSONResponse(error_body(400, _CODES[400], _MESSAGES[400]), 400)
    shown = [_described(each) for each in problems[:ERRORS_SHOWN]]
    more = len(problems) - len(shown)
    message = "; ".join(shown) + (f"; and {more} more" if more else "")
    param = _param(problems[0])
    status = 400 if request.url.path.startswith("/v1/") else 422
    return JSONResponse(error_body(status, "invalid_value", message, param), status)


def _param(problem: dict[str, Any]) -> str | None:
    """Return the field that a problem is about, such as messages.0.role; None for the whole body."""
    first, *rest = problem["loc"][1:] or [""]  # without "body"
    # Between the names there are those of a union's members, which only we know.
    names = [each for each in rest if isinstance(each, int) or _is_name(each)]
    return ".".join(str(each)[:VALUE_CHARS] for each in (first, *names)) or None


def _is_name(part: str) -> bool:
    return part.isidentifier() and part not in ("str", "int", "float", "bool", "list", "dict")


def _described(problem: dict[str, Any]) -> str:
    """Return a problem in words, with the value if that is short; nothing else of the body."""
    value = problem.get("input")
    is_short = isinstance(value, str | int | float | bool) or value is None
    given = repr(value)[:VALUE_CHARS] if is_short and problem["type"] != "missing" else ""
    where = _param(problem) or "the body"
    return f"{where}: {problem['msg'][: VALUE_CHARS * 2]}{f', not {given}' if given else ''}"
