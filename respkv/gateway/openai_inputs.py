"""What clients may send to the OpenAI endpoints.

All fields of OpenAI's own API are named here. Those that change the answer in a way that this
gateway has not got take only the value that asks for nothing, so that a client is told rather than
given something else than it asked for; those that change nothing in the answer are taken and ignored.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from respkv.gateway.inputs import WHOLE, Input, Seed, Stop, Temperature, TopK, TopP, Word
from respkv.gateway.settings import CHOICES_MAX


def _no(value: bool) -> bool:
    if value:
        raise ValueError("this is not supported: leave it out, or say false")
    return value


TokenIds = Annotated[list[Annotated[int, Field(ge=0), WHOLE]], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Prompt = (
    Text
    | TokenIds
    | Annotated[list[Text], Field(min_length=1, max_length=CHOICES_MAX)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=CHOICES_MAX)]
)
Ignored = Annotated[str, Field(max_length=1024)]
# Not Literal[False] and Literal[0]: in Python those are equal, in JSON they are not.
No = Annotated[bool, AfterValidator(_no), WithJsonSchema({"const": False, "type": "boolean"})]
Zero = Annotated[int, Field(ge=0, le=0), WHOLE]
One = Annotated[int, Field(ge=1, le=1), WHOLE]
NoPenalty = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[dict[str, int], Field(max_length=0)]


class StreamOptions(Input):
    """What a stream brings beside the text."""

    include_usage: bool | None = None
    include_obfuscation: No | None = None


class OpenAIRequest(Input):
    """The fields of both endpoints."""

    model: str | None = Field(None, description="The model of this gateway, if it is named.")
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX), WHOLE] | None = None
    temperature: Temperature | None = Field(None, description="1 if it is not given.")
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Word | None = Field(
        None, description="Pages are shared only with requests of the same salt."
    )
    session: Word | None = Field(None, description="The conversation, whose pages are kept longer.")
    presence_penalty: NoPenalty | None = None
    frequency_penalty: NoPenalty | None = None
    logit_bias: Nothing | None = None
    user: Ignored | None = None


class CompletionRequest(OpenAIRequest):
    """A prompt or several, as texts or as tokens."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        None, description="16 if not given."
    )
    best_of: One | None = None
    echo: No | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None


class TextPart(Input):
    """A part of a message; there are only texts."""

    type: Literal["text"]
    text: str


class ChatMessage(Input):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class ResponseFormat(Input):
    """What the answer looks like: a text."""

    type: Literal["text"]


class ChatCompletionRequest(OpenAIRequest):
    """A conversation that the assistant is to go on with."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        None, description="As many as the gateway allows if not given."
    )
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        None, description="The old name of max_completion_tokens, which wins."
    )
    logprobs: No | None = None
    top_logprobs: Zero | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[None], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Ignored | None = None
    safety_identifier: Ignored | None = None
    prompt_cache_key: Ignored | None = None
    reasoning_effort: Literal["none"] | None = None
