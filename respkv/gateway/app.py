"""The ASGI application of a gateway: routes, the guard around them, and errors of one shape."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from respkv import __version__
from respkv.gateway.bodies import refusal
from respkv.gateway.failures import Refused, error_body
from respkv.gateway.guard import Guard
from respkv.gateway.openai_routes import router as openai_routes
from respkv.gateway.openapi import document
from respkv.gateway.routes import router as own_routes
from respkv.gateway.state import Gateway

_CODES = {404: "not_found", 405: "method_not_allowed"}
_MESSAGES = {404: "there is nothing at this path"}
_ABOUT = "Text generation with a cache of the KV of prompts."


class _Documented(FastAPI):
    """FastAPI whose OpenAPI document has the gateway's limits, also those of a model that came later."""

    def openapi(self) -> dict[str, Any]:
        """Return the document; made once without a model and once with it, as it takes a while."""
        gateway = self.state.gateway
        assert isinstance(gateway, Gateway)
        for model, made in self.state.documents:
            if model is gateway.loaded:
                return dict(made)
        model, made = gateway.loaded, document(self, gateway)
        self.state.documents.append((model, made))
        return dict(made)


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
    app.state.documents = []
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
    """Answer a path that is not as it was asked for; bodies are bodies.py's."""
    assert isinstance(error, RequestValidationError)
    return refusal(
        [{**each, "loc": each["loc"][1:]} for each in error.errors()], request
    ).response()
