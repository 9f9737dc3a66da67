"""How KV.SCHEMA SET says the shape of a namespace and of its groups of layers, and GET repeats it.

    LAYERS n HEADS n DIM n TOKENS n DTYPE d       or MLA LAYERS n DIM n TOKENS n DTYPE d
    [GROUP name FULL           LAYERS n HEADS n DIM n [DTYPE d]]...
    [GROUP name SLIDING window LAYERS n HEADS n DIM n [DTYPE d]]...
    [GROUP name MLA            LAYERS n DIM n [DTYPE d]]...
    [GROUP name STATE          BYTES n]...

What stands behind GROUP is of that group until the next one, so the shape of the namespace itself
comes first. A group has the namespace's dtype unless it says another one.
"""

import re
from collections.abc import Sequence
from typing import Final

from respkv.engine.namespaces import Group, Kind
from respkv.errors import CommandError
from respkv.page import Geometry, Latents
from respkv.server.arguments import Words, shown

GROUPS_MAX: Final = 16
SHAPE_WORDS: Final = (b"LAYERS", b"HEADS", b"DIM", b"DTYPE", b"BYTES")
_NAME = re.compile(rb"[A-Za-z0-9_-]{1,32}")


class Draft:
    """The words of one group as they come; the first draft is of the namespace's own shape."""

    def __init__(self, name: bytes = b"", kind: Kind = Kind.FULL, window: int = 0) -> None:
        self.name = name
        self.kind = kind
        self.window = window
        self._counts: dict[bytes, int] = {}
        self._dtype = ""

    def read(self, word: bytes, words: Words) -> None:
        """Take the value of one of SHAPE_WORDS. Raises CommandError."""
        if word not in self._accepted:
            raise CommandError(f"{self._label} does not take {word.decode()}")
        if word in self._counts or (word == b"DTYPE" and self._dtype):
            raise CommandError(
                f"{self._label} has {word.decode()} twice; what is behind a GROUP is of that group"
            )
        if word == b"DTYPE":
            self._dtype = shown(words.take())
        else:
            self._counts[word] = words.count(word.decode(), 1)

    def geometry(self, tokens: int | None, dtype: str = "") -> Geometry:
        """Return the shape of pages. dtype: unless the group says one. Raises CommandError."""
        missing = [word.decode() for word in self._needed if word not in self._counts]
        if tokens is None:
            missing.append("TOKENS")
        dtype = self._dtype or dtype
        if not dtype:
            missing.append("DTYPE")
        if tokens is None or missing:
            raise CommandError(f"{self._label} needs {', '.join(missing)}")
        heads = self._counts.get(b"HEADS", 1)
        make = Latents if self.kind is Kind.MLA else Geometry
        try:
            return make(self._counts[b"LAYERS"], heads, self._counts[b"DIM"], tokens, dtype)
        except ValueError as error:
            where = f"{self._label}: " if self.name else ""
            raise CommandError(f"{where}{error}") from None

    def group(self, main: Geometry) -> Group:
        """Return the group, in a namespace of this shape. Raises CommandError."""
        if self.kind is not Kind.STATE:
            geometry = self.geometry(main.tokens, main.dtype)
            return Group(self.name, self.kind, geometry, self.window)
        if b"BYTES" not in self._counts:
            raise CommandError(f"{self._label} needs BYTES")
        return Group(self.name, self.kind, nbytes=self._counts[b"BYTES"])

    @property
    def _label(self) -> str:
        return f"GROUP {shown(self.name)}" if self.name else "a schema"

    @property
    def _needed(self) -> tuple[bytes, ...]:
        if self.kind is Kind.MLA:
            return b"LAYERS", b"DIM"
        return b"LAYERS", b"HEADS", b"DIM"

    @property
    def _accepted(self) -> tuple[bytes, ...]:
        return (b"BYTES",) if self.kind is Kind.STATE else (b"LAYERS", b"HEADS", b"DIM", b"DTYPE")


def read_group(words: Words) -> Draft:
    """Read what follows GROUP: its name and its kind. Raises CommandError."""
    name, word = words.take(), words.word()
    if _NAME.fullmatch(name) is None:
        raise CommandError(
            f"GROUP {shown(name)}: a name has 1 to 32 letters, digits, hyphens and underscores"
        )
    if word.lower() not in [kind.value.encode() for kind in Kind]:
        accepted = ", ".join(kind.name for kind in Kind)
        raise CommandError(f"GROUP {shown(name)} {shown(word)}: accepted are {accepted}")
    kind = Kind[word.decode()]
    return Draft(name, kind, words.count("SLIDING", 1) if kind is Kind.SLIDING else 0)


def groups_of(drafts: Sequence[Draft], main: Geometry) -> tuple[Group, ...]:
    """Return the groups by name, whatever the order in which they were said. Raises CommandError."""
    if len(drafts) > GROUPS_MAX:
        raise CommandError(f"a schema has at most {GROUPS_MAX} groups, not {len(drafts)}")
    groups = sorted((draft.group(main) for draft in drafts), key=lambda group: group.name)
    names = [group.name for group in groups]
    for name in names:
        if names.count(name) > 1:
            raise CommandError(f"GROUP {shown(name)} is given twice")
    return tuple(groups)


def words_of(group: Group) -> list[str]:
    """Return a group in the words of KV.SCHEMA SET, those behind GROUP."""
    words = [group.name.decode(), group.kind.name]
    if group.window:
        words.append(str(group.window))
    shape = group.geometry
    if shape is None:
        return [*words, "BYTES", str(group.nbytes)]
    words += ["LAYERS", str(shape.layers)]
    if group.kind is not Kind.MLA:
        words += ["HEADS", str(shape.heads)]
    return [*words, "DIM", str(shape.dim), "DTYPE", shape.dtype]
