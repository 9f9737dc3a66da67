"""Bodies that are hard to read: what is said of them is short, and costs little."""

from typing import Any

import pytest
from pydantic import ValidationError

from respkv.gateway.inputs import GenerateRequest, Input
from respkv.gateway.openai_inputs import ChatCompletionRequest, CompletionRequest
from tests.gateway.conftest import Serve
from tests.gateway.running import Running

USER = {"role": "user", "content": "x"}
LONG = 1 << 19
NUMBERED = {f"{at:06d}": 1 for at in range(100_000)}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve("Hello")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "x", "temperature": "y" * LONG}),
        ("/generate", {"prompt": "x", "max_new_tokens": 1e300}),
        ("/generate", {"prompt": "x", "max_new_tokens": 10**4000}),
        ("/generate", {"prompt": "x", "seed": -(10**4000)}),
        ("/generate", {"prompt": "x", "n" * LONG: 1}),
        ("/generate", {"prompt": "x", "\0" * LONG: 1}),
        ("/generate", {"prompt": "x", "stop": "y" * LONG}),
        ("/generate", {"prompt": "x", "session": "y" * LONG}),
        (COMPLETIONS, {"prompt": [10**4000]}),
        (COMPLETIONS, {"prompt": "x", "model": "\0" * LONG}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 10**4000}),
        (COMPLETIONS, {"prompt": "x", "user": "\N{GRINNING FACE}" * (LONG // 4)}),
        (CHAT, {"messages": [{"role": "y" * LONG, "content": "x"}]}),
        (CHAT, {"messages": [USER], "max_completion_tokens": 10**4000}),
        (CHAT, {"messages": [USER], "metadata": {"x" * LONG: 1}}),
    ],
)
def test_what_a_client_sent_comes_back_in_a_few_words(
    running: Running, path: str, body: dict[str, Any]
) -> None:
    reply = running.post(path, body)
    assert reply.status in (400, 404, 422)
    assert reply.error["message"]
    assert len(reply.body) < 2000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [1.5] * LONG}),
        (CompletionRequest, {"prompt": [[]] * LONG}),
        (CompletionRequest, {"prompt": [[True] * LONG]}),
        (CompletionRequest, {"prompt": ["x", *[1] * LONG]}),
        (CompletionRequest, {"prompt": "x", "stop": [1] * LONG}),
        (CompletionRequest, {"prompt": "x", "logit_bias": NUMBERED}),
        (ChatCompletionRequest, {"messages": [{}] * LONG}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [1] * LONG}]}),
        (ChatCompletionRequest, {"messages": [{**USER, **NUMBERED}]}),
        (ChatCompletionRequest, {"messages": [USER], "metadata": NUMBERED}),
        (ChatCompletionRequest, {"messages": [USER], "tools": [1] * LONG}),
        (ChatCompletionRequest, {"messages": [USER], "modalities": [1] * LONG}),
        (GenerateRequest, NUMBERED),
        (GenerateRequest, {"prompt": "x", "stop": ["x"] * 3 + [1] * LONG}),
    ],
)
def test_of_many_errors_few_are_found(kind: type[Input], body: dict[str, Any]) -> None:
    # All of them take seconds to list, and more memory than all bodies may have.
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 24


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            "messages.0.content",
        ),
        (CHAT, {"messages": [USER], "model": "\udfff"}, "model"),
        (CHAT, {"messages": [USER], "metadata": {"a": "\ud800"}}, "metadata.a"),
        (COMPLETIONS, {"prompt": "a\ud800"}, "prompt"),
        (COMPLETIONS, {"prompt": ["a\ud800"]}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "stop": "\ud800"}, "stop"),
        (COMPLETIONS, {"prompt": "x", "user": "\ud800"}, "user"),
        ("/generate", {"prompt": "x", "cache_salt": "\ud800"}, "cache_salt"),
    ],
)
def test_half_of_a_surrogate_pair_is_no_character_wherever_it_is(
    running: Running, path: str, body: dict[str, Any], param: str
) -> None:
    reply = running.post(path, body)
    assert reply.status == (422 if path == "/generate" else 400)
    assert str(reply.error["param"]).startswith(param)
    assert running.runner.steps == 0


def test_a_misspelt_field_is_told_with_the_one_that_may_be_meant(running: Running) -> None:
    reply = running.post("/generate", {"promt": "x", "max_new_tokens": 1})
    assert "promt: no such field" in reply.error["message"]
    assert "is 'prompt' meant?" in reply.error["message"]


def test_of_a_key_that_is_there_twice_the_last_counts(running: Running) -> None:
    body = b'{"prompt": "", "prompt": "x", "max_new_tokens": 0, "max_new_tokens": 1}'
    assert running.post("/generate", body).json["new_tokens"] == 1
