"""What one command is: its name, how it may be called, which arguments are keys.

Everything the outside asks about a command follows from here: arity errors, COMMAND and its
relatives, key permissions, docs/commands.md. Key positions are written once, as Redis 7 key
specifications, and the older first/last/step triple is worked out from them, as Redis does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from respkv.errors import CommandError

# In the order in which Redis prints them; kv is ours.
CATEGORIES = (
    *("keyspace", "read", "write", "set", "sortedset", "list", "hash", "string", "bitmap"),
    *("hyperloglog", "geo", "stream", "pubsub", "admin", "fast", "slow", "blocking"),
    *("dangerous", "connection", "transaction", "scripting", "kv"),
)
_BY_FLAG = {
    "readonly": ("read",),
    "write": ("write",),
    "admin": ("admin", "dangerous"),
    "pubsub": ("pubsub",),
    "blocking": ("blocking",),
    "fast": ("fast",),
}
_INTEGER_DIGITS_MAX = 20
_INT64_MAX = (1 << 63) - 1


def parse_integer(data: bytes) -> int | None:
    """Read a 64-bit integer as strictly as Redis: no plus sign, space or leading zero."""
    if len(data) > _INTEGER_DIGITS_MAX:
        return None
    digits = data[1:] if data[:1] == b"-" else data
    if not digits.isdigit() or (digits[:1] == b"0" and data != b"0"):
        return None
    number = int(data)
    return number if -_INT64_MAX - 1 <= number <= _INT64_MAX else None


@dataclass(frozen=True, slots=True)
class KeySpec:
    """Where some of a command's keys are.

    flags:   Redis's key flags: one of RO RW OW RM, then what is done to the key.
    begin:   the first key's position; or a word, matched in any case from position ``start`` on,
             after which the keys begin. A word that is absent means no keys.
    last:    the last key's distance from the first; negative counts from the last argument, -1.
    counted: instead of ``last``: the argument at ``begin`` is the number of keys that follow it.
    """

    flags: tuple[str, ...]
    begin: int | str = 1
    start: int = 0
    last: int = 0
    step: int = 1
    counted: bool = False
    notes: str = ""

    def positions(self, args: Sequence[bytes]) -> range:
        """Return where the keys are in ``args``. Raises CommandError when a count is wrong."""
        first = self.begin if isinstance(self.begin, int) else self._after_word(args)
        if first >= len(args):
            return range(0)
        if self.counted:
            count = parse_integer(args[first])
            if count is None:
                raise CommandError("value is not an integer or out of range")
            if count < 1:
                raise CommandError("numkeys should be greater than 0")
            if count > len(args) - first - 1:
                raise CommandError("Number of keys can't be greater than number of args")
            return range(first + 1, first + 1 + count)
        last = len(args) + self.last if self.last < 0 else first + self.last
        return range(first, last + 1, self.step)

    def _after_word(self, args: Sequence[bytes]) -> int:
        word = str(self.begin).encode()
        for index in range(self.start, len(args)):
            if len(args[index]) == len(word) and args[index].upper() == word:
                return index + 1
        return len(args)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command, or one subcommand, of the table.

    name:        lower case; a subcommand is ``client|id``.
    arity:       arguments with the name; negative: at least so many.
    categories:  the ACL categories that do not follow from the flags.
    syntax:      one line, options in brackets.
    notes:       sentences for docs/commands.md: what a reader of Redis's manual would not know.
    subcommands: by their second word, lower case; empty for most.
    payload:     (first, step) when arguments first, first + step, ... are values that may be large
                 enough to land in memory directly; step 0: that argument alone.
    """

    name: str
    arity: int
    summary: str
    since: str
    group: str
    complexity: str
    syntax: str
    flags: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    key_specs: tuple[KeySpec, ...] = ()
    tips: tuple[str, ...] = ()
    payload: tuple[int, int] | None = None
    deprecated_since: str = ""
    replaced_by: str = ""
    notes: str = ""
    subcommands: Mapping[str, "Command"] = field(default_factory=dict)

    @property
    def acl_categories(self) -> tuple[str, ...]:
        """All ACL categories, without the ``@``, in Redis's order."""
        names = set(self.categories)
        for flag in self.flags:
            names.update(_BY_FLAG.get(flag, ()))
        if "fast" not in names:
            names.add("slow")
        return tuple(name for name in CATEGORIES if name in names)

    @property
    def first_key(self) -> int:
        """The first key's position; 0 when no key has a fixed one."""
        return self._legacy()[0]

    @property
    def last_key(self) -> int:
        """The last key's position; negative counts from the last argument."""
        return self._legacy()[1]

    @property
    def step(self) -> int:
        """The distance between two keys."""
        return self._legacy()[2]

    def accepts(self, num_args: int) -> bool:
        """Return whether ``num_args`` arguments, the name counted, fit the arity."""
        return num_args == self.arity if self.arity >= 0 else num_args >= -self.arity

    def is_payload(self, index: int) -> bool:
        """Return whether the argument at ``index`` may be a large value."""
        if self.payload is None:
            return False
        first, step = self.payload
        return index == first or (step > 0 and index > first and (index - first) % step == 0)

    def keys(self, args: Sequence[bytes]) -> list[bytes]:
        """Return the keys among ``args``, which begin with the name, in order, repeats included.

        Raises CommandError when the command says how many keys it has and that cannot be.
        """
        if self.subcommands and len(args) > 1:
            found = self.subcommands.get(args[1].decode("latin-1").lower())
            return found.keys(args) if found else []
        return [args[index] for spec in self.key_specs for index in spec.positions(args)]

    def _legacy(self) -> tuple[int, int, int]:
        for spec in self.key_specs:
            if isinstance(spec.begin, int) and not spec.counted:
                last = spec.last if spec.last < 0 else spec.begin + spec.last
                return spec.begin, last, spec.step
        return 0, 0, 0


def subcommands(*commands: Command) -> dict[str, Command]:
    """Return the subcommands of one command by their second word."""
    return {command.name.partition("|")[2]: command for command in commands}
