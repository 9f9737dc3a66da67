"""Drive a gateway with requests that schemathesis makes from its OpenAPI document."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema


@dataclass
class Outcome:
    """What came of it. problems: one line each; statuses: how many of each were answered."""

    problems: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)


def settings_of(*, max_examples: int, seed: int, token: str | None = None) -> SchemathesisConfig:
    """Return what is tested: right and wrong requests to every operation, and all checks."""
    headers = {} if token is None else {"headers": {"Authorization": f"Bearer {token}"}}
    # What no schema can say: how many tokens a text has, and whether it has any.
    accepted = {"expected-statuses": ["2xx", 400]}
    config: dict[str, Any] = {
        "seed": seed,
        "generation": {"max-examples": max_examples, "mode": "all", "database": "none"},
        "phases": {"stateful": {"enabled": False}},
        "checks": {"positive_data_acceptance": accepted},
        "workers": 1,
        **headers,
    }
    return SchemathesisConfig.from_dict(config)


def drive(schema: Any) -> Outcome:
    """Send everything and check every answer."""
    outcome = Outcome()
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            outcome.problems.append(f"{event!r}: {getattr(event, 'info', event)}")
        if not isinstance(event, events.ScenarioFinished):
            continue
        recorder = event.recorder
        for number, interaction in recorder.interactions.items():
            if interaction.response is not None:
                outcome.statuses[interaction.response.status_code] += 1
            for check in recorder.checks.get(number, []):
                if check.status == Status.FAILURE:
                    failure = check.failure_info.failure
                    body = interaction.request.body
                    shown = body[:400] if body else b""
                    outcome.problems.append(
                        f"{recorder.label}: {check.name}: {failure.title}: {failure.message}\n{interaction.request.method} {interaction.request.uri} {shown!r}\n {interaction.response and interaction.response.status_code} {interaction.response and interaction.response.content[:300]}"
                    )
    return outcome
