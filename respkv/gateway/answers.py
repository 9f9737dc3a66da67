"""The bodies of complete answers, in each of the three formats."""

import time
from dataclasses import dataclass

from respkv.gateway.generation import Answer, Generation
from respkv.gateway.openai_outputs import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    PromptTokensDetails,
    Usage,
)
from respkv.gateway.outputs import FinishReason, GenerateResponse, RequestTimings


@dataclass(frozen=True, slots=True)
class Reply:
    """What every part of an answer says. created: seconds since 1970."""

    id: str
    model: str
    created: int


def generate_response(reply: Reply, generation: Generation) -> GenerateResponse:
    """Return the response of /generate; everything is counted from when the request came in."""
    (answer,) = generation.answers
    started = generation.job.started
    total_s = time.perf_counter() - started
    ttft_s = answer.first_s - started
    decode_s = answer.last_s - answer.first_s
    return GenerateResponse(
        id=reply.id,
        model=reply.model,
        text=answer.text,
        finish_reason=_reason(answer),
        prompt_tokens=generation.job.prompt_tokens,
        new_tokens=answer.num_tokens,
        latency_ms=_ms(total_s),
        tokens_per_sec=round(answer.num_tokens / total_s, 3),
        timings=RequestTimings(
            tokenize=_ms(generation.job.tokenize_s),
            queue=_ms(answer.queue_s),
            cache_lookup=_ms(answer.lookup_s),
            ttft=_ms(ttft_s),
            decode=_ms(decode_s),
            total=_ms(total_s),
            prefix_tokens_saved=answer.tokens_saved,
        ),
    )


def completion(reply: Reply, generation: Generation) -> Completion:
    """Return the response of /v1/completions."""
    choices = [
        CompletionChoice(index=each.index, text=each.text, finish_reason=_reason(each))
        for each in generation.answers
    ]
    return Completion(
        id=reply.id,
        created=reply.created,
        model=reply.model,
        choices=choices,
        usage=usage_of(generation),
    )


def chat_completion(reply: Reply, generation: Generation) -> ChatCompletion:
    """Return the response of /v1/chat/completions."""
    choices = [
        ChatChoice(
            index=each.index,
            message=AssistantMessage(content=each.text),
            finish_reason=_reason(each),
        )
        for each in generation.answers
    ]
    return ChatCompletion(
        id=reply.id,
        created=reply.created,
        model=reply.model,
        choices=choices,
        usage=usage_of(generation),
    )


def usage_of(generation: Generation) -> Usage:
    """Return what a request has used."""
    prompt, new = generation.job.prompt_tokens, generation.new_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=generation.tokens_saved),
    )


def _reason(answer: Answer) -> FinishReason:
    assert answer.finish_reason is not None
    return answer.finish_reason


def _ms(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1e3, 3)
