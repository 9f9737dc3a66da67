"""What the commands on sequences have in common: a namespace, tokens, and what names their chain.

Two prompts share a page when the tokens up to it are equal and so are these words: the salt and the
tenant, the LoRA adapter, the media that stand in for some tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from respkv.chain import Extras, Media, Prompt
from respkv.engine.namespaces import Schema
from respkv.errors import CommandError, SchemaMismatch
from respkv.server.arguments import Words, shown
from respkv.tiers.rectangles import Rectangle

if TYPE_CHECKING:
    from respkv.server.session import Session

SESSION_BYTES_MAX = 256
_ONCE: Final = {b"SALT": "salt", b"TENANT": "tenant", b"LORA": "lora", b"LORAPATH": "lora_path"}


class ChainWords:
    """SALT, TENANT, LORA, LORAPATH and MM, which make the chain, and SESSION."""

    def __init__(self) -> None:
        self.session = b""
        self.tenant = b""
        self._named: dict[str, bytes] = {}
        self._media: list[Media] = []

    def take(self, word: bytes, words: Words) -> bool:
        """Read what follows a word, if it is one of these. Raises CommandError."""
        name = _ONCE.get(word)
        if name is not None:
            if name in self._named:
                raise words.unexpected()
            self._named[name] = words.take()
            self.tenant = self._named.get("tenant", b"")
        elif word == b"MM":
            first, count = words.count("MM first"), words.count("MM count", 1)
            try:
                self._media.append(Media(first, count, words.take()))
            except ValueError as error:
                raise CommandError(str(error)) from None
        elif word == b"SESSION" and not self.session:
            self.session = words.take()
            if not 1 <= len(self.session) <= SESSION_BYTES_MAX:
                raise CommandError(
                    f"SESSION has 1 to {SESSION_BYTES_MAX} bytes, not {len(self.session)}"
                )
        else:
            return False
        return True

    def extras(self) -> Extras:
        """Return what is mixed into the chain. Raises CommandError."""
        if "lora_path" in self._named and not self._named.get("lora"):
            raise CommandError("LORAPATH needs the LORA that it belongs to")
        try:
            return Extras(media=tuple(self._media), **self._named)
        except ValueError as error:
            raise CommandError(str(error)) from None


def prompt_of(session: "Session", namespace: Any, tokens: Any, extras: Extras) -> Prompt:
    """Return a prompt. Raises SchemaMismatch or CommandError, saying what it lacks."""
    if not isinstance(namespace, bytes) or not isinstance(tokens, bytes):
        raise CommandError("the namespace and the tokens are plain arguments")
    return session.server.sequences.prompt(namespace, tokens, extras)


@dataclass(slots=True)
class Portion:
    """The part of a model that is meant: some layers, some heads, a group of layers."""

    layers: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None
    group: bytes = b""

    def take(self, word: bytes, words: Words) -> bool:
        """Read what follows LAYERS, HEADS or GROUP, if the word is one of these."""
        if word == b"LAYERS" and self.layers is None:
            self.layers = (words.count("first layer"), words.count("layer count", 1))
        elif word == b"HEADS" and self.heads is None:
            self.heads = (words.count("first head"), words.count("head count", 1))
        elif word == b"GROUP" and not self.group:
            self.group = words.take()
        else:
            return False
        return True

    def rectangle(self, schema: Schema) -> Rectangle | None:
        """Return what it is of the pages of a schema; None: all. Raises CommandError.

        Raises SchemaMismatch when the schema has no such group.
        """
        if self.layers is None and self.heads is None:
            return None
        group = schema.group(self.group)
        if group.geometry is None:
            raise CommandError(f"group {shown(group.name)} has no layers or heads to choose from")
        try:
            return Rectangle.of(group.geometry, self.layers, self.heads)
        except ValueError as error:
            raise CommandError(str(error)) from None


def schema_of(session: "Session", namespace: bytes) -> Schema:
    """Return the schema of a namespace. Raises SchemaMismatch when it has none."""
    schema = session.cache.namespaces.find(namespace)
    if schema is None:
        raise SchemaMismatch(
            f"namespace {shown(namespace)} has no schema, which says how long a page is and how its"
            " id is made: KV.SCHEMA SET first"
        )
    return schema
