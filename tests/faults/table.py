"""The faults in force, in a file that the process under test, or a file system below it, maps.

    disk.set("error", "sync", code=errno.EIO)      # from now on
    disk.set("torn", "write", every=7, times=3)
    ...
    disk.heal()

Kinds are those of tests/tiers/faulty_device.py; what differs is that ``short`` moves a part and says
so, as a system may, without an error. Calls: read and write in all their forms, sync (fsync and
fdatasync), open, rename, truncate, allocate (fallocate, too), remove, and io_uring (the making of a
ring, nothing more; only the preload library sees it).
"""

import errno
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Call = Literal[
    "read", "write", "sync", "open", "rename", "truncate", "allocate", "remove", "io_uring"
]
Kind = Literal["error", "short", "torn", "dropped", "misdirected", "flip", "slow", "hang"]

# These orders are those of the enums in preload.c.
CALLS: tuple[Call, ...] = (
    *("read", "write", "sync", "open", "rename", "truncate", "allocate", "remove", "io_uring"),
)
KINDS: tuple[Kind, ...] = (
    *("error", "short", "torn", "dropped", "misdirected", "flip", "slow", "hang"),
)

# struct rule: is_active, kind, calls, code, skip, every, times, delay_us, seen, hits, name
_RULE = struct.Struct("<IIIiIIIIII64s")
_FIELD = struct.Struct("<I")
_SEEN_AT, _HITS_AT = 8 * _FIELD.size, 9 * _FIELD.size
_DIRECTORY_BYTES = 1024
_RULES = 16
TABLE_BYTES = _DIRECTORY_BYTES + _RULES * _RULE.size


@dataclass(frozen=True, slots=True)
class Rule:
    """A fault that was set, by its place in the table."""

    index: int
    kind: Kind
    code: int
    delay_s: float


class Table:
    """The table as a file system written in Python reads it; preload.c does it by itself."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def is_active(self, rule: Rule) -> bool:
        """Say whether a rule is still in force."""
        return bool(self._get(_at(rule.index)))

    def hit(self, call: Call, name: str) -> list[Rule]:
        """Return the rules that hit this call, and count them. One thread at a time."""
        bit = 1 << CALLS.index(call)
        hits = []
        for index in range(_RULES):
            at = _at(index)
            fields = _RULE.unpack_from(self._memory, at)
            active, kind, calls, code, skip, every, times, delay_us, seen, num_hits, prefix = fields
            if not active or not calls & bit:
                continue
            if not name.encode().startswith(prefix.rstrip(b"\0")):
                continue
            self._put(at + _SEEN_AT, seen + 1)
            if seen < skip or (seen - skip) % every or (times and num_hits >= times):
                continue
            self._put(at + _HITS_AT, num_hits + 1)
            hits.append(Rule(index, KINDS[kind], code, delay_us / 1e6))
        return hits

    def _get(self, at: int) -> int:
        return int(_FIELD.unpack_from(self._memory, at)[0])

    def _put(self, at: int, value: int) -> None:
        _FIELD.pack_into(self._memory, at, value)


class Faults(Table):
    """The table as a test changes it.

    environment: what the process under test must have in its environment; may be empty.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        super().__init__(memory)
        self.environment: dict[str, str] = {}

    def set(
        self,
        kind: Kind,
        *calls: Call,
        code: int = errno.EIO,
        name: str = "",
        skip: int = 0,
        every: int = 1,
        times: int = 0,
        delay_s: float = 0.0,
    ) -> Rule:
        """Put a fault in force, for calls on files whose names start with ``name``.

        ``skip`` of them pass; then one in ``every`` is hit, ``times`` in all (0: no end).
        """
        moves = set(calls) <= {"read", "write"}
        assert kind in ("error", "slow", "hang") or moves or (kind, *calls) == ("dropped", "sync")
        index = next(each for each in range(_RULES) if not self._get(_at(each)))
        mask = sum(1 << CALLS.index(call) for call in calls)
        _RULE.pack_into(
            *(self._memory, _at(index), 0, KINDS.index(kind), mask, code, skip, every, times),
            *(int(delay_s * 1e6), 0, 0, name.encode()),
        )
        self._put(_at(index), 1)
        return Rule(index, kind, code, delay_s)

    def hits(self, rule: Rule) -> int:
        """Return how many calls it has hit, also after it was healed."""
        return self._get(_at(rule.index) + _HITS_AT)

    def heal(self, rule: Rule | None = None) -> None:
        """End one fault, or all; what hangs goes on."""
        for index in [rule.index] if rule else range(_RULES):
            self._put(_at(index), 0)


@contextmanager
def lay_out(directory: Path) -> Iterator[tuple[Path, Faults]]:
    """Make a table for the files of one directory, which need not exist yet."""
    where = os.path.realpath(directory).encode()
    assert len(where) < _DIRECTORY_BYTES
    with tempfile.TemporaryDirectory(prefix="respkv-faults-") as folder:
        path = Path(folder, "table")
        path.write_bytes(where.ljust(TABLE_BYTES, b"\0"))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            yield path, Faults(memory)


def _at(index: int) -> int:
    return _DIRECTORY_BYTES + index * _RULE.size
