"""Requests made from the OpenAPI document, right and wrong ones: no 5xx, and all as documented."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from tests.gateway.running import Running


@pytest.fixture(scope="module")
def api(llama: Running) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", llama.app)


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_documented(case: schemathesis.Case) -> None:
    case.call_and_validate()
