"""Prompts of hybrid models: each group of layers is put and got by itself, and matches together."""

from collections.abc import Iterator
from typing import Any

import numpy
import pytest

from respkv.client import Client, LayerGroup
from respkv.errors import SequenceGap, ServerError
from tests.server.prompts import DIM, HEADS, LAYERS, TOKENS, text
from tests.server_process import ServerProcess

WINDOW, STATE_BYTES = 20, 1000


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    """A client whose namespace h has all kinds of groups beside full attention."""
    with Client(server.url) as opened:
        opened.command("FLUSHALL")
        opened.command("KV.SCHEMA", "DEL", "h")
        opened.schema_set(
            "h",
            layers=LAYERS,
            heads=HEADS,
            dim=DIM,
            tokens=TOKENS,
            dtype="bfloat16",
            groups={
                "swa": LayerGroup("sliding", layers=2, heads=2, dim=8, window=WINDOW),
                "mla": LayerGroup("mla", layers=3, dim=5, dtype="float32"),
                "ssm": LayerGroup("state", nbytes=STATE_BYTES),
            },
        )
        yield opened


def of_group(num_tokens: int, *shape: int, seed: int = 0, itemsize: int = 2) -> Any:
    """Return random numbers of a group: layers, planes, then heads and dim."""
    layers, planes, *rest = shape
    random = numpy.random.default_rng(seed)
    kind = numpy.uint16 if itemsize == 2 else numpy.uint32
    return random.integers(0, 1 << 16, (layers, planes, num_tokens, *rest), dtype=kind)


def test_a_position_matches_once_every_group_has_it(client: Client) -> None:
    n = 3 * TOKENS + 5
    prompt = text(n, 1)
    swa, mla = of_group(n, 2, 2, 2, 8), of_group(n, 3, 1, 1, 5, itemsize=4)
    state = bytes(range(250)) * 4
    assert client.seq.put("h", prompt.tokens, prompt.kv).stored == 4
    assert client.seq.match("h", prompt.tokens).tokens == 0
    assert client.seq.put("h", prompt.tokens, swa, group="swa").stored == 4
    assert client.seq.put("h", prompt.tokens, mla, group="mla").stored == 4
    assert client.seq.match("h", prompt.tokens).tokens == 0
    reason, words, served = client.seq.explain("h", prompt.tokens)
    assert (reason, served) == ("group", 0)
    assert words.startswith("0 of 53 tokens can be served; tokens 0 to 15, page 0, h:")
    assert words.endswith("all groups of layers need: group ssm serves 0")
    client.seq.put("h", prompt.tokens, state, group="ssm")
    assert client.seq.match("h", prompt.tokens).tokens == n
    assert client.seq.match("h", [*prompt.tokens, 1, 2]).tokens == n
    got = [bytes(layer) for layer in client.seq.get("h", prompt.tokens)]
    assert got == [layer.tobytes() for layer in prompt.kv]
    got = [bytes(layer) for layer in client.seq.get("h", prompt.tokens, group="mla", first=7)]
    assert got == [layer[:, 7:].tobytes() for layer in mla]
    got = [bytes(layer) for layer in client.seq.get("h", prompt.tokens, group="swa")]
    assert got == [layer[:, n - WINDOW :].tobytes() for layer in swa]
    heads = client.seq.get("h", prompt.tokens, group="swa", heads=(1, 1), layers=(1, 1))
    assert [bytes(layer) for layer in heads] == [swa[1][:, n - WINDOW :, 1:].tobytes()]
    assert [bytes(each) for each in client.seq.get("h", prompt.tokens, group="ssm")] == [state]


def test_rectangles_of_a_group_are_put_together(client: Client) -> None:
    n = 2 * TOKENS
    prompt = text(n, 2)
    swa, mla = of_group(n, 2, 2, 2, 8, seed=2), of_group(n, 3, 1, 1, 5, itemsize=4)
    client.seq.put("h", prompt.tokens, prompt.kv)
    client.seq.put("h", prompt.tokens, mla, group="mla")
    client.seq.put("h", prompt.tokens, bytes(STATE_BYTES), group="ssm")
    for head in (1, 0):
        part = numpy.ascontiguousarray(swa[:, :, :, head : head + 1])
        client.seq.put("h", prompt.tokens, part, group="swa", heads=(head, 1))
        assert client.seq.match("h", prompt.tokens).tokens == (0 if head else n)
    got = [bytes(layer) for layer in client.seq.get("h", prompt.tokens, group="swa")]
    assert got == [layer[:, n - WINDOW :].tobytes() for layer in swa]


def test_a_group_needs_its_page_and_its_size(client: Client) -> None:
    prompt = text(TOKENS, 3)
    swa = of_group(TOKENS, 2, 2, 2, 8)
    with pytest.raises(SequenceGap):
        client.seq.put("h", prompt.tokens, swa, group="swa")
    with pytest.raises(ValueError, match="has 1000 bytes, not 5"):
        client.seq.put("h", prompt.tokens, b"short", group="ssm")
    with pytest.raises(ServerError, match="1000 bytes"):
        client.command("KV.SEQ.PUT", "h", b"1234", 1, b"short", "GROUP", "ssm")
    with pytest.raises(ServerError, match="no group"):
        client.command("KV.SEQ.GET", "h", b"1234", "GROUP", "none")
    with pytest.raises(ServerError, match="no layers or heads"):
        client.command("KV.SEQ.GET", "h", b"1234", "GROUP", "ssm", "LAYERS", 0, 1)


def test_logits_of_a_hybrid_prompt_may_come_before_its_groups(client: Client) -> None:
    prompt = text(TOKENS + 1, 4)
    client.seq.put("h", prompt.tokens, prompt.kv, logits=b"logits")
    assert client.seq.get("h", prompt.tokens, logits=True).logits is None
    client.seq.put("h", prompt.tokens, of_group(TOKENS + 1, 2, 2, 2, 8), group="swa")
    client.seq.put("h", prompt.tokens, of_group(TOKENS + 1, 3, 1, 1, 5, itemsize=4), group="mla")
    client.seq.put("h", prompt.tokens, bytes(STATE_BYTES), group="ssm")
    layers = client.seq.get("h", prompt.tokens, logits=True)
    assert layers.logits is not None
    assert bytes(layers.logits) == b"logits"
