"""Read a trace, in whichever of the two formats it is."""

import json
import os
from itertools import chain
from pathlib import Path

from respkv.errors import ConfigError
from respkv.trace.format import MOONCAKE_TOKENS, Trace, mooncake
from respkv.trace.recorded import FORMAT, check_head, read_recorded

_NEIGHBOUR = Path("shared", "traces", "conversation_trace.jsonl")


def find_trace() -> Path | None:
    """Return the trace that RESPKV_TRACE names, or the one beside this repository, if there."""
    beside = Path(__file__).resolve().parent.parent.parent.parent / _NEIGHBOUR
    path = Path(os.environ.get("RESPKV_TRACE", beside))
    return path if path.is_file() else None


def read_trace(path: Path, *, page_tokens: int = 16) -> Trace:
    """Read a recording or a trace in the public format; the first line says which it is.

    page_tokens: of a recording's pages of which nobody knew how many tokens they have.
    Raises ConfigError for a file that is neither, with the line that says so.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            first = next(iter(lines), "")
            head = _head(first)
            if head.get("format") == FORMAT:
                check_head(path.name, head)
                return read_recorded(path.name, lines, page_tokens)
            requests = tuple(mooncake(path.name, chain([first], lines)))
            return Trace(path.name, MOONCAKE_TOKENS, requests)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a trace: {error}") from error


def _head(line: str) -> dict[str, object]:
    try:
        head = json.loads(line)
    except ValueError:
        return {}
    return head if isinstance(head, dict) else {}
