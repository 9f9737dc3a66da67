"""What clients get from the endpoints that are respkv's own."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0)]
FinishReason = Literal["stop", "length"]


class Output(BaseModel):
    """What goes to a client; every field is always there."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        json_schema_serialization_defaults_required=True,
    )


class ErrorDetail(Output):
    """What went wrong. code: a word for programs; param: the field it is about."""

    message: str
    type: str
    param: str | None
    code: str


class Error(Output):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class RequestTimings(Output):
    """Where the time went, in milliseconds; ttft is until the first token, tokenizing and waiting included."""

    tokenize: Milliseconds
    queue: Milliseconds
    cache_lookup: Milliseconds
    ttft: Milliseconds
    decode: Milliseconds
    total: Milliseconds
    prefix_tokens_saved: Count = Field(description="Tokens of the prompt that were not computed.")


class GenerateResponse(Output):
    """What the model went on with."""

    id: str
    model: str
    text: str
    finish_reason: FinishReason
    prompt_tokens: Count
    new_tokens: Count
    latency_ms: Milliseconds
    tokens_per_sec: Annotated[float, Field(ge=0)]
    timings: RequestTimings


class CacheStats(Output):
    """The cache since the start. Counts of the store are 0 while it cannot be asked."""

    cache_size: Count = Field(description="Pages that are kept: of the store and of this process.")
    hits: Count = Field(description="Requests of which at least one token was found.")
    misses: Count
    hit_rate: Annotated[float, Field(ge=0, le=1)]
    total_requests: Count
    evictions_lru: Count = Field(
        description="What had to make room, in the store and in this process."
    )
    evictions_ttl: Count = Field(description="What has lapsed in the store.")
    cached_tokens_reused: Count
    local_tokens_reused: Count = Field(description="Of those, from this process's own memory.")
    prompt_tokens: Count
    prompt_tokens_computed: Count
    tokens_generated: Count
    running: Count
    waiting: Count
    rejected: Count
    local_blocks: Count
    local_bytes: Count
    store_reachable: bool
    store_pages: Count
    store_bytes: Count
    load_errors: Count


class CacheCleared(Output):
    """What was forgotten."""

    status: Literal["cleared"]
    local_bytes: Count
    store_pages: Count


class Health(Output):
    """status: alive, and as long as it answers nothing else."""

    status: Literal["alive"]


class Readiness(Output):
    """The model is loaded and takes requests."""

    status: Literal["ready"]
    model: str
