"""OpenAI's endpoints: what clients of OpenAI send, and what they get."""

from typing import Any

import pytest

from respkv.gateway.settings import GatewaySettings
from respkv.gateway.tokenizer import TextCoder
from tests.gateway.conftest import Serve
from tests.gateway.running import Running

SAYS = "Hello, wörld: 5 € for all, and no more than that"
USER = {"role": "user", "content": "Say hello"}
OTHER = "Another answer, to another prompt, of another length"


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve(SAYS)


def chat(running: Running, **more: Any) -> Any:
    body = {"model": "tiny-llama", "messages": [USER], "max_completion_tokens": 4, **more}
    reply = running.post("/v1/chat/completions", body)
    assert reply.status == 200, reply.body
    return reply.events if more.get("stream") else reply.json


def complete(running: Running, **more: Any) -> Any:
    body = {"model": "tiny-llama", "prompt": "Say hello", "max_tokens": 4, **more}
    reply = running.post("/v1/completions", body)
    assert reply.status == 200, reply.body
    return reply.events if more.get("stream") else reply.json


def test_a_completion(running: Running, coder: TextCoder) -> None:
    body = complete(running)
    assert (body["object"], body["model"]) == ("text_completion", "tiny-llama")
    (choice,) = body["choices"]
    assert SAYS.startswith(choice["text"])
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    num_prompt = len(coder.encode("Say hello"))
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 4,
        "total_tokens": num_prompt + 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_chat_completion(running: Running) -> None:
    body = chat(running)
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert SAYS.startswith(choice["message"]["content"])
    assert choice["finish_reason"] == "length"


def test_several_prompts_have_n_answers_each_in_order(serve: Serve, coder: TextCoder) -> None:
    first, second = coder.encode("first"), coder.encode("second")
    says = {tuple(first): coder.encode(SAYS), tuple(second): coder.encode(OTHER)}
    running = serve(lambda prompt: says[tuple(prompt)])
    for prompts in (["first", "second"], [first, second]):
        body = complete(running, prompt=prompts, n=2)
        texts = [choice["text"] for choice in body["choices"]]
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert texts[0] == texts[1]
        assert SAYS.startswith(texts[0])
        assert texts[2] == texts[3]
        assert OTHER.startswith(texts[2])
        assert body["usage"]["prompt_tokens"] == len(first) + len(second)
        assert body["usage"]["completion_tokens"] == 16


def test_a_prompt_may_be_tokens(running: Running, coder: TextCoder) -> None:
    tokens = coder.encode("Say hello")
    assert complete(running, prompt=tokens)["usage"]["prompt_tokens"] == len(tokens)
    reply = running.post("/v1/completions", {"prompt": [5000], "max_tokens": 1})
    assert (reply.status, reply.error["code"]) == (400, "unknown_token")
    assert "5000" in reply.error["message"]


@pytest.mark.parametrize("token", [1.7, True, "1", None, -1, [1]])
def test_a_token_of_a_prompt_is_a_whole_number(running: Running, token: Any) -> None:
    for prompt in ([40, token], [[40, token]], [[40], [token]]):
        reply = running.post("/v1/completions", {"prompt": prompt, "max_tokens": 1})
        assert (reply.status, reply.error["code"]) == (400, "invalid_value"), prompt
        assert reply.error["param"].startswith("prompt")
    assert running.runner.steps == 0
    assert complete(running, prompt=[40, 41.0])["usage"]["prompt_tokens"] == 2


def test_an_answer_is_taken_back_as_it_came(running: Running) -> None:
    message = chat(running)["choices"][0]["message"]
    # As OpenAI's own client for Python fills it in.
    whole = {**message, "annotations": None, "audio": None, "function_call": None}
    for said in (message, {**whole, "tool_calls": None}, {**whole, "tool_calls": []}):
        chat(running, messages=[USER, said, USER])


def test_answers_with_one_seed_differ_and_come_again(llama: Running) -> None:
    ask = {"temperature": 1.5, "seed": 5, "n": 3, "max_tokens": 6}
    texts = [choice["text"] for choice in complete(llama, **ask)["choices"]]
    assert len(set(texts)) == 3
    assert [choice["text"] for choice in complete(llama, **ask)["choices"]] == texts


def test_a_stream_of_a_completion_ends_with_done(running: Running) -> None:
    whole = complete(running)["choices"][0]["text"]
    *chunks, (_, last) = complete(running, stream=True)
    assert last == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for _, chunk in chunks) == whole
    assert [chunk["choices"][0]["finish_reason"] for _, chunk in chunks][-1] == "length"
    assert not any("usage" in chunk for _, chunk in chunks)


def test_a_stream_of_a_chat_has_role_text_end_and_usage(running: Running) -> None:
    whole = chat(running)["choices"][0]["message"]["content"]
    *chunks, (_, last) = chat(running, stream=True, stream_options={"include_usage": True})
    assert last == "[DONE]"
    bodies = [chunk for _, chunk in chunks]
    assert {body["object"] for body in bodies} == {"chat.completion.chunk"}
    assert len({body["id"] for body in bodies}) == 1
    deltas = [body["choices"][0]["delta"] for body in bodies[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == whole
    assert deltas[-1] == {}
    assert bodies[-2]["choices"][0]["finish_reason"] == "length"
    assert bodies[-1]["choices"] == []
    assert bodies[-1]["usage"]["completion_tokens"] == 4
    assert all(body["usage"] is None for body in bodies[:-1])


def test_a_stream_of_n_answers_mixes_them_and_each_is_whole(running: Running) -> None:
    *chunks, _ = chat(running, stream=True, n=3)
    for index in range(3):
        mine = [c["choices"][0] for _, c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert [each["finish_reason"] for each in mine].count("length") == 1
        assert SAYS.startswith("".join(each["delta"].get("content", "") for each in mine))


def test_stop_strings_may_be_one_or_several(running: Running) -> None:
    for stop in (":", [":", "never"], ["never", " 5", ":"]):
        (choice,) = chat(running, stop=stop, max_completion_tokens=24)["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == "Hello, wörld"


def test_without_a_template_a_chat_ends_where_the_user_would_speak(serve: Serve) -> None:
    (choice,) = chat(serve("Fine.\nUser: and"), max_completion_tokens=24)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Fine.", "stop")


def test_a_chat_without_a_limit_takes_what_room_there_is(running: Running) -> None:
    running.runner.tokens_max = 40
    body = chat(running, max_completion_tokens=None)
    assert body["usage"]["total_tokens"] in (40, body["usage"]["prompt_tokens"] + 24)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"metadata": {str(at): "" for at in range(17)}}, "metadata"),
        ({"messages": [USER | {"tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 25}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"frequency": 1}, "frequency"),
    ],
)
def test_what_is_not_supported_is_refused_and_named(
    running: Running, more: dict[str, Any], param: str
) -> None:
    reply = running.post("/v1/chat/completions", {"messages": [USER], **more})
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["param"] == param
    assert running.runner.steps == 0


@pytest.mark.parametrize(
    "more",
    [
        {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
        {"logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "none"},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"n": None, "stop": None, "temperature": None, "top_p": None, "stream": None},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"prediction": {"type": "content", "content": "x"}, "verbosity": "medium"},
        {"functions": [], "function_call": "none", "audio": None, "web_search_options": None},
        {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "me"},
        {"max_completion_tokens": 4.0, "seed": 1.0},
    ],
)
def test_what_asks_for_nothing_is_taken(running: Running, more: dict[str, Any]) -> None:
    chat(running, **more)


def test_more_answers_than_fit_are_refused(serve: Serve) -> None:
    running = serve(SAYS, GatewaySettings(max_waiting=4))
    reply = running.post("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2})
    assert (reply.status, reply.error["code"]) == (400, "too_many_choices")
    assert "more answers than the 4" in reply.error["message"]
    reply = running.post("/v1/chat/completions", {"messages": [USER], "n": 5})
    assert (reply.status, reply.error["code"]) == (400, "too_many_choices")
    chat(running, n=4)


def test_all_answers_are_taken_or_none(serve: Serve) -> None:
    running = serve(SAYS, GatewaySettings(max_concurrency=1, max_waiting=3))
    running.runner.gate.clear()
    held = running.open("POST", "/generate", {"prompt": "x"})
    while not running.get("/cache/stats").json["running"]:
        pass
    second = running.open("POST", "/generate", {"prompt": "x"})
    while not running.get("/cache/stats").json["waiting"]:
        pass
    reply = running.post("/v1/completions", {"prompt": "x", "n": 3})
    assert (reply.status, reply.error["code"]) == (503, "busy")
    running.runner.gate.set()
    for each in (held, second):
        assert each.recv(12) == b"HTTP/1.1 200"
        each.close()
    while running.get("/cache/stats").json["waiting"]:
        pass


def test_the_model_is_known_by_its_name(running: Running) -> None:
    listed = running.get("/v1/models").json
    assert [each["id"] for each in listed["data"]] == ["tiny-llama"]
    assert running.get("/v1/models/tiny-llama").json == listed["data"][0]
    for reply in (
        running.get("/v1/models/gpt-4/turbo"),
        running.post("/v1/completions", {"model": "gpt-4/turbo", "prompt": "x"}),
    ):
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")
        assert "gpt-4/turbo" in reply.error["message"]
