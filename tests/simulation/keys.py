"""The keys of a history: few, so that clients meet, and of every kind."""

import random
from dataclasses import dataclass, field

LAYERS = 4


@dataclass(frozen=True, slots=True)
class Key:
    """page_bytes: of a page whose key names its content, else 0."""

    name: bytes
    parent: bytes = b""
    page_bytes: int = 0


@dataclass(slots=True)
class Keys:
    """``pages`` are a chain in a namespace with a schema; ``free`` are pages without one."""

    plain: list[Key]
    pages: list[Key]
    free: list[Key]
    layers: int
    layer_bytes: int
    maxmemory: int
    all: list[Key] = field(init=False)
    kv: list[Key] = field(init=False)

    def __post_init__(self) -> None:
        self.all = [*self.plain, *self.pages, *self.free]
        self.kv = [*self.pages, *self.pages, *self.free]

    def any(self, rng: random.Random) -> Key:
        """Choose a key, the first ones more often."""
        keys = rng.choice((self.plain, self.plain, self.pages, self.free))
        return keys[min(rng.randrange(len(keys)), rng.randrange(len(keys)))]

    def size(self, rng: random.Random, key: Key) -> int:
        """Choose how many bytes a plain value has."""
        if key.page_bytes and rng.random() < 0.5:
            return key.page_bytes  # as many as the page would have
        least, most = rng.choice(((0, 8), (9, 448), (449, 16_000), (16_000, 70_000)))
        if rng.random() < 0.1:
            least, most = 70_000, 300_000
        return rng.randint(least, most)


def make_keys(rng: random.Random, maxmemory: int) -> Keys:
    """Choose the keys of a history."""
    tokens = rng.choice((4, 16, 32))
    layer_bytes = 2 * tokens * 2 * 64 * 2
    plain = [Key(b"k%d" % number) for number in range(rng.choice((3, 10, 40)))]
    pages: list[Key] = []
    for number in range(rng.choice((3, 10, 24))):
        name = b"m:" + b"%064x" % number
        parent = pages[-1].name if pages else b""
        pages.append(Key(name, parent, LAYERS * layer_bytes))
    free = [Key(b"n:%d" % number) for number in range(rng.choice((2, 10)))]
    return Keys(plain, pages, free, LAYERS, layer_bytes, maxmemory)


def schema_words(keys: Keys) -> list[str]:
    """Return the command that registers the schema of ``pages``."""
    tokens = keys.layer_bytes // 512
    words = f"KV.SCHEMA SET m LAYERS {LAYERS} HEADS 2 DIM 64 TOKENS {tokens} DTYPE float16"
    return words.split()
