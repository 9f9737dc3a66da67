"""Requests out of a recording (record.py): which prompts were asked for, and what was stored behind.

A match is a request. What is put for pages that it named is what any cache stores after a miss, and is
not looked at; what is put behind its last page is the answer's KV, and becomes its ``answer``. Prompts
that were only ever put, or only got, are requests from the first time on that they are seen.

A client that stores asks first what is there, with a KV.SEQ.MATCH of the prompt, or of prompt and
answer. That is no request: it repeats one behind which nothing was stored yet, or goes on from it, and
what its connection does next with a prompt is the put. Or all of it was there, so that nothing was
left to put; then it counts as a question if that connection made the request moments ago.

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
_ASKING = "kv.seq.match"
_GET = "kv.seq.get"
_MOMENTS_S = 4.0  # as long as the engine takes the same prompt for the same request


@dataclass(slots=True, eq=False)
class _Asked:
    """A request so far.

    num_tokens, page_tokens: 0 where the recording does not know.
    is_all_there: the match found all of it.
    is_stored:    what was not there was put.
    """

    at_s: float
    connection: int
    page_tokens: int
    num_tokens: int
    blocks: list[int]
    is_all_there: bool = False
    answer: list[int] = field(default_factory=list)
    is_got: bool = False
    is_stored: bool = False


@dataclass(slots=True, eq=False)
class _Question:
    """A match that may be what a client asks before it puts the KV of the request ``about``.

    owners: which request had each of its blocks before.
    """

    asked: _Asked
    about: _Asked
    owners: dict[int, _Asked | None]

    def is_for(self, put: list[int]) -> bool:
        """Whether a put is what was asked for. Parts, as logits, are put when the KV is stored."""
        is_own = self.asked.connection == self.about.connection
        is_of_parts = is_own and self.asked.blocks == self.about.blocks
        return put[0] == self.asked.blocks[0] and (is_of_parts or not self.about.is_stored)


class _Reader:
    """Turns lines into requests. put_tokens: of the pages that were put, how many of which size."""

    def __init__(self) -> None:
        self.requests: dict[_Asked, None] = {}
        self.put_tokens: Counter[int] = Counter()
        self._ids: dict[str, int] = {}
        self._of_block: dict[int, _Asked] = {}  # the request that had a block last
        self._last: dict[int, _Asked] = {}  # the last request of a connection
        self._questions: dict[int, _Question] = {}  # where that is what a connection did last

    def take(self, line: dict[str, Any]) -> None:
        """Take a line in which there is a chain."""
        chain = [self._ids.setdefault(name, len(self._ids)) for name in line["chain"]]
        question = self._questions.pop(line["conn"], None)
        if line.get("reply") == "error":
            return
        if line["cmd"] == _ASKING:
            self._match(line, chain)
        elif line["cmd"] in _MATCHES:
            self._begin(line, chain)
        elif line["cmd"] in _PUTS:
            self.put_tokens[int(line["page_tokens"])] += 1
            if question is not None and question.is_for(chain):
                self._take_back(question)
            owner = self._put(line, chain)
            mine = self._last.get(line["conn"], owner)
            (mine if mine.blocks[0] == chain[0] else owner).is_stored = True
        elif line["cmd"] == _GET:
            self._get(line, chain)

    def _match(self, line: dict[str, Any], chain: list[int]) -> None:
        known = [block for block in chain if block in self._of_block]
        candidates = [self._last.get(line["conn"]), self._of_block[known[-1]] if known else None]
        owners = {block: self._of_block.get(block) for block in chain}
        asked = self._begin(line, chain)
        asked.is_all_there = int(line.get("matched", 0)) >= asked.num_tokens > 0
        about = next((each for each in candidates if each and _may_be_about(asked, each)), None)
        if about is None:
            return
        question = _Question(asked, about, owners)
        is_moments_ago = asked.at_s - about.at_s < _MOMENTS_S
        is_open = asked.connection == about.connection and not about.is_stored
        if asked.is_all_there and is_moments_ago and is_open:
            self._take_back(question)
        elif is_moments_ago or not about.is_all_there:
            self._questions[asked.connection] = question

    def _take_back(self, question: _Question) -> None:
        asked, about = question.asked, question.about
        del self.requests[asked]
        for block, owner in question.owners.items():
            if self._of_block.get(block) is not asked:
                continue  # another one asked for it since
            if owner is None:
                del self._of_block[block]
            else:
                self._of_block[block] = owner
        self._extend(about, asked.blocks)
        self._last[asked.connection] = about
        about.is_stored = True

    def _put(self, line: dict[str, Any], chain: list[int]) -> _Asked:
        known = [block for block in chain if block in self._of_block]
        before = known[-1] if known else self._ids.get(line.get("parent", ""), -1)
        owner = self._of_block.get(before)
        if owner is None:
            return self._begin(line, chain)
        self._extend(owner, chain)
        return owner

    def _get(self, line: dict[str, Any], chain: list[int]) -> None:
        asked = self._last.get(line["conn"])  # the get that follows a match is the same request
        if asked is None or asked.is_got or not _is_within(chain, line, asked):
            asked = self._of_block.get(chain[-1])
        if asked is None or asked.is_got:
            asked = self._begin(line, chain)
        asked.is_got = True

    def _begin(self, line: dict[str, Any], chain: list[int]) -> _Asked:
        tokens, connection = int(line.get("tokens") or 0), int(line["conn"])
        asked = _Asked(float(line["t"]), connection, int(line["page_tokens"]), tokens, chain)
        self.requests[asked] = None
        self._of_block.update(dict.fromkeys(chain, asked))
        self._last[connection] = asked
        return asked

    def _extend(self, asked: _Asked, blocks: list[int]) -> None:
        new = [block for block in blocks if block not in self._of_block]
        asked.answer += new
        self._of_block.update(dict.fromkeys(new, asked))


def _may_be_about(asked: _Asked, about: _Asked) -> bool:
    """Whether a match repeats a request, or goes on from one of which nothing was stored yet."""
    full = about.num_tokens // about.page_tokens if about.page_tokens else len(about.blocks)
    is_longer = asked.num_tokens > about.num_tokens and asked.blocks[:full] == about.blocks[:full]
    return asked.blocks == about.blocks or (is_longer and not about.is_stored)


def _is_within(chain: list[int], line: dict[str, Any], asked: _Asked) -> bool:
    """Whether a get is of the beginning of a request; the last page may be a part of another."""
    tokens = int(line.get("tokens") or 0)
    full = tokens // asked.page_tokens if asked.page_tokens else len(chain)
    return tokens <= asked.num_tokens and chain[:full] == asked.blocks[:full] and full > 0


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
    return _trace(name, list(reader.requests), put[0] if put else page_tokens)


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
