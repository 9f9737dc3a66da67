"""From the bytes of a body to what a route takes, or to an error that says where and why not.

FastAPI would do this, but it keeps the bytes and all that was read of them until the answer is out:
then a few long bodies around short prompts would hold everybody's room for as long as their answers
take. Here nothing of a body outlives the route, which returns as soon as there is a job (requests.py).
And it would list every error: of a body of 4 MiB there may be a million, which take 6 s and 1.3 GB.
"""

import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from difflib import get_close_matches
from email.message import Message
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError

from respkv.gateway.failures import VALUE_CHARS, Refused, shown
from respkv.gateway.inputs import OF_A_FIELD, Input

ERRORS_SHOWN = 3
MESSAGE_CHARS = 160
NO_JSON = "the body cannot be read as JSON"

Kind = TypeVar("Kind", bound=Input)


def body_of(kind: type[Kind]) -> Callable[[Request], Awaitable[Kind]]:
    """Return a dependency that reads a request's body. It raises Refused when that is not of this kind."""

    async def read(request: Request) -> Kind:
        data = b"".join([part async for part in request.stream()])
        check_kind(request.headers.get("content-type", ""), is_empty=not data)
        if not data:
            problem = {"type": "missing", "loc": (), "msg": "Field required"}
            raise refusal([problem], request)
        try:
            given = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "invalid_body", NO_JSON) from error
        del data
        try:
            return kind.model_validate(given)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            raise refusal(problems, request, kind.model_fields) from None

    return read


def check_kind(content_type: str, *, is_empty: bool) -> None:
    """Raise Refused when there is a body and it is not said to be JSON."""
    header = Message()
    header["content-type"] = content_type
    kind = header.get_content_subtype() if header.get_content_maintype() == "application" else ""
    if not (kind == "json" or kind.endswith("+json")) and not is_empty:
        raise Refused(415, "not_json", "the body has to be JSON: content-type: application/json")


def refusal(problems: Sequence[Any], request: Request, known: Collection[str] = ()) -> Refused:
    """Return the error for what pydantic found: 400 where OpenAI says so, else 422.

    known: names of fields, one of which may be meant by one that is not.
    """
    told = [_described(each, known) for each in problems[:ERRORS_SHOWN]]
    more = len(problems) - len(told)
    message = "; ".join(told) + (f"; and {more} more" if more else "")
    status = 400 if request.url.path.startswith("/v1/") else 422
    return Refused(status, "invalid_value", message, param=_param(problems[0]))


def _param(problem: dict[str, Any]) -> str | None:
    """Return the field that a problem is about, such as messages.0.role; None for the whole body."""
    # Between the names there are those of a union's members, which only we know.
    names = [each for at, each in enumerate(problem["loc"]) if at == 0 or _is_name(each)]
    if problem["type"] == OF_A_FIELD:
        names.append(problem["ctx"]["field"])
    return ".".join(shown(each, str) for each in names) or None


def _is_name(part: int | str) -> bool:
    if isinstance(part, int):
        return True
    return part.isidentifier() and part not in ("str", "int", "float", "bool", "list", "dict")


def _described(problem: dict[str, Any], known: Collection[str]) -> str:
    """Return a problem in words, with the value if that is short; nothing else of the body."""
    where, told = _param(problem) or "the body", problem["msg"][:MESSAGE_CHARS]
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(where[:VALUE_CHARS], known, 1) if len(problem["loc"]) == 1 else []
        meant = "".join(f"; is {each!r} meant?" for each in near)
        return f"{where}: no such field, so it is not permitted{meant}"
    value = problem.get("input")
    if problem["type"] == OF_A_FIELD:
        value = problem["ctx"].get("value", {})
    is_short = isinstance(value, str | int | float | bool) or value is None
    has_value = is_short and problem["type"] not in ("missing", "not_supported")
    return f"{where}: {told}{f', not {shown(value)}' if has_value else ''}"
