"""Requests of a trace, and the public format of traces. read.py reads both formats.

A trace is a JSON object a line. The public format is Mooncake's (Qin et al., FAST 2025):
``timestamp`` in ms, ``input_length`` and ``output_length`` in tokens, and ``hash_ids`` with one id
for each block of 512 tokens, the last one of which may be partly full. An id stands for all that is
in front of it as well: two requests with the same id have the same prompt up to there.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from respkv.errors import ConfigError

MOONCAKE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt.

    at_s:       when it came, in seconds from any start.
    num_tokens: of the prompt. num_output: that were answered; 0 when nobody knows.
    blocks:     an id for each block of the prompt; equal ids have equal prompts up to there.
    answer:     blocks behind the prompt that were stored without having been asked for.
    """

    at_s: float
    num_tokens: int
    blocks: tuple[int, ...]
    num_output: int = 0
    answer: tuple[int, ...] = ()

    @property
    def stored(self) -> tuple[int, ...]:
        """All blocks that are there once the request is over."""
        return self.blocks + self.answer


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order in which they came.

    block_tokens: of every block but a prompt's last. num_left_out: requests of other sizes.
    """

    name: str
    block_tokens: int
    requests: tuple[Request, ...]
    num_left_out: int = 0

    def first(self, count: int | None) -> "Trace":
        """Return the trace of the first ``count`` requests; of all with None."""
        return replace(self, requests=self.requests[:count])

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(request.num_tokens for request in self.requests)


def mooncake(name: str, lines: Iterable[str]) -> Iterator[Request]:
    """Yield the requests of a trace in the public format."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record: dict[str, Any] = json.loads(line)
            request = Request(
                float(record["timestamp"]) / 1000,
                int(record["input_length"]),
                tuple(map(int, record["hash_ids"])),
                int(record.get("output_length", 0)),
            )
        except (ValueError, KeyError, TypeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"{name}:{number} is no request of a trace: {what}") from error
        yield request


def mooncake_line(request: Request) -> str:
    """Return a request in the public format."""
    return json.dumps(
        {
            "timestamp": round(request.at_s * 1000),
            "input_length": request.num_tokens,
            "output_length": request.num_output,
            "hash_ids": list(request.blocks),
        }
    )
