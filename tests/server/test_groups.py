"""Hybrid models over sockets: layers of several kinds are put, matched where all serve, and got."""

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from respkv.client import Client
from respkv.client.schemas import LayerGroup
from respkv.errors import ServerError
from tests.conftest import StartServer
from tests.server_process import ServerProcess

T = 8
MAIN: dict[str, Any] = {"layers": 2, "heads": 2, "dim": 8, "tokens": T, "dtype": "float16"}
LOCAL = LayerGroup("sliding", layers=3, heads=1, dim=4, window=12)
FULL = LayerGroup("full", layers=1, heads=4, dim=8, dtype="uint8")
MAMBA = LayerGroup("state", nbytes=1000)
INDEX = LayerGroup("mla", layers=2, dim=6, dtype="uint8")
WINDOW = 12

Array = NDArray[Any]


def prompt_of(seed: int, count: int) -> list[int]:
    return [int(each) for each in numpy.random.default_rng(seed).integers(0, 1000, count)]


def kv_of(seed: int, *shape: int, dtype: str = "float16") -> Array:
    values = numpy.random.default_rng(seed).integers(0, 250, shape)
    return values.astype(dtype)


def layers_of(found: Any, like: Array) -> list[Array]:
    """Return the layers of an answer, each in the shape and dtype of those of ``like``."""
    planes, _, *rest = like.shape[1:]
    return [
        numpy.frombuffer(bytes(layer), like.dtype).reshape(planes, -1, *rest) for layer in found
    ]


def assert_equal(found: Any, expected: Array) -> None:
    for layer, each in zip(layers_of(found, expected), expected, strict=True):
        numpy.testing.assert_array_equal(layer, each)


def ask(client: Client, *words: Any) -> Any:
    return client.command(*words)


@pytest.fixture
def client(server: ServerProcess) -> Any:
    with Client(server.url) as made:
        made.command("FLUSHALL")
        yield made
        made.command("KV.SCHEMA", "DEL", "ns")  # others have pages of that name without a schema


def test_full_attention_and_a_sliding_window_like_gemma(client: Client) -> None:
    client.schema_set("ns", **MAIN, groups={"local": LOCAL})
    tokens = prompt_of(1, 30)
    main, local = kv_of(1, 2, 2, 30, 2, 8), kv_of(2, 3, 2, 30, 1, 4)
    client.seq.put("ns", tokens, main)
    assert client.seq.match("ns", tokens).tokens == 0
    client.seq.put("ns", tokens, numpy.ascontiguousarray(local[:, :, 16:]), first=16, group="local")
    assert client.seq.match("ns", tokens).tokens == 30
    assert client.seq.match("ns", [*tokens, 7, 7]).tokens == 30
    assert client.seq.match("ns", [*tokens[:29], 1001]).tokens == 29
    assert client.seq.match("ns", tokens[:27]).tokens == 0, "its window begins at token 15"
    with client.seq.get("ns", tokens) as found:
        assert_equal(found, main)
    with client.seq.get("ns", tokens, group="local") as found:
        assert found.matched == 30
        assert_equal(found, local[:, :, 30 - WINDOW :])
    with client.seq.get("ns", tokens, first=24, group="local", layers=(1, 2)) as found:
        assert_equal(found, local[1:, :, 24:])
    client.seq.put("ns", tokens, local, group="local")
    assert client.seq.match("ns", tokens[:27]).tokens == 27
    with client.seq.get("ns", tokens[:5], group="local") as found:
        assert_equal(found, local[:, :, :5])


def test_attention_and_recurrent_states_like_jamba(client: Client) -> None:
    client.schema_set("ns", **MAIN, groups={"full": FULL, "mamba": MAMBA})
    tokens = prompt_of(2, 37)
    main, full = kv_of(1, 2, 2, 37, 2, 8), kv_of(2, 1, 2, 37, 4, 8, dtype="uint8")
    client.seq.put("ns", tokens, main, logits=b"logits of the end")
    client.seq.put("ns", tokens, full, group="full")
    assert client.seq.match("ns", tokens).tokens == 0, "no state is there"
    states = {count: bytes([count]) * 1000 for count in (37, 16, 21)}
    for count, state in states.items():
        client.seq.put("ns", tokens[:count], state, group="mamba")
    for count, expected in ((37, 37), (36, 21), (21, 21), (20, 16), (16, 16), (15, 0)):
        assert client.seq.match("ns", tokens[:count]).tokens == expected, count
        if not expected:
            continue
        with client.seq.get("ns", tokens[:count], group="mamba") as found:
            assert found.matched == expected
            assert [bytes(each) for each in found] == [states[expected]]
        with client.seq.get("ns", tokens[:count], group="full") as found:
            assert_equal(found, full[:, :, :expected])
    assert client.seq.match("ns", tokens).has_logits
    with client.seq.get("ns", tokens, logits=True) as found:
        assert bytes(found.logits or b"") == b"logits of the end"
    other = tokens[:21] + prompt_of(3, 30)
    client.seq.put("ns", other, kv_of(4, 2, 2, 51, 2, 8))
    assert client.seq.match("ns", other).tokens == 21, "by the sibling that has all groups"
    client.seq.put("ns", other, kv_of(5, 1, 2, 51, 4, 8, dtype="uint8"), group="full")
    assert client.seq.match("ns", other).tokens == 21, "the state is that of a sibling's page"


def test_latents_alone_and_with_another_group_of_latents_like_deepseek(client: Client) -> None:
    shape: dict[str, Any] = {"layers": 3, "dim": 10, "tokens": T, "dtype": "bfloat16"}
    client.schema_set("ns", **shape, mla=True, groups={"index": INDEX})
    info = client.schema_get("ns") or {}
    assert (info["kind"], info["page_bytes"]) == ("mla", 3 * T * 10 * 2)
    assert info["groups"] == [["index", "MLA", "LAYERS", "2", "DIM", "6", "DTYPE", "uint8"]]
    tokens = prompt_of(5, 21)
    latents = kv_of(6, 3, 1, 21, 1, 10, dtype="uint16")
    index = kv_of(7, 2, 1, 21, 1, 6, dtype="uint8")
    with pytest.raises(ValueError, match=r"shape \(3, 20, 10\); tokens 0 on take \(3, 21, 10\)"):
        client.seq.put("ns", tokens, latents[:, 0, :20, 0].copy())
    client.seq.put("ns", tokens, latents.reshape(3, 21, 10))
    client.seq.put("ns", tokens[:16], index[:, :, :16].copy(), group="index")
    assert client.seq.match("ns", tokens).tokens == 16
    client.seq.put("ns", tokens, index, group="index")
    assert client.seq.match("ns", tokens).tokens == 21
    with client.seq.get("ns", [*tokens[:20], 1001]) as found:
        assert found.matched == 20
        assert_equal(found, latents[:, :, :20])
    with client.seq.get("ns", tokens, group="index", first=3) as found:
        assert_equal(found, index[:, :, 3:])


def test_latents_are_stored_without_loss_and_not_measured(client: Client) -> None:
    shape: dict[str, Any] = {"layers": 3, "heads": 1, "dim": 10, "tokens": T, "dtype": "bfloat16"}
    client.schema_set("ns", **shape, mla=True)
    with pytest.raises(ServerError, match="latents are stored without loss"):
        client.quality("ns", "xs")
    client.seq.put("ns", list(range(T)), kv_of(1, 3, 1, T, 1, 10, dtype="uint16"))
    (key,) = ask(client, "KEYS", "ns:*")
    page = ask(client, "KV.GET", key)
    assert ask(client, "KV.GET", key, "LAYERS", 1, 2) == page[T * 10 * 2 :]
    assert len(ask(client, "KV.GET", key, "AS", "float32")) == 2 * len(page)
    assert ask(client, "KV.GET", key, "AS", "raw").endswith(page)


def test_what_does_not_fit_a_group_is_refused_by_name(client: Client) -> None:
    client.schema_set("ns", **MAIN, groups={"full": FULL, "mamba": MAMBA})
    tokens = numpy.arange(T, dtype="<i4").tobytes()

    def refused(*words: Any) -> str:
        with pytest.raises(ServerError) as caught:
            ask(client, "KV.SEQ.PUT", "ns", tokens, *words)
        return str(caught.value)

    full_bytes = 2 * T * 4 * 8
    assert "KVGAP" in refused(1, bytes(full_bytes), "GROUP", "full")
    assert "a state of group 'mamba' has 1000 bytes" in refused(1, bytes(9), "GROUP", "mamba")
    assert "has no group 'other'; it has 'full', 'mamba'" in refused(1, b"x", "GROUP", "other")
    client.seq.put("ns", list(range(T)), kv_of(1, 2, 2, T, 2, 8))
    assert f"have {full_bytes} bytes" in refused(1, bytes(full_bytes - 1), "GROUP", "full")
    key = next(key for key in ask(client, "KEYS", "ns:*") if b"." not in key)
    for suffix, nbytes, said in (
        (b".g.full", 9, f"8 tokens of group 'full' has {full_bytes} bytes"),
        (b".s.mamba", 9, "a state of group 'mamba' has 1000 bytes"),
        (b".g.none", 9, "has no group 'none'"),
    ):
        with pytest.raises(ServerError, match=said):
            client.put(key + suffix, bytes(nbytes))
    client.put(key + b".logits", b"any size")
    with pytest.raises(ServerError, match="pages stand behind pages"):
        client.put(b"ns:" + b"0" * 64, bytes(2 * 2 * T * 2 * 8 * 2), parent=key + b".logits")


def test_workers_whose_groups_differ_are_told_at_once(client: Client) -> None:
    client.schema_set("ns", **MAIN, groups={"local": LOCAL, "mamba": MAMBA})
    client.schema_set("ns", **MAIN, groups={"mamba": MAMBA, "local": LOCAL})
    other = LayerGroup("sliding", layers=3, heads=1, dim=4, window=13)
    for groups in (None, {"local": LOCAL}, {"local": other, "mamba": MAMBA}):
        with pytest.raises(ServerError, match=r"KVSCHEMA.*sliding 12.*state of 1000 bytes.*, not"):
            client.schema_set("ns", **MAIN, groups=groups)


def test_a_page_that_is_deleted_takes_its_parts_along(client: Client) -> None:
    client.schema_set("ns", **MAIN, groups={"full": FULL, "mamba": MAMBA})
    tokens = prompt_of(2, 2 * T)
    client.seq.put("ns", tokens, kv_of(1, 2, 2, 2 * T, 2, 8), logits=b"end")
    client.seq.put("ns", tokens, kv_of(2, 1, 2, 2 * T, 4, 8, dtype="uint8"), group="full")
    client.seq.put("ns", tokens, bytes(1000), group="mamba")
    assert ask(client, "DBSIZE") == 6
    last = next(k for k in ask(client, "KEYS", "ns:*") if k.endswith(b".logits"))[:-7]
    assert ask(client, "DEL", last) == 1
    assert ask(client, "DBSIZE") == 2
    ask(client, "PEXPIRE", ask(client, "KEYS", "ns:*")[0][:67], "1")
    assert ask(client, "KV.SCHEMA", "DEL", "ns") == 1
    assert ask(client, "DBSIZE") == 0


def test_forms_and_layers_of_tails_and_of_pages_of_groups(client: Client) -> None:
    client.schema_set("ns", **MAIN, groups={"full": FULL, "mamba": MAMBA})
    tokens = prompt_of(2, 5)
    main, full = kv_of(1, 2, 2, 5, 2, 8), kv_of(2, 1, 2, 5, 4, 8, dtype="uint8")
    client.seq.put("ns", tokens, main)
    client.seq.put("ns", tokens, full, group="full")
    client.seq.put("ns", tokens, bytes(1000), group="mamba")
    tail = next(key for key in ask(client, "KEYS", "ns:*") if b"." not in key)
    assert ask(client, "KV.GET", tail) == main.tobytes()
    assert ask(client, "KV.GET", tail, "LAYERS", 1, 1) == main[1].tobytes()
    wide = ask(client, "KV.GET", tail, "AS", "float32")
    numpy.testing.assert_array_equal(
        numpy.frombuffer(wide, "float32").reshape(main.shape), main.astype("float32")
    )
    assert ask(client, "KV.GET", tail, "AS", "float32", "LAYERS", 1, 1) == wide[len(wide) // 2 :]
    assert main[0].tobytes() in ask(client, "KV.GET", tail, "AS", "raw", "LAYERS", 0, 1)
    part = tail + b".g.full"
    assert ask(client, "KV.GET", part, "LAYERS", 0, 1) == full.tobytes()
    assert ask(client, "KV.MGET", 2, tail, part, "LAYERS", 0, 1) == [
        main[0].tobytes(),
        full.tobytes(),
    ]
    for words in (["LAYERS", 1, 1], ["AS", "float32"]):
        with pytest.raises(ServerError, match=r"not within 0 to 0|codes, not numbers"):
            ask(client, "KV.GET", part, *words)
    for words in (["LAYERS", 0, 1], ["AS", "raw"]):
        with pytest.raises(ServerError, match="needs a page that fits the schema"):
            ask(client, "KV.GET", tail + b".s.mamba", *words)
    assert ask(client, "KV.GET", tail + b".s.mamba") == bytes(1000)


@pytest.mark.parametrize("mla", [False, True])
def test_a_restart_finds_groups_states_and_tails(
    mla: bool, start_server: StartServer, tmp_path: Path
) -> None:
    files = {"nvme_path": str(tmp_path / "nvme"), "nvme_bytes": "64mb"}
    shape = {**MAIN, "heads": 1} if mla else MAIN
    planes, heads = (1, 1) if mla else (2, 2)
    tokens = prompt_of(2, 29)
    main, local = kv_of(1, 2, planes, 29, heads, 8), kv_of(2, 3, 2, 29, 1, 4)
    groups = {"local": LOCAL, "mamba": MAMBA}
    server = start_server(**files)
    with Client(server.url) as client:
        client.schema_set(
            "ns", **shape, mla=mla, groups=groups, codecs={"nvme": "xs"}, durability="written"
        )
        client.seq.put("ns", tokens, main)
        client.seq.put("ns", tokens, local, group="local")
        client.seq.put("ns", tokens[:19], b"s" * 1000, group="mamba")
        assert client.seq.match("ns", tokens).tokens == 19
    server.stop()
    server = start_server(**files)
    with Client(server.url) as client:
        client.schema_set("ns", **shape, mla=mla, groups=groups, codecs={"nvme": "xs"})
        assert client.seq.match("ns", tokens).tokens == 19
        with client.seq.get("ns", tokens) as found:
            assert_equal(found, main[:, :, :19])
        with client.seq.get("ns", tokens, group="local") as found:
            assert_equal(found, local[:, :, 19 - WINDOW : 19])
        with client.seq.get("ns", tokens, group="mamba") as found:
            assert [bytes(each) for each in found] == [b"s" * 1000]
        client.seq.put("ns", tokens, b"t" * 1000, group="mamba")
        assert client.seq.match("ns", tokens).tokens == 29
        with client.seq.get("ns", tokens) as found:
            assert_equal(found, main)


def test_each_tail_and_group_comes_back_through_the_codec_of_its_tier(
    start_server: StartServer, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    files = {"nvme_path": str(tmp_path / "nvme"), "nvme_bytes": "64mb"}
    shape: dict[str, Any] = {"layers": 2, "heads": 2, "dim": 64, "tokens": 16, "dtype": "float32"}
    full = LayerGroup("full", layers=1, heads=2, dim=64)
    index = LayerGroup("mla", layers=3, dim=64)
    groups, tokens = {"full": full, "index": index, "mamba": MAMBA}, prompt_of(3, 39)
    random = numpy.random.default_rng(4)

    def normal(*shape: int) -> Array:
        return random.normal(size=shape).astype("float32")

    kept = {
        "": normal(2, 2, 39, 2, 64),
        "full": normal(1, 2, 39, 2, 64),
        "index": normal(3, 1, 39, 1, 64),
    }
    server = start_server(**files)
    with Client(server.url) as client:
        client.schema_set(
            "ns", **shape, groups=groups, codecs={"nvme": "i8"}, durability="written", exact=(3, 2)
        )
        for name, kv in kept.items():
            client.seq.put("ns", tokens, kv, group=name or None)
        client.seq.put("ns", tokens, bytes(range(250)) * 4, group="mamba")
    server.stop()
    server = start_server(**files)
    with Client(server.url) as client:
        for name, kv in kept.items():
            with client.seq.get("ns", tokens, group=name or None) as found:
                back = numpy.stack(layers_of(found, kv))
            error = numpy.linalg.norm(back - kv) / numpy.linalg.norm(kv)
            if name == "index":
                assert error == 0, "latents are stored without loss"
                continue
            assert 0.001 < error < 0.01
            numpy.testing.assert_array_equal(back[:, :, :3], kv[:, :, :3])
            numpy.testing.assert_array_equal(back[:, :, -2:], kv[:, :, -2:])
        with client.seq.get("ns", tokens, group="mamba") as found:
            assert [bytes(each) for each in found] == [bytes(range(250)) * 4]
        for key in ask(client, "KEYS", "ns:*"):
            stored = b"i8" in str(ask(client, "KV.INFO", key)).encode()
            assert stored == (key[67:] in (b"", b".g.full")), key


@pytest.mark.parametrize("with_files", [False, True])
def test_all_that_a_match_counts_can_be_got_however_short_memory_is(
    with_files: bool, start_server: StartServer, tmp_path: Path
) -> None:
    files: dict[str, Any] = {"maxmemory": "8mb", "small_value_memory": "1mb", "answer_lease": 20}
    if with_files:
        files |= {"nvme_path": str(tmp_path / "nvme"), "nvme_bytes": "24mb"}
    shape: dict[str, Any] = {"layers": 4, "heads": 4, "dim": 64, "tokens": 16, "dtype": "float16"}
    local = LayerGroup("sliding", layers=8, heads=2, dim=64, window=40)
    state = LayerGroup("state", nbytes=200_000)
    server = start_server(**files)
    with Client(server.url) as client:
        client.schema_set("ns", **shape, groups={"local": local, "mamba": state})
        kept = {}
        for seed in range(40):
            tokens = prompt_of(seed % 3, 64) + prompt_of(100 + seed, 20)
            kept[seed] = tokens, kv_of(seed, 4, 2, 84, 4, 64), kv_of(seed, 8, 2, 84, 2, 64)
            _, main, window = kept[seed]
            main[:, :, :64], window[:, :, :64] = seed % 3, seed % 3
            time.sleep(0.03)  # what the last one was promised may go for this one
            with contextlib.suppress(ServerError):  # OOM: all else was promised to stay
                client.seq.put("ns", tokens, main)
                client.seq.put("ns", tokens, window, group="local")
                client.seq.put("ns", tokens, bytes([seed]) * 200_000, group="mamba")
        served = 0
        for seed, (tokens, main, window) in kept.items():
            count = client.seq.match("ns", tokens).tokens
            if count != len(tokens):
                continue
            served += 1
            with client.seq.get("ns", tokens) as found:
                assert found.matched == count
                assert_equal(found, main)
            with client.seq.get("ns", tokens, group="local") as found:
                assert_equal(found, window[:, :, 84 - 40 :])
            with client.seq.get("ns", tokens, group="mamba") as found:
                assert [bytes(each) for each in found] == [bytes([seed]) * 200_000]
        assert served > 2
        assert int(client.info()["evicted_keys"]) + int(with_files) > 0
