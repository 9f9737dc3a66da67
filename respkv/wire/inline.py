"""Inline commands: a line of words as a person types it into a terminal.

The quoting rules are those of redis-cli and of Redis's own inline requests: double quotes with
escapes, single quotes with only ``\\'``, and a closing quote must be followed by a space.
"""

from respkv.errors import ProtocolError

_ESCAPES = {0x6E: 0x0A, 0x72: 0x0D, 0x74: 0x09, 0x62: 0x08, 0x61: 0x07}
_SPACES = b" \t\n\r\v\f\0"
_QUOTE, _APOSTROPHE, _BACKSLASH, _X = 0x22, 0x27, 0x5C, 0x78
_HEX = frozenset(b"0123456789abcdefABCDEF")


def split_inline(line: bytes) -> list[bytes]:
    """Split a line into its words. Raises ProtocolError when a quote is left open."""
    if _QUOTE not in line and _APOSTROPHE not in line:
        return line.replace(b"\0", b" ").split()
    words: list[bytes] = []
    position = 0
    while True:
        while position < len(line) and line[position] in _SPACES:
            position += 1
        if position == len(line):
            return words
        position, word = _word(line, position)
        words.append(word)


def _word(line: bytes, position: int) -> tuple[int, bytes]:
    word = bytearray()
    while position < len(line) and line[position] not in _SPACES:
        byte = line[position]
        if byte in (_QUOTE, _APOSTROPHE):
            position = _quoted(line, position + 1, byte, word)
            if position < len(line) and line[position] not in _SPACES:
                raise _unbalanced()
            break
        word.append(byte)
        position += 1
    return position, bytes(word)


def _quoted(line: bytes, position: int, quote: int, word: bytearray) -> int:
    """Append what stands up to the closing quote; return the position after it."""
    while position < len(line):
        byte = line[position]
        if byte == quote:
            return position + 1
        if byte == _BACKSLASH and position + 1 < len(line):
            position, byte = _escaped(line, position + 1, quote)
        else:
            position += 1
        word.append(byte)
    raise _unbalanced()


def _escaped(line: bytes, position: int, quote: int) -> tuple[int, int]:
    """Return the position after an escape, and the byte it stands for."""
    byte = line[position]
    if quote == _APOSTROPHE:
        return (position + 1, byte) if byte == _APOSTROPHE else (position, _BACKSLASH)
    digits = line[position + 1 : position + 3]
    if byte == _X and len(digits) == 2 and _HEX.issuperset(digits):
        return position + 3, int(digits, 16)
    return position + 1, _ESCAPES.get(byte, byte)


def _unbalanced() -> ProtocolError:
    return ProtocolError("Protocol error: unbalanced quotes in request")
