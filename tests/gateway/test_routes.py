"""respkv's own endpoints: what they answer, and when they refuse."""

import json

import pytest

from respkv.gateway.settings import GatewaySettings
from tests.gateway.conftest import SMALL, Serve
from tests.gateway.running import Running

SAYS = "Hello, wörld: 5 € for all, and no more than that"


def test_generate_tells_text_counts_and_times(serve: Serve) -> None:
    reply = serve(SAYS).post("/generate", {"prompt": "Say hello", "max_new_tokens": 4})
    assert reply.status == 200
    body = reply.json
    assert SAYS.startswith(body["text"])
    assert (body["new_tokens"], body["finish_reason"], body["model"]) == (4, "length", "tiny-llama")
    timings = body["timings"]
    assert set(timings) == {
        *("tokenize", "queue", "cache_lookup", "ttft", "decode", "total", "prefix_tokens_saved")
    }
    assert 0 < timings["ttft"] <= timings["total"] == body["latency_ms"]
    assert body["tokens_per_sec"] == pytest.approx(4e3 / body["latency_ms"], rel=0.01)
    assert reply.headers["x-request-id"] in body["id"]


def test_a_stream_is_the_same_answer_in_pieces(serve: Serve) -> None:
    running = serve(SAYS)
    ask = {"prompt": "Say hello", "max_new_tokens": 20}
    whole = running.post("/generate", ask).json
    reply = running.post("/generate", {**ask, "stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *pieces, (name, last) = reply.events
    assert name == "done"
    assert {name for name, _ in pieces} == {"token"}
    assert "".join(data["text"] for _, data in pieces) == whole["text"] == last["text"]
    assert len(pieces) > 10


def test_text_ends_before_a_stop_string_and_the_model_stops(serve: Serve) -> None:
    running = serve(SAYS)
    body = running.post("/generate", {"prompt": "x", "max_new_tokens": 24, "stop": " €"}).json
    assert body["text"] == "Hello, wörld: 5"
    assert body["finish_reason"] == "stop"
    assert body["new_tokens"] < 24


def test_the_token_that_ends_a_text_is_counted_and_not_shown(serve: Serve) -> None:
    running = serve(lambda prompt: [40, 41, 0])
    body = running.post("/generate", {"prompt": "x", "max_new_tokens": 24}).json
    assert (body["finish_reason"], body["new_tokens"], len(body["text"])) == ("stop", 3, 2)


def test_half_a_character_at_the_end_is_shown_as_unknown(serve: Serve) -> None:
    running = serve("€")
    body = running.post("/generate", {"prompt": "x", "max_new_tokens": 2}).json
    assert body["text"] in ("\ufffd", "€")


def test_the_same_seed_gives_the_same_tokens(llama: Running) -> None:
    ask = {"prompt": "def test", "max_new_tokens": 8, "temperature": 1.5, "seed": -3}
    first, again = (llama.post("/generate", ask).json["text"] for _ in range(2))
    assert first == again
    assert llama.post("/generate", {**ask, "seed": 4}).json["text"] != first
    greedy = llama.post("/generate", {**ask, "temperature": 0}).json["text"]
    assert llama.post("/generate", {**ask, "temperature": 5e-324}).json["text"] == greedy


@pytest.mark.parametrize("field", ["use_cache", "use_prefix_cache"])
def test_without_a_cache_the_text_is_the_same(llama: Running, field: str) -> None:
    ask = {"prompt": "from pathlib import", "max_new_tokens": 5}
    assert (
        llama.post("/generate", {**ask, field: False}).json["text"]
        == llama.post("/generate", ask).json["text"]
    )


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "1 character"),
        ({"prompt": 5}, "prompt", "not 5"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens", "not 0"),
        ({"prompt": "x", "max_new_tokens": "5"}, "max_new_tokens", "not '5'"),
        ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens", "not True"),
        ({"prompt": "x", "temperature": 2.5}, "temperature", "not 2.5"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature", "not nan"),
        ({"prompt": "x", "temperature": float("inf")}, "temperature", "not inf"),
        ({"prompt": "x", "top_p": 0}, "top_p", "not 0"),
        ({"prompt": "x", "top_k": 0}, "top_k", "not 0"),
        ({"prompt": "x", "seed": 1 << 64}, "seed", "not 18446744073709551616"),
        ({"prompt": "x", "stop": ""}, "stop", "not ''"),
        ({"prompt": "x", "stop": ["a"] * 5}, "stop", "4 items"),
        ({"prompt": "x", "session": ""}, "session", "not ''"),
        ({"prompt": "x", "promt": "y"}, "promt", "not permitted"),
        ([], None, "object"),
        (None, None, ""),
    ],
)
def test_a_wrong_body_is_told_where_and_why(
    serve: Serve, body: object, param: str | None, word: str
) -> None:
    running = serve(SAYS)
    reply = running.post("/generate", body)
    assert reply.status == 422
    error = reply.error
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    assert str(error["param"]).startswith(str(param))
    assert word in error["message"]
    assert running.runner.steps == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "x"',
        b"\xff\xfe\x00",
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": ' + b"9" * 5000 + b"}",
        b"{'prompt': 'x'}",
    ],
)
def test_what_is_no_json_is_refused(serve: Serve, body: bytes) -> None:
    reply = serve(SAYS).post("/generate", body)
    assert reply.status == (400 if body else 422)
    assert reply.error["code"] in ("invalid_body", "invalid_value")


def test_lone_surrogates_and_made_up_fields_come_back_as_escapes(serve: Serve) -> None:
    running = serve(SAYS)
    for text in (r'{"prompt": "\ud800"}', r'{"prompt": "x", "\udfff": 1}'):
        reply = running.post("/generate", text.encode())
        assert reply.status == 422
        assert "\\ud" in json.dumps(reply.error)


def test_a_session_whose_name_is_too_long_for_the_cache_is_refused(llama: Running) -> None:
    body = {"prompt": "x", "max_new_tokens": 1, "session": "\N{GRINNING FACE}" * 65}
    reply = llama.post("/generate", body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_request")
    assert "1 to 256 bytes, not 260" in reply.error["message"]
    assert llama.post("/generate", {**body, "session": "me"}).status == 200


def test_a_zero_byte_is_a_character_as_any_other(serve: Serve) -> None:
    assert serve(SAYS).post("/generate", {"prompt": "\0"}).status == 200


def test_a_body_has_to_be_said_to_be_json(serve: Serve) -> None:
    running = serve(SAYS)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "json", "text/json"):
        reply = running.post("/generate", {"prompt": "x"}, content_type=kind)
        assert (reply.status, reply.error["code"]) == (415, "not_json"), kind
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/x+json"):
        assert running.post("/generate", {"prompt": "x"}, content_type=kind).status == 200, kind


def test_a_prompt_over_the_limit_is_told_its_length(serve: Serve) -> None:
    running = serve(SAYS)
    reply = running.post("/generate", {"prompt": "\1" * 201})
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert "201 tokens" in reply.error["message"]
    assert "the 200 allowed" in reply.error["message"]
    assert running.post("/generate", {"prompt": "\1" * 200}).status == 200
    # So long that it is tokenized in a thread.
    assert running.post("/generate", {"prompt": "\1" * 20_000}).status == 400


def test_more_new_tokens_than_allowed_are_refused(serve: Serve) -> None:
    reply = serve(SAYS).post("/generate", {"prompt": "x", "max_new_tokens": 25})
    assert (reply.status, reply.error["code"]) == (400, "too_many_new_tokens")
    assert reply.error["param"] == "max_new_tokens"


def test_prompt_and_answer_have_to_fit_the_model(serve: Serve) -> None:
    running = serve(SAYS)
    running.runner.tokens_max = 30
    reply = running.post("/generate", {"prompt": "\1" * 20, "max_new_tokens": 11})
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert "room for 10 new ones" in reply.error["message"]
    assert running.post("/generate", {"prompt": "\1" * 20, "max_new_tokens": 10}).status == 200


def test_without_a_cache_prompt_and_answer_are_shorter(serve: Serve) -> None:
    running = serve(SAYS, GatewaySettings(max_recompute_tokens=30))
    ask = {"prompt": "\1" * 20, "use_cache": False}
    reply = running.post("/generate", {**ask, "max_new_tokens": 11})
    assert (reply.status, reply.error["code"]) == (400, "too_many_recompute_tokens")
    assert "20 tokens and 11 new ones are more than the 30" in reply.error["message"]
    assert running.post("/generate", {**ask, "max_new_tokens": 10}).status == 200
    cached = {**ask, "use_cache": True, "max_new_tokens": 11}
    assert running.post("/generate", cached).status == 200


def test_to_go_without_a_cache_may_be_refused(serve: Serve) -> None:
    running = serve(SAYS, GatewaySettings(recompute=False))
    reply = running.post("/generate", {"prompt": "x", "use_cache": False})
    assert (reply.status, reply.error["code"]) == (400, "recompute_refused")
    assert reply.error["param"] == "use_cache"
    assert running.runner.steps == 0
    ask = {"prompt": "x", "use_cache": True, "use_prefix_cache": False, "max_new_tokens": 2}
    assert running.post("/generate", ask).status == 200


def test_statistics_have_the_fields_of_the_first_gateway(serve: Serve) -> None:
    running = serve(SAYS)
    running.post("/generate", {"prompt": "x", "max_new_tokens": 3})
    reply = running.get("/cache/stats")
    assert reply.status == 200
    assert {
        *("cache_size", "hits", "misses", "hit_rate", "total_requests", "evictions_lru"),
        *("evictions_ttl", "cached_tokens_reused"),
    } <= set(reply.json)
    assert (reply.json["total_requests"], reply.json["tokens_generated"]) == (1, 3)


def test_metrics_count_requests_by_route_and_not_by_path(serve: Serve) -> None:
    running = serve(SAYS)
    running.post("/generate", {"prompt": "x", "max_new_tokens": 3})
    running.get("/v1/models/nobody")
    running.ask("BREW", "/generate", None, {})
    running.get("/no/such/path")
    reply = running.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = reply.body.decode().splitlines()
    for line in (
        'respkv_gateway_requests_total{method="POST",path="/generate",status="200"} 1.0',
        'respkv_gateway_requests_total{method="GET",path="/v1/models/{name}",status="404"} 1.0',
        'respkv_gateway_requests_total{method="OTHER",path="/generate",status="405"} 1.0',
        'respkv_gateway_requests_total{method="GET",path="none",status="404"} 1.0',
        "respkv_gateway_tokens_generated_total 3.0",
        "respkv_gateway_ttft_seconds_count 1.0",
        "respkv_gateway_ready 1.0",
        "respkv_gateway_running 0.0",
    ):
        assert line in lines, line


def test_there_is_nothing_else(serve: Serve) -> None:
    running = serve(SAYS)
    for path in ("/", "/generate/", "/docs", "/v1"):
        assert running.get(path).error["code"] == "not_found", path
    reply = running.get("/generate")
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"


def test_while_the_model_is_loaded_only_health_is_fine() -> None:
    running = Running(None, SMALL)
    try:
        assert running.get("/healthz").json == {"status": "alive"}
        for reply in (
            running.get("/readyz"),
            running.get("/v1/models"),
            running.get("/cache/stats"),
            running.post("/generate", {"prompt": "x"}),
        ):
            assert (reply.status, reply.error["code"]) == (503, "loading")
            assert reply.headers["retry-after"] == "1"
        assert b"respkv_gateway_ready 0.0" in running.get("/metrics").body
        assert running.get("/openapi.json").status == 200
    finally:
        running.close()


def test_a_crashed_model_makes_health_fail(serve: Serve) -> None:
    def crash(prompt: object) -> list[int]:
        raise ZeroDivisionError

    running = serve(crash)
    reply = running.post("/generate", {"prompt": "x"})
    assert (reply.status, reply.error["code"]) == (500, "generation_failed")
    for path in ("/healthz", "/readyz"):
        assert running.get(path).error["code"] == "model_down"
    assert running.post("/generate", {"prompt": "x"}).status == 503


def test_a_full_queue_is_503_and_says_when_to_come_again(serve: Serve) -> None:
    settings = GatewaySettings(max_concurrency=1, max_waiting=2, retry_after_s=7)
    running = serve(SAYS, settings)
    running.runner.gate.clear()
    held = [running.open("POST", "/generate", {"prompt": "x"}) for _ in range(3)]
    while True:
        stats = running.get("/cache/stats").json
        if stats["running"] + stats["waiting"] == 3:
            break
    for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}):
        reply = running.post("/generate", body)
        assert (reply.status, reply.error["code"]) == (503, "busy")
        assert reply.headers["retry-after"] == "7"
        assert reply.headers["content-type"] == "application/json"
    running.runner.gate.set()
    for each in held:
        assert each.recv(12) == b"HTTP/1.1 200"
        each.close()
