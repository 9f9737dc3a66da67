"""The longest cached prefix: the run of present pages from the start of a chain."""

from collections.abc import Mapping
from typing import cast

from respkv.engine.entry import Entry


def longest_run(entries: Mapping[bytes, Entry], keys: list[bytes], ended_by_ms: int) -> list[Entry]:
    """Return the entries of ``keys`` up to the first that is absent, or whose TTL has ended.

    ended_by_ms: the wall clock; 0 when no entry has a TTL, which saves looking at each.
    """
    found: list[Entry | None] = list(map(entries.get, keys))
    if not all(found):  # an entry is always true; asking is quicker than looking for None
        del found[found.index(None) :]
    run = cast("list[Entry]", found)
    if ended_by_ms:
        for position, entry in enumerate(run):
            if 0 < entry.expires_ms <= ended_by_ms:
                return run[:position]
    return run
