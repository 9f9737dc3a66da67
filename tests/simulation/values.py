"""Values that say whose they are: each names its key and the write that made it, all through."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Value:
    """``nbytes`` bytes in which ``tag`` repeats. Values are equal if their bytes are."""

    tag: bytes
    nbytes: int

    def bytes(self) -> bytes:
        """Return the bytes."""
        return (self.tag * (self.nbytes // len(self.tag) + 1))[: self.nbytes]


def value_of_write(key: bytes, number: int, nbytes: int) -> Value:
    """Return the value of the ``number``-th write of a history."""
    return Value((b"<%d %b>" % (number, key))[: nbytes or 1], nbytes)


def value_of_page(key: bytes, nbytes: int) -> Value:
    """Return the one content that a key which ends with a page id names."""
    return Value(b"<page %b>" % key, nbytes)
