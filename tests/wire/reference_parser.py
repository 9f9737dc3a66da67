"""Redis's request grammar, written to be read: one whole stream in, its commands and error out."""

import re

from respkv.errors import ProtocolError
from respkv.wire.inline import split_inline
from respkv.wire.parser import ARG_OVERHEAD_BYTES, LINE_BYTES_MAX, Limits

NUMBER = re.compile(rb"0|-?[1-9][0-9]{0,18}")


class Reference:
    """The events of a stream, and whether some bulk did not end in CR LF.

    Redis trusts those two bytes and so do we; what follows wrong ones may be read in two ways.
    """

    def __init__(self, stream: bytes, limits: Limits | None = None) -> None:
        self.events: list[object] = []
        self.has_loose_end = False
        self._rest = stream
        self._limits = limits or Limits()
        try:
            while self._rest and (command := self._command()) is not None:
                if command:
                    self.events.append(command)
        except ProtocolError as error:
            self.events.append(str(error))

    def _command(self) -> list[bytes] | None:
        if self._rest[:1] != b"*":
            return self._inline()
        count = self._number("mbulk", "multibulk")
        if count is None:
            return None
        if count > self._limits.args_max:
            raise ProtocolError("Protocol error: invalid multibulk length")
        args: list[bytes] = []
        while len(args) < count:
            if not self._rest:
                return None
            if self._rest[:1] != b"$":
                got = chr(self._rest[0]) if 0x20 <= self._rest[0] < 0x7F else "?"
                raise ProtocolError(f"Protocol error: expected '$', got '{got}'")
            length = self._number("bulk", "bulk")
            if length is None:
                return None
            if not 0 <= length <= self._limits.bulk_max:
                raise ProtocolError("Protocol error: invalid bulk length")
            held = sum(len(arg) + ARG_OVERHEAD_BYTES for arg in args)
            if length < LINE_BYTES_MAX and held + length > self._limits.held_max:
                raise ProtocolError("Protocol error: too big request")
            if len(self._rest) < length + 2:
                return None
            args.append(self._rest[:length])
            self.has_loose_end |= self._rest[length : length + 2] != b"\r\n"
            self._rest = self._rest[length + 2 :]
        return args

    def _inline(self) -> list[bytes] | None:
        line, newline, rest = self._rest.partition(b"\n")
        if len(line) > self._limits.inline_max:
            raise ProtocolError("Protocol error: too big inline request")
        if not newline:
            return None
        self._rest = rest
        return split_inline(line.removesuffix(b"\r"))

    def _number(self, line: str, name: str) -> int | None:
        end = self._rest.find(b"\r")
        if end < 0 or end >= LINE_BYTES_MAX:
            if len(self._rest) >= LINE_BYTES_MAX:
                raise ProtocolError(f"Protocol error: too big {line} count string")
            return None
        if end + 2 > len(self._rest):
            return None
        digits = self._rest[1:end]
        self.has_loose_end |= self._rest[end : end + 2] != b"\r\n"
        self._rest = self._rest[end + 2 :]
        if not NUMBER.fullmatch(digits):
            raise ProtocolError(f"Protocol error: invalid {name} length")
        return int(digits)
