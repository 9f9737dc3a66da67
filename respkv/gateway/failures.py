"""Every way in which the gateway says no, with one shape of body: OpenAI's error object."""

from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

# Of what a client sent, an error tells so much; and it is no longer than this, whatever it is about.
VALUE_CHARS = 80
MESSAGE_CHARS = 1000
_TYPES = {
    **{400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"},
    **{
        404: "not_found_error",
        405: "invalid_request_error",
        408: "timeout_error",
        413: "invalid_request_error",
    },
    **{415: "invalid_request_error", 422: "invalid_request_error", 503: "overloaded_error"},
}


class Refused(Exception):
    """A request that is answered with an error.

    status: of HTTP; code: a word for programs; param: the field it is about, if it is about one.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return what the client reads."""
        return error_body(self.status, self.code, self.message, self.param)

    def response(self) -> JSONResponse:
        """Return it as a response."""
        return JSONResponse(self.body(), self.status, self.headers)


def shown(value: object, write: Callable[[object], str] = repr) -> str:
    """Return what a client sent as an error tells it: its beginning, if it is long."""
    text = write(value[: VALUE_CHARS + 1] if isinstance(value, str) else value)
    return text if len(text) <= VALUE_CHARS else f"{text[:VALUE_CHARS]}..."


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error. Lone surrogates, which JSON can escape, are written as escapes."""
    if param is not None:  # the name of a field, which a client may have made up
        param = clean(param)
    if len(message) > MESSAGE_CHARS:
        message = f"{message[:MESSAGE_CHARS]}..."
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": clean(message), "type": kind, "param": param, "code": code}}


def unavailable(code: str, message: str, retry_after_s: int) -> Refused:
    """Return a 503 that says when to come again."""
    return Refused(503, code, message, headers={"retry-after": str(retry_after_s)})


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8: JSON can escape lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clean(text: str) -> str:
    """Return a text that can be written as UTF-8, with escapes for what cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
