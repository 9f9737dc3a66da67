"""What the endpoints of respkv's own answer."""

from tests.gateway.conftest import Serve
from tests.gateway.running import Running


def test_a_prompt_is_gone_on_with(llama: Running) -> None:
    reply = llama.post("/generate", {"prompt": "def test", "max_new_tokens": 8})
    assert reply.status == 200
    body = reply.json
    assert body["new_tokens"] == 8
    assert body["finish_reason"] == "length"
    print(body)


def test_a_stream(serve: Serve) -> None:
    running = serve("Hello, wörld € and more")
    reply = running.post("/generate", {"prompt": "x", "max_new_tokens": 8, "stream": True})
    assert reply.status == 200
    print(reply.events)
    for path in ("/cache/stats", "/metrics", "/healthz", "/readyz", "/openapi.json", "/v1/models"):
        r = running.get(path)
        print(path, r.status, r.body[:200])
    for path, body in (
        ("/v1/completions", {"prompt": "x", "n": 2}),
        ("/v1/completions", {"prompt": "x", "stream": True, "stop": ["wö"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hi"}], "temperature": 5},
        ),
    ):
        r = running.post(path, body)
        print(path, r.status, r.body)
