"""What a stream says, event by event, in each of the three formats. No I/O here."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from respkv.gateway.answers import Reply, generate_response, usage_of
from respkv.gateway.failures import Refused
from respkv.gateway.generation import Answer, Generation

HEARTBEAT = b": still here\n\n"
_DONE = b"data: [DONE]\n\n"


class Events(Protocol):
    """The format of a stream: what is sent when."""

    def begin(self, generation: Generation) -> Iterator[bytes]:
        """Yield what comes before any text."""
        ...

    def piece(self, answer: Answer, text: str) -> Iterator[bytes]:
        """Yield new text of an answer, and its end if it has ended."""
        ...

    def end(self, generation: Generation) -> Iterator[bytes]:
        """Yield what comes after the last answer's end."""
        ...

    def failed(self, failure: Refused) -> Iterator[bytes]:
        """Yield an error that came too late for a status."""
        ...


# What some readers take for the end of a line (as str.splitlines does), and JSON does not escape.
_LINE_ENDS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}


def event(data: object, name: str | None = None) -> bytes:
    """Return one server-sent event, whose data is one line to every reader."""
    head = f"event: {name}\n" if name else ""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS)
    return f"{head}data: {text}\n\n".encode()


@dataclass(frozen=True, slots=True)
class GenerateEvents:
    """The stream of /generate: `token` events with text, then `done` with the whole response."""

    reply: Reply

    def begin(self, generation: Generation) -> Iterator[bytes]:
        """Yield nothing."""
        yield from ()

    def piece(self, answer: Answer, text: str) -> Iterator[bytes]:
        """Yield a token event if there is text."""
        if text:
            yield event({"text": text}, "token")

    def end(self, generation: Generation) -> Iterator[bytes]:
        """Yield what a client gets that does not stream."""
        yield event(generate_response(self.reply, generation).model_dump(), "done")

    def failed(self, failure: Refused) -> Iterator[bytes]:
        """Yield an error event."""
        yield event(failure.body(), "error")


@dataclass(frozen=True, slots=True)
class OpenAIEvents:
    """A stream of OpenAI's: chunks, and `[DONE]`. is_chat: the newer of its two formats."""

    reply: Reply
    is_chat: bool
    has_usage: bool

    def begin(self, generation: Generation) -> Iterator[bytes]:
        """Yield the assistant's role for each answer to a conversation."""
        if self.is_chat:
            for index in range(len(generation.answers)):
                yield self._chunk(_delta(index, {"role": "assistant", "content": ""}, None))

    def piece(self, answer: Answer, text: str) -> Iterator[bytes]:
        """Yield a chunk, and with OpenAI's newer format one more for the end."""
        reason = answer.finish_reason
        if not self.is_chat:
            choice = {"index": answer.index, "text": text, "logprobs": None}
            yield self._chunk(choice | {"finish_reason": reason})
            return
        if text:
            yield self._chunk(_delta(answer.index, {"content": text}, None))
        if reason is not None:
            yield self._chunk(_delta(answer.index, {}, reason))

    def end(self, generation: Generation) -> Iterator[bytes]:
        """Yield the usage, if it was asked for, and that it is over."""
        if self.has_usage:
            yield event(self._frame([]) | {"usage": usage_of(generation).model_dump()})
        yield _DONE

    def failed(self, failure: Refused) -> Iterator[bytes]:
        """Yield the error as a chunk, and that it is over."""
        yield event(failure.body())
        yield _DONE

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        frame = self._frame([choice])
        return event(frame | {"usage": None} if self.has_usage else frame)

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.reply.id,
            "object": "chat.completion.chunk" if self.is_chat else "text_completion",
            "created": self.reply.created,
            "model": self.reply.model,
            "choices": choices,
        }


def _delta(index: int, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
