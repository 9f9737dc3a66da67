"""Requests that schemathesis makes from a gateway's OpenAPI document, right and wrong ones.

`make gateway-test` sends many over a socket; the gate some, in this process and over a socket. No
answer may be a 5xx, each has to be as the document says, what is wrong has to be refused and what is
right to be accepted.
"""

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema

from tests.gateway.crowd import make_checkpoint
from tests.gateway.process import GatewayProcess

TOKEN = "a-token"
SHOWN_BYTES = 400


@dataclass
class Outcome:
    """What came of it. problems: what was not as it should be; statuses: answers of each kind."""

    problems: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)


def settings_of(
    *, max_examples: int, seed: int, is_thorough: bool, token: str | None = None
) -> SchemathesisConfig:
    """Return what is sent and checked.

    is_thorough: also what lies on and beside each limit of the document, field by field.
    """
    # What no schema can say: how many tokens a text has.
    accepted = {"expected-statuses": ["2xx", 400]}
    config: dict[str, Any] = {
        "seed": seed,
        "suppress-health-check": ["too_slow"],  # that says how busy the machine is
        "generation": {"max-examples": max_examples, "mode": "all", "database": "none"},
        "phases": {"stateful": {"enabled": False}, "coverage": {"enabled": is_thorough}},
        "checks": {"positive_data_acceptance": accepted},
        "workers": 1,
    }
    if token is not None:
        config["headers"] = {"Authorization": f"Bearer {token}"}
    return SchemathesisConfig.from_dict(config)


def drive(schema: Any) -> Outcome:
    """Send everything and check every answer."""
    outcome = Outcome()
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            outcome.problems.append(f"schemathesis: {event}")
        elif isinstance(event, events.ScenarioFinished):
            _note(outcome, event.recorder)
    return outcome


def _note(outcome: Outcome, recorder: Any) -> None:
    for number, interaction in recorder.interactions.items():
        answer, asked = interaction.response, interaction.request
        status = answer.status_code if answer is not None else 0
        outcome.statuses[status] += 1
        for check in recorder.checks.get(number, []):
            if check.status == Status.FAILURE:
                failure = check.failure_info.failure
                sent = (asked.body or b"")[:SHOWN_BYTES]
                told = answer.content[:SHOWN_BYTES] if answer is not None else b""
                outcome.problems.append(
                    f"{asked.method} {asked.uri} {sent!r} -> {status} {told!r}:"
                    f" {check.name}: {failure.title}: {failure.message}"
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--seed", type=int, default=6)
    options = parser.parse_args()
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "model")
        limits = ("--max-prompt-tokens", "200", "--max-new-tokens", "24", "--loglevel", "warning")
        for token in (None, TOKEN):
            gateway = GatewayProcess(checkpoint, *limits, RESPKV_GATEWAY_TOKEN=token or "")
            try:
                config = settings_of(
                    max_examples=options.examples, seed=options.seed, is_thorough=True, token=token
                )
                url = f"http://127.0.0.1:{gateway.port}/openapi.json"
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                schema = schemathesis.openapi.from_url(url, config=config, headers=headers)
                outcome = drive(schema)
                status = gateway.stop()
                if status or "Traceback" in gateway.log:
                    outcome.problems.append(f"it ended with {status}: {gateway.log[-4000:]}")
            finally:
                gateway.close()
            kind = "without" if token is None else "with"
            print(f"{kind} a token: {sum(outcome.statuses.values())} requests,", end=" ")
            print(f"statuses {dict(sorted(outcome.statuses.items()))}")
            problems += outcome.problems
    for problem in problems[:20]:
        print("PROBLEM", problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
