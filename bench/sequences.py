"""Row 12: one KV.SEQ.MATCH of a long prompt that is stored, against hashing its pages.

Hashing is what a client would have to do for itself before it could ask for anything by key; the
match does it, and is sent, looked up, touched, promised and answered as well. The server keeps the ids of the
last prompts, so before each match it is made to forget them, outside of what is measured.
"""

import random
from collections.abc import Iterator
from functools import partial
from time import perf_counter, perf_counter_ns

from bench.load import Load, WrongReplyError, command
from bench.result import MIB, Line, Result, duration
from bench.rows import Bench
from bench.servers import respkv_server
from respkv.chain import Chain, pack_tokens
from respkv.client import Client

ROW = 12
TOKENS = 32_768
PAGE_TOKENS = (16, 64, 256)
AT_LEAST = 1 / 3  # in under three times the time of hashing them
LAYER_BYTES = 8  # of one token: the smallest that is of use, because no byte of it is sent


def sequence_match(bench: Bench) -> Iterator[Result]:
    """Match a prompt to the token, all of which is there but its end."""
    tokens = pack_tokens(random.Random(ROW).choices(range(128_000), k=TOKENS + 5))
    for page_tokens in PAGE_TOKENS:
        with respkv_server(256 * MIB) as server:
            namespace = f"match-{page_tokens}"
            _store(server.url, namespace, page_tokens, tokens)
            with Load(server.tcp) as load:
                named = namespace, page_tokens, tokens
                match = partial(_match, load, named, bench.scale.prefixes)
                chain = Chain("blake3", b"", page_tokens)
                hashing = partial(_hash, chain, tokens, bench.scale.prefixes)
                work = (
                    f"match {TOKENS + 5:,} tokens in pages of {page_tokens}, against hashing them"
                )
                yield bench.compare(Line(ROW, f"{work}, TCP", AT_LEAST, duration, hashing, match))


def _store(url: str, namespace: str, page_tokens: int, tokens: bytes) -> None:
    with Client(url) as client:
        client.schema_set(namespace, layers=1, heads=1, dim=4, tokens=page_tokens, dtype="uint8")
        kv = bytes(LAYER_BYTES * (len(tokens) // 4))
        client.seq.put(namespace, tokens, kv)


def _hash(chain: Chain, tokens: bytes, count: int) -> float:
    start = perf_counter()
    for _ in range(count):
        chain.ids(tokens)
    return (perf_counter() - start) / count


def _forget(load: Load, namespace: str, page_tokens: int) -> None:
    """Change what new pages are kept for, at which the server forgets the prompts that it knows."""
    shape = ["LAYERS", "1", "HEADS", "1", "DIM", "4", "DTYPE", "uint8", "TOKENS"]
    ttl = str(1_000_000 + perf_counter_ns() % 1_000_000)  # never that of the last time
    answer = load.ask("KV.SCHEMA", "SET", namespace, *shape, str(page_tokens), "TTL", ttl)
    if answer != b"+OK":
        raise WrongReplyError(f"to KV.SCHEMA SET: {answer!r}")


def _match(load: Load, named: tuple[str, int, bytes], count: int) -> float:
    namespace, page_tokens, tokens = named
    request = command("KV.SEQ.MATCH", namespace, tokens)
    expected = b"*5\r\n:%d\r\n" % (len(tokens) // 4)
    reply = bytearray(64 + TOKENS)
    took = 0.0
    for _ in range(count):
        _forget(load, namespace, page_tokens)
        start = perf_counter()
        load.send([request], len(request))
        load.receive_past(reply, len(expected) + 8)
        took += perf_counter() - start
    if not reply.startswith(expected):
        raise WrongReplyError(f"not the whole prompt: {bytes(reply[:64])!r}")
    return took / count
