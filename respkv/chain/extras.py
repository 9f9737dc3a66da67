"""What a prompt's K and V depend on beside its tokens, and how that is hashed into its chain."""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from respkv.chain.tokens import TOKEN_BYTES, TOKEN_MAX

_WORD_BYTES_MAX = 1024  # of a salt, a tenant, a name
_SALT, _TENANT, _LORA, _MEDIUM = range(1, 5)
_FIELD = struct.Struct("<BI")  # kind, bytes
_PLACE = struct.Struct("<qI")  # first token of a medium in its page, tokens


class _Digest(Protocol):
    def digest(self) -> bytes: ...


Hash = Callable[[bytes], _Digest]


@dataclass(frozen=True, slots=True)
class Media:
    """An image, or another input that stands for tokens of the prompt.

    first, count: the tokens it stands for; digest: names its content.
    """

    first: int
    count: int
    digest: bytes

    def __post_init__(self) -> None:
        if self.first < 0 or not 1 <= self.count <= TOKEN_MAX or self.first > TOKEN_MAX:
            raise ValueError(
                f"a medium stands for at least one token of the prompt, not for {self.count} "
                f"from {self.first}"
            )
        if not 1 <= len(self.digest) <= _WORD_BYTES_MAX:
            raise ValueError(
                f"the digest of a medium has 1 to {_WORD_BYTES_MAX} bytes, not {len(self.digest)}"
            )


@dataclass(frozen=True, slots=True)
class Extras:
    """What a prompt's K and V depend on beside its tokens and the model.

    salt, tenant:    whoever names another shares nothing.
    lora, lora_path: name of the adapter, and the path that vLLM hashes with it.
    media:           in the order in which they stand in the prompt.
    """

    salt: bytes = b""
    tenant: bytes = b""
    lora: bytes = b""
    lora_path: bytes = b""
    media: tuple[Media, ...] = ()

    def __post_init__(self) -> None:
        for name in ("salt", "tenant", "lora", "lora_path"):
            if len(getattr(self, name)) > _WORD_BYTES_MAX:
                raise ValueError(
                    f"{name} has at most {_WORD_BYTES_MAX} bytes, not {len(getattr(self, name))}"
                )
        if self.lora_path and not self.lora:
            raise ValueError("a LoRA path needs a LoRA name")
        end = 0
        for medium in self.media:
            if medium.first < end:
                raise ValueError(
                    f"the medium at token {medium.first} begins before the one in front of it ends"
                )
            end = medium.first + medium.count

    def overlapping(self, first: int, stop: int) -> tuple[Media, ...]:
        """Return the media that stand for some of the tokens from ``first`` up to ``stop``."""
        if not self.media:
            return ()
        begin = bisect_right(self.media, first, key=lambda each: each.first + each.count)
        end = bisect_left(self.media, stop, key=lambda each: each.first)
        return self.media[begin:end]


NO_EXTRAS = Extras()


def shared_fields(extras: Extras, index: int) -> bytes:
    """Pack the extras that do not depend on where in the prompt a page is, but for the first one."""
    fields = b""
    if not index:
        if extras.salt:
            fields += _pack(_SALT, extras.salt)
        if extras.tenant:
            fields += _pack(_TENANT, extras.tenant)
    if extras.lora:
        name = len(extras.lora).to_bytes(4, "little") + extras.lora
        fields += _pack(_LORA, name + extras.lora_path)
    return fields


def medium_name(medium: Media, first: int) -> bytes:
    """Pack a medium, with its place in the page that begins at token ``first``."""
    return _PLACE.pack(medium.first - first, medium.count) + medium.digest


def media_fields(extras: Extras, first: int, stop: int) -> bytes:
    """Pack the media that stand for some of the tokens from ``first`` up to ``stop``."""
    media = extras.overlapping(first, stop)
    return b"".join(_pack(_MEDIUM, medium_name(each, first)) for each in media)


def node_of(function: Hash, parent: bytes, fields: bytes) -> bytes:
    """Hash extras into the id before a page; what is hashed is as long as no tokens are."""
    if not fields:
        return parent
    return function(parent + fields + bytes((1 - len(fields)) % TOKEN_BYTES)).digest()


def _pack(kind: int, value: bytes) -> bytes:
    return _FIELD.pack(kind, len(value)) + value
