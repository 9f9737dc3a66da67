"""Prompts in both faces: cut into pages, put, matched, got layer by layer, against a real server."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from respkv.client import AsyncClient, Client
from respkv.client.kv import COMMAND_BYTES, Pages, Shape
from respkv.client.requests import Gathered, request
from respkv.client.sequences import SequenceMatch, token_bytes
from respkv.errors import ConfigError, ConnectionLost, SequenceGap, ServerError
from tests.client.faces import Blocking
from tests.client.peer import Peer
from tests.server.prompts import DIM, HEADS, LAYERS, TOKENS, declare, text
from tests.server_process import ServerProcess

Connect = Callable[..., Any]


def test_a_prompt_is_put_and_comes_back_layer_by_layer(client: Any, namespace: str) -> None:
    declare(client, namespace)
    prompt = text(3 * TOKENS + 5, 1)
    assert client.seq.match(namespace, prompt.tokens).tokens == 0
    put = client.seq.put(namespace, prompt.tokens, prompt.kv, logits=b"logits")
    assert (put.stored, put.there, put.skipped) == (4, 0, 0)
    found = client.seq.match(namespace, prompt.tokens)
    assert (found.tokens, found.pages, found.tiers, found.has_logits) == (53, 3, "cccc", True)
    layers = client.seq.get(namespace, prompt.tokens, logits=True, hidden=True)
    assert (layers.matched, layers.num_tokens, layers.num_layers) == (53, 53, LAYERS)
    assert bytes(layers.logits) == b"logits"
    assert layers.hidden is None
    got = [bytes(layer) for layer in layers]
    assert got == [layer.tobytes() for layer in prompt.kv]
    assert list(layers) == []


@pytest.mark.parametrize("nbytes", [6, 300_000])
def test_a_match_brings_the_logits_if_asked(client: Any, namespace: str, nbytes: int) -> None:
    declare(client, namespace)
    prompt, logits = text(2 * TOKENS + 5, 11), bytes([7]) * nbytes
    client.seq.put(namespace, prompt.tokens, prompt.kv, logits=logits)
    found = client.seq.match(namespace, prompt.tokens, logits=True)
    assert (found.tokens, found.has_logits, bytes(found.logits)) == (37, True, logits)
    assert client.seq.match(namespace, prompt.tokens) == found._replace(logits=None)
    less = client.seq.match(namespace, prompt.tokens[:20], logits=True)
    assert (less.tokens, less.has_logits, less.logits) == (20, False, None)


def test_a_server_that_knows_no_logits_of_a_match_answers_without(
    connect: Connect, tmp_path: Path
) -> None:
    asked = list[list[bytes]]()

    def answer(args: list[bytes]) -> bytes:
        asked.append(args[3:])
        if b"LOGITS" in args[3:]:
            return b"-ERR syntax error, unexpected option 'LOGITS'\r\n"
        if b"other" in args:
            return b"-ERR syntax error, unexpected option 'SALT'\r\n"
        return b"*5\r\n:2\r\n:0\r\n$1\r\nc\r\n:9\r\n:1\r\n"

    with Peer(tmp_path / "s", answer) as peer:
        client = connect(peer.url)
        for _ in range(2):
            found = client.seq.match("ns", [1, 2], salt="s", logits=True)
            assert found == SequenceMatch(2, 0, "c", 9, True, None)
        with pytest.raises(ServerError, match="SALT"):
            client.seq.match("ns", [1, 2], salt="other", logits=True)
        client.close()
    salted = [b"SALT", b"s"]
    assert asked == [[*salted, b"LOGITS"], salted, salted, [b"SALT", b"other"]]


def test_what_else_a_server_refuses_is_not_taken_for_its_age(
    connect: Connect, tmp_path: Path
) -> None:
    with Peer(tmp_path / "s", lambda args: b"-KVSCHEMA no schema\r\n") as peer:
        client = connect(peer.url)
        for _ in range(2):
            with pytest.raises(ServerError, match="no schema"):
                client.seq.match("ns", [1, 2], logits=True)
        client.close()
    assert len(peer.seen) == 2


def test_what_is_there_is_not_sent_again(client: Any, namespace: str) -> None:
    declare(client, namespace)
    prompt = text(4 * TOKENS, 2)
    client.seq.put(namespace, prompt.tokens[:40], prompt.kv[:, :, :40].copy())
    found = client.seq.match(namespace, prompt.tokens)
    put = client.seq.put(namespace, prompt.tokens, prompt.kv, match=found)
    assert (put.stored, put.there, put.skipped) == (2, 0, 2)
    put = client.seq.put(namespace, prompt.tokens, prompt.kv)
    assert (put.stored, put.there, put.skipped) == (0, 0, 4)
    rest = prompt.followed_by(text(20, 3))
    new = numpy.ascontiguousarray(rest.kv[:, :, 48:])
    assert client.seq.put(namespace, rest.tokens, new, first=48).stored == 2
    (layer, *_) = client.seq.get(namespace, rest.tokens)
    assert bytes(layer) == rest.kv[0].tobytes()


def test_a_wrong_match_is_asked_again(client: Any, namespace: str) -> None:
    declare(client, namespace)
    prompt = text(4 * TOKENS, 4)
    client.seq.put(namespace, prompt.tokens, prompt.kv)
    found = client.seq.match(namespace, prompt.tokens[:50])
    client.command("FLUSHALL")
    declare(client, namespace)
    assert client.seq.put(namespace, prompt.tokens, prompt.kv, match=found).stored == 4
    client.command("FLUSHALL")
    tail = numpy.ascontiguousarray(prompt.kv[:, :, 32:])
    with pytest.raises(SequenceGap, match="FROM 0"):
        client.seq.put(namespace, prompt.tokens, tail, first=32)


def test_layers_are_put_and_got_one_by_one(client: Any, namespace: str) -> None:
    declare(client, namespace)
    prompt = text(TOKENS + 3, 5)
    for layer in range(LAYERS):
        client.seq.put_layer(namespace, prompt.tokens, layer, prompt.kv[layer])
    matched, got = client.seq.get_layer(namespace, prompt.tokens, 2, first=4, heads=(1, 3))
    assert matched == 19
    assert bytes(got) == prompt.part((2, 1), (1, 3), 4).tobytes()
    memory = bytearray(len(got))
    client.seq.get_layer(namespace, prompt.tokens, 2, first=4, heads=(1, 3), into=memory)
    assert memory == got


def test_layers_land_in_the_memory_they_are_given(client: Any, namespace: str) -> None:
    declare(client, namespace)
    prompt = text(600, 6)  # each layer is 300 KiB
    client.seq.put(namespace, prompt.tokens, prompt.kv)
    memory = numpy.zeros((LAYERS, 2 * 600 * HEADS * DIM), numpy.uint16)
    layers = client.seq.get(namespace, prompt.tokens, into=[*memory])
    for number, layer in enumerate(layers):
        assert bytes(layer) == prompt.kv[number].tobytes()
        assert memory[number].tobytes() == bytes(layer)
    with pytest.raises(ValueError, match="3 buffers for 4 layers"):
        client.seq.get(namespace, prompt.tokens, into=[*memory][:3])
    with pytest.raises(ValueError, match="layer 0 has"):
        list(client.seq.get(namespace, prompt.tokens, into=[bytearray(10)] * 4))
    client.ping()


def test_a_get_that_is_left_early_gives_its_connection_back(
    connect: Connect, server: ServerProcess, namespace: str
) -> None:
    client = connect(server.url, pool_max=1, timeout_s=3)
    declare(client, namespace)
    prompt = text(600, 7)
    client.seq.put(namespace, prompt.tokens, prompt.kv)
    for _ in range(3):
        layers = client.seq.get(namespace, prompt.tokens)
        assert bytes(next(iter(layers))) == prompt.kv[0].tobytes()
        layers.close()
        with pytest.raises(ConnectionLost):
            list(layers)
    assert client.seq.get(namespace, prompt.tokens).matched == 600  # dropped right away
    client.ping()
    with pytest.raises(ServerError):
        client.seq.get("no-such-namespace", [1])
    client.ping()


def test_pages_may_be_given_one_by_one_and_from_anything(client: Any, namespace: str) -> None:
    torch = pytest.importorskip("torch")
    declare(client, namespace)
    prompt = text(2 * TOKENS + 3, 8)
    cut = [prompt.kv[:, :, start : start + TOKENS].copy() for start in range(0, 35, TOKENS)]
    packed = struct.pack("<35i", *prompt.tokens)
    assert client.seq.put(namespace, packed, [each.tobytes() for each in cut]).stored == 3
    assert client.seq.match(namespace, numpy.array(prompt.tokens)).tokens == 35
    assert client.seq.match(namespace, torch.tensor(prompt.tokens)).tokens == 35
    other = text(2 * TOKENS + 3, 9)
    tensor = torch.from_numpy(other.kv.view(numpy.int16)).view(torch.bfloat16)
    assert client.seq.put(namespace, other.tokens, tensor).stored == 3
    flat = text(5, 10)
    assert client.seq.put(namespace, flat.tokens, flat.kv.tobytes()).stored == 1
    for each in (prompt, other, flat):
        got = [bytes(layer) for layer in client.seq.get(namespace, each.tokens)]
        assert got == [layer.tobytes() for layer in each.kv]


def test_long_prompts_are_sent_in_several_commands(client: Any, namespace: str) -> None:
    declare(client, namespace, dim=1024)
    n, random = 800, numpy.random.default_rng(11)
    tokens = random.integers(0, 1000, n)
    kv = random.integers(0, 1 << 16, (LAYERS, 2, n, HEADS, 1024), dtype=numpy.uint16)
    assert kv.nbytes > 3 * COMMAND_BYTES
    assert client.seq.put(namespace, tokens, kv).stored == 50
    for number, layer in enumerate(client.seq.get(namespace, tokens)):
        assert bytes(layer) == kv[number].tobytes()
    client.command("FLUSHALL")


def test_salted_prompts_do_not_meet(client: Any, namespace: str) -> None:
    declare(client, namespace)
    prompt = text(TOKENS, 12)
    chain = {"salt": "a", "lora": b"x", "media": [(2, 3, b"image")], "session": "s"}
    client.seq.put(namespace, prompt.tokens, prompt.kv, **chain)
    assert client.seq.match(namespace, prompt.tokens).tokens == 0
    assert client.seq.match(namespace, prompt.tokens, **chain).tokens == TOKENS
    assert client.seq.match(namespace, prompt.tokens, **(chain | {"salt": "b"})).tokens == 0
    assert client.seq.get(namespace, prompt.tokens, **chain).matched == TOKENS


@pytest.mark.parametrize(
    ("kv", "options", "message"),
    [
        (bytes(10), {}, r"kv has 10 bytes; \(4, 2, 20, 8, 16\) of 2 bytes each take 40960"),
        (numpy.zeros((4, 2, 20, 8, 8), numpy.uint16), {}, r"kv has shape \(4, 2, 20, 8, 8\)"),
        (numpy.zeros((4, 2, 20, 16, 8), numpy.uint16), {}, r"kv has shape"),
        (numpy.zeros((4, 2, 8, 20, 16), numpy.uint16).swapaxes(2, 3), {}, "contiguous"),
        ([bytes(10)], {}, "kv has 1 pages; tokens 0 to 19 are 2"),
        ([bytes(32768), bytes(10)], {}, "page 1 of kv has 10 bytes; its 4 tokens take 8192"),
        (bytes(40960), {"first": 5}, "first = 5: accepted are multiples of 16"),
        (bytes(40960), {"first": 32}, "up to 20"),
        (bytes(40960), {"heads": (0, 4)}, "take 20480"),
    ],
    ids=str,
)
def test_kv_that_does_not_fit_is_refused_by_name(
    server: ServerProcess, kv: Any, options: dict[str, Any], message: str
) -> None:
    with Client(server.url) as client:
        declare(client, "client-shapes")
        with pytest.raises(ValueError, match=message):
            client.seq.put("client-shapes", list(range(20)), kv, **options)
        assert client.seq.match("client-shapes", list(range(20))).tokens == 0


def test_a_namespace_that_was_declared_anew_is_asked_again(client: Any, namespace: str) -> None:
    declare(client, namespace)
    client.seq.put(namespace, [1], bytes(2048))
    client.command("KV.SCHEMA", "DEL", namespace)
    declare(client, namespace, dim=2 * DIM)
    assert client.seq.put(namespace, [1], bytes(4096)).stored == 1
    client.command("KV.SCHEMA", "DEL", namespace)
    declare(client, namespace, layers=2 * LAYERS)
    with pytest.raises(ValueError, match="take 4096"):
        client.seq.put(namespace, [2], bytes(4095))
    assert client.seq.put(namespace, [2], bytes(4096)).stored == 1


def test_an_option_that_is_none_is_refused_by_name(client: Any, namespace: str) -> None:
    declare(client, namespace)
    kv = numpy.zeros((LAYERS, 2, 3, HEADS, DIM), "uint16")
    calls: tuple[Callable[[], Any], ...] = (
        lambda: client.seq.match(namespace, [1, 2, 3], pin_ms=1),
        lambda: client.seq.put(namespace, [1, 2, 3], kv, pin_ms=1, ttl_ms=1),
        lambda: client.seq.get(namespace, [1, 2, 3], salts="s"),
        lambda: client.seq.explain(namespace, [1, 2, 3], priority=1),
        lambda: client.seq.retain(namespace, [1, 2, 3], pin_ms=1, ttl_ms=1),
        lambda: client.retain(f"{namespace}:a", salt="s", pin_ms=1),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"no such option: \w+; accepted are .*session"):
            call()
    assert client.seq.match(namespace, [1, 2, 3]).tokens == 0


def test_a_put_into_no_schema_says_so(client: Any, namespace: str) -> None:
    with pytest.raises(ConfigError, match="has no schema"):
        client.seq.put(namespace, [1], bytes(10))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (b"123", "3 is no multiple of 4"),
        ([1, -5, 3], "-5"),
        ([1, 1 << 31], "2147483648"),
        (numpy.array([1.5]), "float64"),
        (numpy.array([[1, 2]]), r"shape \(1, 2\)"),
        (numpy.array([3, -7]), "-7"),
    ],
    ids=str,
)
def test_tokens_that_are_none_are_refused_by_name(tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_bytes(tokens)


def test_tokens_of_every_kind_are_packed_alike() -> None:
    tokens = [0, 1, 77, (1 << 31) - 1]
    packed = struct.pack("<4i", *tokens)
    kinds: list[Any] = [tokens, tuple(tokens), packed, bytearray(packed)]
    kinds += [numpy.array(tokens, kind) for kind in ("int32", "int64", "uint32", ">i4")]
    for kind in kinds:
        assert token_bytes(kind) == packed
    assert token_bytes([]) == token_bytes(numpy.array([], "int64")) == b""


def test_pages_are_gathered_from_where_they_lie() -> None:
    kv = numpy.arange(2 * 2 * 20 * 2 * 2, dtype=numpy.uint16).reshape(2, 2, 20, 2, 2)
    pages = Pages(Shape(2, 2, 8, 2, 2, 2), 20, 0, kv, None, None)
    ((begin, end, payloads),) = pages.commands(8)
    assert (begin, end) == (8, 20)
    first, last = payloads
    assert isinstance(first, Gathered)
    assert isinstance(last, Gathered)
    assert b"".join(first.views) == kv[:, :, 8:16].tobytes()
    assert b"".join(last.views) == kv[:, :, 16:].tobytes()
    large = Gathered([memoryview(bytes([number]) * 5000) for number in range(3)])
    sent = b"".join(request([["X", large, Gathered([])]]).chunks)
    parts = b"".join(bytes([number]) * 5000 for number in range(3))
    assert sent == b"*3\r\n$1\r\nX\r\n$15000\r\n" + parts + b"\r\n$0\r\n\r\n"


def test_a_cancelled_get_closes_its_connection(server: ServerProcess) -> None:
    import anyio

    async def run() -> None:
        async with AsyncClient(server.url, pool_max=1, timeout_s=5) as client:
            shape: dict[str, Any] = {"layers": LAYERS, "heads": HEADS, "dim": DIM}
            await client.schema_set("client-cancel", tokens=TOKENS, dtype="bfloat16", **shape)
            prompt = text(600, 13)
            await client.seq.put("client-cancel", prompt.tokens, prompt.kv)
            async with await client.seq.get("client-cancel", prompt.tokens) as layers:
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    async for _ in layers:
                        await anyio.lowlevel.checkpoint()
            await client.ping()

    anyio.run(run)


def test_both_faces_have_the_same_methods() -> None:
    from respkv.client.sequence_faces import AsyncLayers, AsyncSequences, Layers, Sequences

    for one, other in ((Sequences, AsyncSequences), (Layers, AsyncLayers)):
        public = {name for name in dir(one) if not name.startswith("_")}
        assert public == {name for name in dir(other) if not name.startswith("_")}
    assert Blocking is not None
