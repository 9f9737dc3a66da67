"""A sample of what `make gateway-test` sends."""

from typing import Any

import pytest
import schemathesis

from respkv.gateway.settings import GatewaySettings
from tests.gateway.conftest import SMALL, Serve
from tests.gateway.contract import TOKEN, Outcome, drive, settings_of
from tests.gateway.running import Running


def checked(outcome: Outcome) -> Outcome:
    assert outcome.problems == []
    assert not [status for status in outcome.statuses if status >= 500]
    return outcome


def test_answers_in_process_are_as_documented(serve: Serve) -> None:
    running = serve("some words, and more")
    config = settings_of(max_examples=1, seed=6, is_thorough=True)
    schema = schemathesis.openapi.from_asgi("/openapi.json", running.app, config=config)
    # The long form is as thorough with the many fields of the others.
    outcome = checked(drive(schema.exclude(path_regex="/completions$")))
    assert outcome.statuses[200] > 20
    assert outcome.statuses[405] > 20
    assert outcome.statuses[422] > 20


def test_answers_over_a_socket_are_as_documented(llama: Running) -> None:
    config = settings_of(max_examples=6, seed=6, is_thorough=False)
    url = f"http://127.0.0.1:{llama.port}/openapi.json"
    outcome = checked(drive(schemathesis.openapi.from_url(url, config=config)))
    assert outcome.statuses[200] > 5


def test_with_a_token_nothing_is_answered_without_it(serve: Serve) -> None:
    running = serve("some words", GatewaySettings(token=TOKEN, max_new_tokens=8))
    url = f"http://127.0.0.1:{running.port}/openapi.json"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    config = settings_of(max_examples=2, seed=6, is_thorough=False, token=TOKEN)
    schema = schemathesis.openapi.from_url(url, config=config, headers=headers)
    outcome = checked(drive(schema))
    assert outcome.statuses[401] > 0
    assert outcome.statuses[200] > 0


def test_the_document_has_this_gateways_limits(serve: Serve) -> None:
    running = serve("x")
    document: Any = running.get("/openapi.json").json
    schemas = document["components"]["schemas"]
    new = schemas["GenerateRequest"]["properties"]["max_new_tokens"]["anyOf"][0]
    assert (new["minimum"], new["maximum"]) == (1, SMALL.max_new_tokens)
    model = schemas["CompletionRequest"]["properties"]["model"]["anyOf"][0]
    assert model["enum"] == ["tiny-llama"]
    ids = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"][1]
    assert (ids["maxItems"], ids["items"]["maximum"]) == (SMALL.max_prompt_tokens, 4999)
    assert "HTTPValidationError" not in schemas
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("422" in operation["responses"]) == (path == "/generate")


def test_the_document_is_made_anew_when_the_model_has_come(serve: Serve) -> None:
    running = serve("x")
    model = running.gateway.loaded
    assert model is not None
    before = Running(None, SMALL)
    try:
        document: Any = before.get("/openapi.json").json
        assert (
            "enum" not in document["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["schema"]
        )
        before.gateway.install(model)
        for _ in range(2):
            document = before.get("/openapi.json").json
            (name,) = document["paths"]["/v1/models/{name}"]["get"]["parameters"]
            assert name["schema"]["enum"] == ["tiny-llama"]
    finally:
        before.close()


def test_the_document_says_what_goes_without_a_cache(serve: Serve) -> None:
    def use_cache(settings: GatewaySettings) -> Any:
        document: Any = serve("x", settings).get("/openapi.json").json
        return document["components"]["schemas"]["GenerateRequest"]["properties"]["use_cache"]

    taken = use_cache(GatewaySettings(max_recompute_tokens=77))
    assert "enum" not in taken
    assert "at most 77 tokens" in taken["description"]
    assert use_cache(GatewaySettings(recompute=False))["enum"] == [True]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_errors_have_one_form_and_are_documented(serve: Serve, path: str) -> None:
    document: Any = serve("x").get("/openapi.json").json
    documented = document["paths"][path]["post"]["responses"]
    for status in ("400", "408", "413", "415", "500", "503"):
        schema = documented[status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Error"}
    assert "Retry-After" in documented["503"]["headers"]
