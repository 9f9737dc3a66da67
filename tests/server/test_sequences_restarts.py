"""Prompts in files: what a server finds of them is what the one before it found."""

import random
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from respkv.client import Client
from tests.server_process import ServerProcess

SHAPE: Any = {"layers": 2, "heads": 1, "dim": 64, "dtype": "float16"}
TOKEN_BYTES = 2 * 2 * 64 * 2
# namespace: tokens of a page, and how its pages are named
NAMESPACES = {"a": (3, "blake3"), "b": (16, "sha256_cbor"), "c": (8, "sha256")}
SALTS = ("", "", "pepper")
Prompt = tuple[str, str, tuple[int, ...]]  # namespace, salt, tokens


def prompts(chance: random.Random, count: int) -> list[Prompt]:
    """Prompts that have much in common: each goes on from somewhere in another, or begins anew."""
    made: list[Prompt] = []
    for _ in range(count):
        namespace, salt, front = chance.choice(made or [("a", "", ())])
        if chance.random() < 0.3:
            namespace, salt = chance.choice(list(NAMESPACES)), chance.choice(SALTS)
        kept = front[: chance.randrange(len(front) + 1)]
        made.append((namespace, salt, kept + tuple(chance.choices((1, 2, 300), k=9))))
    return made


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def expected(stored: list[Prompt], asked: Prompt) -> int:
    """All that was stored is here, so it is the longest beginning that any of it has."""
    namespace, salt, tokens = asked
    return max(
        (common(each[2], tokens) for each in stored if each[:2] == (namespace, salt)), default=0
    )


def check(client: Client, stored: list[Prompt], asked: list[Prompt]) -> None:
    for each in asked:
        namespace, salt, tokens = each
        words: Any = {"salt": salt} if salt else {}
        assert client.seq.match(namespace, tokens, **words).tokens == expected(stored, each), each


def live(client: Client, chance: random.Random, stored: list[Prompt]) -> None:
    """Match and put, and hold every answer against what was stored."""
    others = prompts(chance, 20)
    check(client, stored, stored + others)
    for each in prompts(chance, 15):
        namespace, salt, tokens = each
        words: Any = {"salt": salt} if salt else {}
        kv = bytes(TOKEN_BYTES * len(tokens))
        client.seq.put(namespace, tokens, kv, durability="written", **words)
        stored.append(each)
        check(client, stored, [each])
    crossed = [(one[0], other[1], one[2]) for one, other in pairwise(stored)]
    check(client, stored, stored + others + crossed)


@pytest.mark.parametrize("seed", range(2))
def test_prompts_are_matched_to_the_token_after_restarts_and_a_crash(
    tmp_path: Path, seed: int
) -> None:
    chance, stored = random.Random(seed), list[Prompt]()
    for how in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        server = ServerProcess(nvme_path=str(tmp_path), nvme_bytes="256mb", maxmemory="16mb")
        try:
            with Client(server.url) as client:
                for name, (tokens, algorithm) in NAMESPACES.items():
                    client.schema_set(
                        name, **SHAPE, tokens=tokens, algorithm=algorithm, seed="vllm-none-hash"
                    )
                live(client, chance, stored)
        finally:
            server.stop(how)
