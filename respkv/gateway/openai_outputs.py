"""What clients get from the OpenAI endpoints."""

from typing import Literal

from respkv.gateway.outputs import Count, FinishReason, Output


class PromptTokensDetails(Output):
    """cached_tokens: of the prompt, how many were not computed."""

    cached_tokens: Count


class Usage(Output):
    """Tokens of a request, all choices together; a prompt is counted once."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(Output):
    """One answer."""

    index: Count
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class Completion(Output):
    """The answers to a prompt; in a stream, what is new of one of them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: Count
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class AssistantMessage(Output):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Output):
    """One answer."""

    index: Count
    message: AssistantMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(Output):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: Count
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(Output):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: Count
    owned_by: Literal["respkv"] = "respkv"


class Models(Output):
    """The models: one."""

    object: Literal["list"] = "list"
    data: list[Model]
