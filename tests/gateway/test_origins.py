"""Web pages of elsewhere: they may not use a gateway that their visitor can reach."""

import dataclasses

import pytest

from respkv.gateway.settings import GatewaySettings
from tests.gateway.conftest import SMALL, Serve
from tests.gateway.running import Reply, Running

ASK = {"prompt": "x", "max_new_tokens": 1}
EVIL = "https://evil.example"
PAGE = "https://chat.example"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


def served(serve: Serve, **more: object) -> Running:
    return serve("Hello", dataclasses.replace(SMALL, **more))  # type: ignore[arg-type]


def cleared(running: Running, **headers: str) -> Reply:
    """Ask for what is done without a body, as a form of any page can."""
    return running.ask("POST", "/cache/clear", None, _named(headers))


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.mark.parametrize(
    "headers",
    [
        {"sec_fetch_site": "cross-site", "origin": EVIL},
        {"sec_fetch_site": "same-site", "origin": "http://localhost:3000"},
        {"sec_fetch_site": "cross-site"},
        {"origin": EVIL},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
    ],
)
def test_a_page_of_another_origin_changes_nothing(serve: Serve, headers: dict[str, str]) -> None:
    running = served(serve)
    for reply in (
        cleared(running, **headers),
        running.post("/generate", ASK, **headers),
        running.post("/v1/completions", {"prompt": "x"}, content_type="text/plain", **headers),
    ):
        assert (reply.status, reply.error["code"]) == (403, "cross_origin")
        assert reply.error["type"] == "permission_error"
        assert "--allow-origin" in reply.error["message"]
        assert not [name for name in reply.headers if name.startswith("access-control")]
    assert running.runner.steps == 0


def test_what_is_no_browser_and_what_a_user_types_passes(serve: Serve) -> None:
    running = served(serve)
    own = f"http://127.0.0.1:{running.port}"
    for headers in (
        {},
        {"sec_fetch_site": "none"},
        {"sec_fetch_site": "same-origin", "origin": own},
        {"origin": own},
    ):
        assert cleared(running, **headers).status == 200, headers
        assert running.post("/generate", ASK, **headers).status == 200, headers
    # To read is no harm: a page of elsewhere does not get to see it.
    assert running.get("/cache/stats", {"sec-fetch-site": "cross-site"}).status == 200
    preflight = running.ask("OPTIONS", "/generate", None, {"origin": EVIL, **PREFLIGHT})
    assert preflight.status == 405
    assert "access-control-allow-origin" not in preflight.headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example."])
def test_a_name_that_somebody_else_may_own_is_not_answered(serve: Serve, host: str) -> None:
    running = served(serve)
    for path in ("/v1/models", "/cache/stats", "/metrics", "/openapi.json", "/nothing"):
        reply = running.get(path, {"host": host})
        assert (reply.status, reply.error["code"]) == (403, "unknown_host"), path
        assert "--allow-host" in reply.error["message"]
    own = {"host": host, "origin": f"http://{host}", "sec_fetch_site": "same-origin"}
    assert running.post("/generate", ASK, **own).status == 403
    assert running.get("/healthz", {"host": host}).status == 200
    assert running.runner.steps == 0


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LocalHost:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.1.5", "gateway"),
        *("my.localhost", "box.local", "host.docker.internal:8000", "localhost.", ""),
    ],
)
def test_names_that_nobody_else_can_have_are_answered(serve: Serve, host: str) -> None:
    running = served(serve)
    assert running.get("/v1/models", {"host": host}).status == 200


def test_names_that_are_told_are_answered_and_others_are_not(serve: Serve) -> None:
    running = served(serve, allow_host=("LLM.example",))
    assert running.get("/v1/models", {"host": "llm.example:443"}).status == 200
    assert running.get("/v1/models", {"host": "127.0.0.1"}).status == 200
    assert running.get("/v1/models", {"host": "other.example"}).status == 403
    anyone = served(serve, allow_host=("*",))
    assert anyone.get("/v1/models", {"host": "other.example"}).status == 200


def test_an_address_that_others_reach_has_any_name_unless_names_are_told(serve: Serve) -> None:
    public = served(serve, host="0.0.0.0")
    assert public.get("/v1/models", {"host": "llm.example"}).status == 200
    assert cleared(public, origin=EVIL).status == 403
    named = served(serve, host="0.0.0.0", allow_host=("llm.example",))
    assert named.get("/v1/models", {"host": "llm.example"}).status == 200
    assert named.get("/v1/models", {"host": "evil.example"}).status == 403


def test_with_a_token_pages_and_names_do_not_matter(serve: Serve) -> None:
    running = served(serve, token="a-token")
    mine = {"authorization": "Bearer a-token", "origin": EVIL, "sec_fetch_site": "cross-site"}
    assert cleared(running, **mine).status == 200
    assert running.post("/generate", ASK, **mine, host="evil.example").status == 200
    del mine["authorization"]
    assert cleared(running, **mine).status == 401


@pytest.mark.parametrize("token", [None, "a-token"])
def test_pages_that_are_told_may_ask_and_read(serve: Serve, token: str | None) -> None:
    running = served(serve, allow_origin=(PAGE,), token=token)
    bearer = {} if token is None else {"authorization": f"Bearer {token}"}
    asked = running.ask("OPTIONS", "/generate", None, {"origin": PAGE, **PREFLIGHT})
    assert (asked.status, asked.body) == (204, b"")
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert asked.headers["access-control-allow-headers"] == "authorization, content-type"
    assert "POST" in asked.headers["access-control-allow-methods"]
    page = {"origin": PAGE, "sec_fetch_site": "cross-site"}
    for body in (ASK, {**ASK, "stream": True}, {"prompt": ""}):
        reply = running.post("/generate", body, **page, **bearer)
        assert reply.status == (422 if body["prompt"] == "" else 200)
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert reply.headers["vary"] == "origin"
    for path in ("/generate", "/nothing"):
        refused = running.ask("OPTIONS", path, None, {"origin": EVIL, **PREFLIGHT})
        assert refused.status in (401, 404, 405)
        assert "access-control-allow-origin" not in refused.headers
    other = {"origin": EVIL, "sec_fetch_site": "cross-site"}
    assert running.post("/generate", ASK, **other).status == (403 if token is None else 401)


def test_all_pages_may_be_let_in(serve: Serve) -> None:
    running = served(serve, allow_origin=("*",))
    reply = cleared(running, origin=EVIL, sec_fetch_site="cross-site")
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, EVIL)


def test_long_names_come_back_short(serve: Serve) -> None:
    running = served(serve)
    for reply in (
        cleared(running, origin="https://" + "x" * 20_000),
        running.get("/v1/models", {"host": "x." * 10_000}),
    ):
        assert reply.status == 403
        assert len(reply.body) < 500


def test_what_may_be_refused_is_documented(serve: Serve) -> None:
    document = served(serve).get("/openapi.json").json
    assert "403" in document["paths"]["/cache/clear"]["post"]["responses"]
    assert "403" not in document["paths"]["/healthz"]["get"]["responses"]
    bearer = {"authorization": "Bearer a-token"}
    document = served(serve, token="a-token").get("/openapi.json", bearer).json
    assert "403" not in document["paths"]["/cache/clear"]["post"]["responses"]


def test_whether_an_address_is_of_this_machine_only_is_known() -> None:
    local = ("127.0.0.1", "127.9.9.9", "::1", "localhost")
    assert all(GatewaySettings(host=host).is_local for host in local)
    assert not any(GatewaySettings(host=host).is_local for host in ("0.0.0.0", "::", "llm.example"))
