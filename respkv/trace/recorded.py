"""Requests out of a recording (record.py): which prompts were asked for, and what was stored behind.

A match is a request. What is put for pages that it named is what any cache stores after a miss, and is
not looked at; what is put behind its last page is the answer's KV, and becomes its ``answer``. Prompts
that were only ever put, or only got, are requests from the first time on that they are seen.

Pages of other sizes than most are left out: a cache that is simulated has blocks of one size.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from respkv.errors import ConfigError
from respkv.trace.format import Request, Trace

FORMAT = "respkv-trace"
VERSION = 1
_MATCHES = ("kv.match", "kv.seq.match")
_PUTS = ("kv.put", "kv.seq.put")
_GET = "kv.seq.get"


@dataclass(slots=True)
class _Asked:
    """A request so far. num_tokens, page_tokens: 0 where the recording does not know."""

    at_s: float
    page_tokens: int
    num_tokens: int
    blocks: list[int]
    answer: list[int] = field(default_factory=list)
    is_got: bool = False


class _Reader:
    """Turns lines into requests. put_tokens: of the pages that were put, how many of which size."""

    def __init__(self) -> None:
        self.requests: list[_Asked] = []
        self.put_tokens: Counter[int] = Counter()
        self._ids: dict[str, int] = {}
        self._of_block: dict[int, _Asked] = {}  # the request that had a block last

    def take(self, line: dict[str, Any]) -> None:
        """Take a line in which there is a chain."""
        chain = [self._ids.setdefault(name, len(self._ids)) for name in line["chain"]]
        if line.get("reply") == "error":
            return
        if line["cmd"] in _MATCHES:
            self._begin(line, chain)
        elif line["cmd"] in _PUTS:
            self.put_tokens[int(line["page_tokens"])] += 1
            self._put(line, chain)
        elif line["cmd"] == _GET:
            self._get(line, chain)

    def _put(self, line: dict[str, Any], chain: list[int]) -> None:
        known = [block for block in chain if block in self._of_block]
        if known:
            self._extend(self._of_block[known[-1]], chain)
            return
        parent = self._of_block.get(self._ids.get(line.get("parent", ""), -1))
        if parent is not None:
            self._extend(parent, chain)
        else:
            self._begin(line, chain)

    def _get(self, line: dict[str, Any], chain: list[int]) -> None:
        asked = self._of_block.get(chain[-1])
        if asked is None or asked.is_got:
            asked = self._begin(line, chain)
        asked.is_got = True  # the get that follows a match is the same request

    def _begin(self, line: dict[str, Any], chain: list[int]) -> _Asked:
        tokens = int(line.get("tokens") or 0)
        asked = _Asked(float(line["t"]), int(line["page_tokens"]), tokens, chain)
        self.requests.append(asked)
        self._of_block.update(dict.fromkeys(chain, asked))
        return asked

    def _extend(self, asked: _Asked, blocks: list[int]) -> None:
        new = [block for block in blocks if block not in self._of_block]
        asked.answer += new
        self._of_block.update(dict.fromkeys(new, asked))


def read_recorded(name: str, lines: Iterable[str], page_tokens: int) -> Trace:
    """Read a recording from behind its first line.

    page_tokens: of pages of which the recording does not know how many tokens they have; that is
                 when neither a schema nor a put says so.
    Raises ConfigError for a line that is none.
    """
    reader = _Reader()
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record.get("chain"):
                reader.take(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{name}:{number} is no line of a recording: {error!r}") from error
    put = [tokens for tokens, _ in reader.put_tokens.most_common() if tokens]
    return _trace(name, reader.requests, put[0] if put else page_tokens)


def check_head(name: str, head: dict[str, Any]) -> None:
    """Raise ConfigError unless a recording's first line is of a version that is understood."""
    if head.get("version") != VERSION:
        raise ConfigError(
            f"{name} is a recording of version {head.get('version')!r}; this respkv reads {VERSION}"
        )


def _trace(name: str, asked: list[_Asked], page_tokens: int) -> Trace:
    for each in asked:
        each.page_tokens = each.page_tokens or page_tokens
    sizes = Counter(each.page_tokens for each in asked)
    block_tokens = sizes.most_common(1)[0][0] if sizes else page_tokens
    same = [each for each in asked if each.page_tokens == block_tokens]
    requests = sorted(map(_request, same), key=lambda request: request.at_s)
    return Trace(name, block_tokens, tuple(requests), num_left_out=len(asked) - len(same))


def _request(asked: _Asked) -> Request:
    return Request(
        asked.at_s,
        asked.num_tokens or len(asked.blocks) * asked.page_tokens,
        tuple(asked.blocks),
        num_output=len(asked.answer) * asked.page_tokens,
        answer=tuple(asked.answer),
    )
