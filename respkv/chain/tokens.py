"""Token ids as bytes: int32, little-endian, and what may stand among those of a page."""

import struct
from collections.abc import Iterator, Sequence

TOKEN_BYTES = 4
TOKEN_MAX = 2**31 - 1
MARKER = b"\xff\xff\xff\xff"  # in front of a medium; no token, because those are not negative
MARKER_BYTES = 20


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Return token ids as they travel: int32, little-endian. Raises ValueError naming a bad one."""
    try:
        packed = struct.pack(f"<{len(tokens)}i", *tokens)
    except struct.error:
        wrong = [each for each in tokens if not (isinstance(each, int) and 0 <= each <= TOKEN_MAX)]
        shown = repr(wrong[0]) if wrong else "one of them"
        raise ValueError(f"a token id is 0 to {TOKEN_MAX}, not {shown}") from None
    check_tokens(packed)
    return packed


def check_tokens(tokens: bytes) -> None:
    """Raise ValueError unless these are token ids, int32 little-endian, none of them negative."""
    if len(tokens) % TOKEN_BYTES:
        raise ValueError(
            f"token ids are int32, little-endian, {TOKEN_BYTES} bytes each; {len(tokens)} bytes are no "
            "multiple of that"
        )
    if not tokens[3::4].isascii():  # the byte with the sign of each
        position = next(at for at, high in enumerate(tokens[3::4]) if high > 127)
        (token,) = struct.unpack_from("<i", tokens, position * TOKEN_BYTES)
        raise ValueError(f"a token id is 0 to {TOKEN_MAX}, not {token} (at position {position})")


def tokens_of(token_ids: bytes) -> bytes:
    """Return the tokens of a page without the markers of media among them."""
    if MARKER not in token_ids:
        return token_ids
    return b"".join(_pieces(token_ids))


def common_tokens(one: bytes, other: bytes) -> int:
    """Return how many tokens two pages of one branch have in common from the start."""
    length = min(len(one), len(other))
    difference = int.from_bytes(one[:length], "big") ^ int.from_bytes(other[:length], "big")
    same = length - (difference.bit_length() + 7) // 8
    if MARKER not in one[:same]:
        return same // TOKEN_BYTES
    return sum(map(len, _pieces(one[:same]))) // TOKEN_BYTES


def _pieces(token_ids: bytes) -> Iterator[bytes]:
    """Yield the tokens between markers; a marker that is cut short ends them."""
    at = 0
    for start in range(0, len(token_ids) - TOKEN_BYTES + 1, TOKEN_BYTES):
        if start >= at and token_ids.startswith(MARKER, start):
            yield token_ids[at:start]
            at = start + MARKER_BYTES
    yield token_ids[at : len(token_ids) - len(token_ids) % TOKEN_BYTES]


assert MARKER_BYTES % TOKEN_BYTES == 0
