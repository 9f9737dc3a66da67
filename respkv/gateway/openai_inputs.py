"""What clients may send to the OpenAI endpoints.

All fields of OpenAI's own API are named here. Those that change the answer in a way that this
gateway has not got take only the value that asks for nothing, so that a client is told rather than
given something else than it asked for; those that change nothing in the answer are taken and ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from respkv.gateway.inputs import WHOLE, Input, Seed, Stop, Temperature, TopK, TopP, Word
from respkv.gateway.settings import CHOICES_MAX

MESSAGES_MAX = 4096
METADATA_MAX = 16


def _not_supported(remedy: str) -> PydanticCustomError:
    return PydanticCustomError(
        "not_supported", "this is not supported: {remedy}", {"remedy": remedy}
    )


def _no(value: bool) -> bool:
    if value:
        raise _not_supported("leave it out, or say false")
    return value


def _absent(value: object) -> None:
    if value is not None:
        raise _not_supported("leave it out")


def _empty(value: object) -> object:
    if value:
        raise _not_supported("leave it out")
    return value


def _few(value: object) -> object:
    """Refuse many items before each of them is looked at."""
    if isinstance(value, dict) and len(value) > METADATA_MAX:
        told = "Dictionary should have at most {most} items, not {count}"
        counts = {"most": METADATA_MAX, "count": len(value)}
        raise PydanticCustomError("too_many_items", told, counts)
    return value


# A list with a million wrong items is told by its first: hence fail_fast.
TokenIds = Annotated[list[Annotated[int, Field(ge=0), WHOLE]], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
Prompt = (
    Text
    | TokenIds
    | Annotated[list[Text], Field(min_length=1, max_length=CHOICES_MAX, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=CHOICES_MAX, fail_fast=True)]
)
Ignored = Annotated[str, Field(max_length=1024)]
# Not Literal[False] and Literal[0]: in Python those are equal, in JSON they are not.
No = Annotated[bool, AfterValidator(_no), WithJsonSchema({"const": False, "type": "boolean"})]
Zero = Annotated[int, Field(ge=0, le=0), WHOLE]
One = Annotated[int, Field(ge=1, le=1), WHOLE]
NoPenalty = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[dict[str, int], Field(max_length=0), BeforeValidator(_empty)]
NoItems = Annotated[list[None], Field(max_length=0), BeforeValidator(_empty)]
Absent = Annotated[None, BeforeValidator(_absent)]
# As many and as long as OpenAI takes.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=METADATA_MAX),
    BeforeValidator(_few),
]
# Advice to other servers on how to be quick, whatever it says.
Advice = dict[str, Any]


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
    logprobs: Absent = None
    suffix: Literal[""] | None = None


class TextPart(Input):
    """A part of a message; there are only texts."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Advice | None = None


class ChatMessage(Input):
    """One turn of a conversation.

    An answer of a chat is taken back as it came: with the fields that say what it has not got.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=256, fail_fast=True)]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    refusal: Absent = None
    annotations: NoItems | None = None
    audio: Absent = None
    function_call: Absent = None
    tool_calls: NoItems | None = None


class ResponseFormat(Input):
    """What the answer looks like: a text."""

    type: Literal["text"]


class ChatCompletionRequest(OpenAIRequest):
    """A conversation that the assistant is to go on with."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        None, description="As many as the gateway allows if not given."
    )
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        None, description="The old name of max_completion_tokens, which wins."
    )
    logprobs: No | None = None
    top_logprobs: Zero | None = None
    response_format: ResponseFormat | None = None
    tools: NoItems | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: NoItems | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: Absent = None
    web_search_options: Absent = None
    moderation: Absent = None
    verbosity: Literal["medium"] | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Ignored | None = None
    safety_identifier: Ignored | None = None
    prompt_cache_key: Ignored | None = None
    prompt_cache_options: Advice | None = None
    prompt_cache_retention: Ignored | None = None
    prediction: Advice | None = None
    reasoning_effort: Literal["none"] | None = None
