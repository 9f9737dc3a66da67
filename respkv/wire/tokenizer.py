"""hiredis as a tokenizer of requests: which of its answers can be trusted, and where it stands.

hiredis parses replies, so it takes for an array of bulk strings much that is none. Bulks are
returned as bytes, but so are simple strings, big numbers and verbatim strings; sets, maps and
attributes look like arrays. All of those begin with a type byte of their own after CR LF.
"""

import re
import secrets
from typing import Any, Final, cast

import hiredis

from respkv.wire.calls import Framings

_MORE: Final = object()
# A map of an array is a TypeError, a claimed length beyond memory a MemoryError, and so on.
_REFUSALS: Final = (hiredis.ProtocolError, MemoryError, TypeError, ValueError)
_NOT_BULK = re.compile(rb"\r\n[+=(~|>%]")
# hiredis makes a list of a claimed count before any element came, seconds long for the largest.
_LARGE_COUNT = re.compile(rb"\*[0-9]{6}")


def is_suspicious(data: bytes | bytearray, nbytes: int) -> bool:
    """Whether ``data[:nbytes]`` may hold what hiredis should not see or would take for bulks."""
    return bool(_NOT_BULK.search(data, 0, nbytes) or _LARGE_COUNT.search(data, 0, nbytes))


class Tokenizer:
    """The hiredis reader that all connections of an event loop share.

    It is empty between calls: a command that is not whole yet waits in its connection's parser.
    framings: of the reads that it took.
    """

    def __init__(self) -> None:
        self.framings = Framings()
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        # Nobody can send the same by chance or on purpose, which would hide an unfinished command.
        token = secrets.token_hex(8).encode()
        self._probe = b"*1\r\n$%d\r\n%b\r\n" % (len(token), token)
        self._probed = [token]

    def take(self, data: bytes | bytearray, nbytes: int) -> tuple[list[Any] | None, bool]:
        """Return the replies in ``data[:nbytes]``, and whether the last one ends with the data.

        hiredis does not say whether it stands between two replies, so a small one is fed after the
        data: only from there is it returned as it is. None instead of a list: hiredis refuses.
        """
        reader = self._reader
        try:
            reader.feed(cast(bytes, data), 0, nbytes)  # it takes any buffer
            found = list(iter(reader.gets, _MORE))
        except _REFUSALS:
            self.reset()
            return None, False
        try:
            reader.feed(self._probe)
            is_whole = reader.gets() == self._probed
        except _REFUSALS:
            is_whole = False
        if not is_whole:
            self.reset()
        return found, is_whole

    def reset(self) -> None:
        """Forget what was fed and not returned."""
        self._reader = hiredis.Reader(notEnoughData=_MORE)
