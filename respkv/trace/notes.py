"""What a recording says of a command: names, sizes and hashes, never tokens or payloads.

Keys, namespaces, sessions and the pages of prompts are hashed with a salt of 32 random bytes that is
made for one recording and kept nowhere. So equal keys are equal within a recording, and nobody can
find a prompt, or compare two recordings, by hashing guesses. A word that is no command of respkv or
Redis is not written down either: clients have sent passwords as commands.

Chains: KV.MATCH names the pages of a prompt itself. A KV.SEQ command brings tokens; they are cut into
pages as the schema of the namespace says and hashed in a chain of our own, each page with the one in
front of it, so equal ids have equal prompts up to there. What goes into the chain beside tokens (salt,
tenant, LoRA, media) goes into the first hash.
"""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from respkv.errors import CommandError
from respkv.trace.scan import Answer
from respkv.wire.commands.command import Command, parse_integer
from respkv.wire.commands.table import look_up, look_up_sub

ID_BYTES = 8
TOKEN_BYTES = 4
KEYS_MAX = 4096  # of a command that is no chain; their number is written all the same
TOKENS_AT = 2  # where the tokens of a KV.SEQ command are
_PREFIX_BYTES_MAX = 512  # of a word that may be an option
_SEQUENCES = (b"KV.SEQ.MATCH", b"KV.SEQ.PUT", b"KV.SEQ.GET")
_HINTS = (b"END", b"EXPECT", b"DEMOTE")
# Words of a chain, with how many arguments each has.
_CHAIN_WORDS = {b"SALT": 1, b"TENANT": 1, b"LORA": 1, b"LORAPATH": 1, b"MM": 3}
# From these on, what the server sends answers no command that we could name.
_ENDS_ORDER = (b"SUBSCRIBE", b"PSUBSCRIBE", b"SSUBSCRIBE", b"MONITOR", b"SYNC", b"PSYNC")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A large argument that went past: only its length is known."""

    nbytes: int

    def __len__(self) -> int:
        return self.nbytes


@dataclass(slots=True)
class Noted:
    """A command that waits for its reply.

    fields: of its line, without time and reply.
    schema: the namespace and the tokens of a page that a KV.SCHEMA SET asks for.
    """

    command: Command | None
    fields: dict[str, Any] = field(default_factory=dict)
    ends_order: bool = False
    schema: tuple[bytes, int] | None = None


def is_tokens(head: Sequence[Any], nbytes: int) -> bool:
    """Whether the large argument that comes next is the tokens of a sequence."""
    return (
        len(head) == TOKENS_AT
        and isinstance(head[0], bytes)
        and head[0].upper() in _SEQUENCES
        and nbytes % TOKEN_BYTES == 0
    )


class Notes:
    """Writes commands down. page_tokens: of namespaces whose schema nobody has told us.

    Learns the tokens of a page from KV.SCHEMA SET as it goes by, and from ``learn``. What is not known
    yet is believed at once, since sequences may come before the reply.
    """

    def __init__(self, page_tokens: int = 0) -> None:
        self._salt = secrets.token_bytes(32)
        self._page_tokens = page_tokens
        self._schemas: dict[bytes, int] = {}

    def learn(self, namespace: bytes, page_tokens: int) -> None:
        """Remember how many tokens a page of a namespace has."""
        self._schemas[namespace] = page_tokens

    def answered(self, noted: Noted, *, is_error: bool) -> None:
        """Learn from how the server answered a command."""
        if noted.schema is not None and not is_error:
            self.learn(*noted.schema)

    def command(self, args: Sequence[Any]) -> Noted:
        """Return what is written of a command. args: bytes, or ``Skipped``."""
        name = _word(args[0])
        command = look_up(name)
        if command is None:
            fields = {"cmd": "other", "num_keys": 0, "in_bytes": 0}
            return Noted(None, fields, ends_order=name in _ENDS_ORDER)
        if command.subcommands and len(args) > 1:
            command = look_up_sub(command, _word(args[1])) or command
        noted = Noted(command, {"cmd": command.name}, ends_order=name in _ENDS_ORDER)
        if command.name == "client|reply":
            noted.ends_order = True
        if command.name == "kv.schema|set":
            self._note_schema(noted, args)
        payloads = [args[place] for place in range(1, len(args)) if command.is_payload(place)]
        if command.name == "kv.hint":
            self._note_hint(noted.fields, args)
        if name in _SEQUENCES:
            self._note_sequence(noted.fields, name, args)
        else:
            noted.fields["in_bytes"] = sum(map(len, payloads))
            self._note_keys(noted.fields, command, args)
        return noted

    def _note_keys(self, fields: dict[str, Any], command: Command, args: Sequence[Any]) -> None:
        words = [arg if isinstance(arg, bytes) else b"" for arg in args]
        try:
            keys = command.keys(words)
        except CommandError:
            keys = []  # the server will say what is wrong with it
        fields["num_keys"] = len(keys)
        if command.name == "kv.match":
            fields["chain"] = [self._key(key) for key in keys]
            fields["page_tokens"] = self._tokens_of(keys[0].rpartition(b":")[0]) if keys else 0
        elif command.name == "kv.put" and keys:
            fields["chain"] = [self._key(keys[0])]
            if len(keys) > 1:
                fields["parent"] = self._key(keys[1])
            fields["page_tokens"] = _option(words, b"TOKENS", 3) or self._tokens_of(
                keys[0].rpartition(b":")[0]
            )
        elif keys:
            fields["keys"] = [self._key(key) for key in keys[:KEYS_MAX]]

    def _note_sequence(self, fields: dict[str, Any], name: bytes, args: Sequence[Any]) -> None:
        fields.update(num_keys=0, in_bytes=0)
        if len(args) <= TOKENS_AT:
            return  # the server will say what is missing
        if not all(isinstance(arg, bytes) for arg in args[1 : TOKENS_AT + 1]):
            return
        rest = args[TOKENS_AT + 1 :]
        if name == b"KV.SEQ.PUT" and rest:
            count = parse_integer(rest[0]) if isinstance(rest[0], bytes) else None
            count = min(max(count or 0, 0), len(rest) - 1)
            fields["in_bytes"] = sum(map(len, rest[1 : 1 + count]))
            rest = rest[1 + count :]
        words = [arg if isinstance(arg, bytes) else b"" for arg in rest]
        tokens, page_tokens = args[TOKENS_AT], self._tokens_of(args[1])
        fields["tokens"] = len(tokens) // TOKEN_BYTES
        fields["page_tokens"] = page_tokens
        if page_tokens:
            fields["chain"] = self._chain(args[1], _chain_words(words), tokens, page_tokens)
            fields["num_keys"] = len(fields["chain"])
        self._note_session(fields, _value(words, b"SESSION"))

    def _note_hint(self, fields: dict[str, Any], args: Sequence[Any]) -> None:
        words = [_word(arg) for arg in args]
        if len(args) > 3 and words[3] in _HINTS:
            fields["hint"] = words[3].decode().lower()
            self._note_session(fields, args[2])

    def _note_session(self, fields: dict[str, Any], session: object) -> None:
        if isinstance(session, bytes) and session:
            fields["session"] = self._hash(b"session", session).hex()

    def _chain(
        self, namespace: bytes, words: Iterable[bytes], tokens: bytes, page_tokens: int
    ) -> list[str]:
        parent = self._hash(b"root", *(self._hash(b"word", word) for word in (namespace, *words)))
        ids: list[str] = []
        step = page_tokens * TOKEN_BYTES
        for start in range(0, len(tokens), step):
            parent = self._hash(b"page", parent, tokens[start : start + step])
            ids.append(parent.hex())
        return ids

    def _note_schema(self, noted: Noted, args: Sequence[Any]) -> None:
        words = [arg if isinstance(arg, bytes) else b"" for arg in args]
        if len(words) > 2 and (tokens := _option(words, b"TOKENS", 3)):
            noted.schema = words[2], tokens
            self._schemas.setdefault(*noted.schema)

    def _tokens_of(self, namespace: bytes) -> int:
        return self._schemas.get(namespace, self._page_tokens)

    def _key(self, key: bytes) -> str:
        return self._hash(b"key", key).hex()

    def _hash(self, kind: bytes, *parts: bytes | bytearray) -> bytes:
        hashed = blake2b(digest_size=ID_BYTES, key=self._salt, person=kind)
        for part in parts:
            hashed.update(part)
        return hashed.digest()


def describe(command: Command | None, answer: Answer) -> dict[str, Any]:
    """Return what is written of a reply: hit, miss, partial, ok or error, and what matched."""
    fields: dict[str, Any] = {"out_bytes": answer.nbytes}
    if answer.kind in "-!":
        return {"reply": "error", "error": _code(answer.word), **fields}
    name = "" if command is None else command.name
    if name in ("kv.match", "kv.seq.match", "kv.seq.get"):
        matched = answer.number or 0
        return {"reply": "hit" if matched else "miss", "matched": matched, **fields}
    if answer.kind == "_":
        return {"reply": "miss", **fields}
    reads = command is not None and "readonly" in command.flags and command.key_specs
    if not reads:
        return {"reply": "ok", **fields}
    if answer.kind == ":":
        return {
            "reply": "hit" if answer.number else "miss",
            "matched": answer.number or 0,
            **fields,
        }
    if answer.kind == "*" and answer.items:
        found = answer.items - answer.nils
        word = "partial" if answer.nils else "hit"
        return {"reply": word if found else "miss", "matched": found, **fields}
    return {"reply": "hit", **fields}


def _chain_words(words: Sequence[bytes]) -> list[bytes]:
    found: list[bytes] = []
    place = 0
    while place < len(words):
        count = _CHAIN_WORDS.get(words[place].upper(), 0)
        if count:
            found += (words[place].upper(), *words[place + 1 : place + 1 + count])
        place += 1 + count
    return found


def _word(arg: object) -> bytes:
    return arg.upper() if isinstance(arg, bytes) and len(arg) <= _PREFIX_BYTES_MAX else b""


def _value(words: Sequence[bytes], name: bytes) -> bytes:
    for place in range(len(words) - 1):
        if words[place].upper() == name:
            return words[place + 1]
    return b""


def _option(words: Sequence[bytes], name: bytes, start: int) -> int:
    number = parse_integer(_value(words[start:], name))
    return number if number is not None and number > 0 else 0


def _code(word: str) -> str:
    return word if word.isascii() and word.isalnum() and word.isupper() else "ERR"
