"""Namespaces whose pages are stored in codecs: over sockets, through the file tiers and back."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from respkv.client import Client
from respkv.errors import ServerError
from respkv.kernels.container import read_head
from respkv.kernels.layout import Codec
from respkv.page import Geometry
from tests.kernels import data
from tests.server_process import ServerProcess

LAYERS, HEADS, DIM, TOKENS = 2, 4, 64, 128
SHAPE: dict[str, Any] = {
    "layers": LAYERS,
    "heads": HEADS,
    "dim": DIM,
    "tokens": TOKENS,
    "dtype": "bfloat16",
}
SHAPE_WORDS = [str(word) for pair in SHAPE.items() for word in pair]
PAGE_BYTES = Geometry(LAYERS, HEADS, DIM, TOKENS, "bfloat16").page_bytes


def page_of(number: int) -> memoryview:
    """Return a page of Gaussian keys and values."""
    shape = (LAYERS * 2 * TOKENS, HEADS, DIM)
    numbers = data.gaussian(*shape, number).contiguous()
    return memoryview(numbers.view(torch.uint8).numpy().tobytes())


def numbers_of(page: memoryview | None, dtype: str = "bfloat16") -> torch.Tensor:
    assert page is not None
    return torch.frombuffer(bytearray(page), dtype=getattr(torch, dtype)).float()


def relative(exact: torch.Tensor, other: torch.Tensor) -> float:
    return float((other - exact).norm() / exact.norm())


def keys_of(count: int, namespace: str = "ns") -> list[bytes]:
    return [f"{namespace}:{number:064x}".encode() for number in range(count)]


@pytest.fixture
def tiered(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server whose memory holds 60 pages, above two file tiers."""
    running = ServerProcess(
        maxmemory="8mb",
        small_value_memory="256kb",
        promote="never",
        nvme_path=tmp_path / "nvme",
        nvme_bytes="32mb",
        disk_path=tmp_path / "disk",
        disk_bytes="256mb",
    )
    yield running
    log = running.log
    assert running.stop() == 0
    assert "Traceback" not in log, log


def wait_until_in(client: Client, key: bytes, tier: str) -> dict[str, Any]:
    """Return what KV.INFO says of a key once its fastest copy is in a tier."""
    deadline = time.monotonic() + 60
    while True:
        info = info_of(client, key)
        if info["tier"] == tier:
            return info
        assert time.monotonic() < deadline, info
        time.sleep(0.05)


def info_of(client: Client, key: bytes) -> dict[str, Any]:
    found: dict[str, Any] = words(client.command("KV.INFO", key))
    return found


def words(value: Any) -> Any:
    """Return a reply with text instead of bytes, and its lists of pairs as maps."""
    if isinstance(value, bytes | memoryview):
        return bytes(value).decode()
    if isinstance(value, dict):
        return {words(name): words(each) for name, each in value.items()}
    return [words(each) for each in value] if isinstance(value, list) else value


def test_pages_change_codec_on_their_way_down_and_come_back_within_bounds(
    tiered: ServerProcess,
) -> None:
    keys = keys_of(260)
    with Client(tiered.url) as client:
        client.schema_set("ns", **SHAPE, codecs={"nvme": "xs", "disk": "rh4"})
        for number, key in enumerate(keys):
            client.put(key, page_of(number))
        on_disk = wait_until_in(client, keys[0], "disk")
        assert on_disk["codecs"]["disk"] == "rh4"
        assert PAGE_BYTES / on_disk["stored_bytes"]["disk"] > 3.5
        error = relative(numbers_of(page_of(0)), numbers_of(client.get(keys[0])))
        assert 0.05 < error <= 0.112, "rh4 on Gaussian numbers"
        # The youngest there: the oldest may be on its way to the disk.
        number = next(n for n in range(259, 0, -1) if info_of(client, keys[n])["tier"] == "nvme")
        on_nvme = info_of(client, keys[number])
        assert on_nvme["codecs"]["nvme"] == "xs"
        assert PAGE_BYTES / on_nvme["stored_bytes"]["nvme"] > 1.37
        assert client.get(keys[number]) == page_of(number), "xs keeps every bit"
        usage = words(client.command("MEMORY", "USAGE", keys[number], "TIERS"))
        assert usage["nvme"]["codec"] == "xs"
        stats = client.info()
        assert int(stats["kv_nvme_corrupt"]) == 0


def test_a_page_promoted_from_a_lossy_tier_stays_what_was_decoded(tiered: ServerProcess) -> None:
    keys = keys_of(60)
    with Client(tiered.url) as client:
        client.schema_set("ns", **SHAPE, codecs={"nvme": "i8"})
        for number, key in enumerate(keys):
            client.put(key, page_of(number))
        wait_until_in(client, keys[0], "nvme")
        client.command("CONFIG", "SET", "promote", "first")
        first = bytes(client.get(keys[0]) or b"")
        assert info_of(client, keys[0])["tier"] == "cpu"
        assert bytes(client.get(keys[0]) or b"") == first
        client.command("CONFIG", "SET", "check-interval", "1")
        time.sleep(2.5)
        assert bytes(client.get(keys[0]) or b"") == first, "its checksum in memory is its own"
        assert int(client.info()["kv_nvme_corrupt"]) == 0


def test_as_raw_hands_out_what_is_stored_and_as_a_dtype_converts(tiered: ServerProcess) -> None:
    keys = keys_of(60)
    with Client(tiered.url) as client:
        client.schema_set("ns", **SHAPE, codecs={"nvme": "rh4/rh2"})
        for number, key in enumerate(keys):
            client.put(key, page_of(number))
        wait_until_in(client, keys[0], "nvme")
        stored = client.get(keys[0], as_="raw")
        assert stored is not None
        head = read_head(stored)
        assert (head.plane(0, "key").codec, head.plane(1, "value").codec) == (Codec.RH4, Codec.RH2)
        assert len(stored) < PAGE_BYTES / 4
        part = client.get(keys[0], as_="raw", layers=(1, 1))
        assert part is not None
        assert read_head(part).geometry.layers == 1
        resident = client.get(keys[-1], as_="raw")
        assert resident is not None
        assert read_head(resident).is_payload
        assert bytes(resident[-PAGE_BYTES:]) == bytes(page_of(59))
        many = client.mget([keys[0], b"ns:absent", keys[-1]], as_="raw")
        assert [page and len(page) for page in many] == [len(stored), None, len(resident)]
        wide = numbers_of(client.get(keys[-1], as_="float32"), "float32")
        assert torch.equal(wide, numbers_of(page_of(59)))
        narrow = client.get(keys[-1], as_="float8_e4m3fn", layers=(0, 1))
        assert narrow is not None
        assert len(narrow) == PAGE_BYTES // 4
        eights = np.frombuffer(narrow, ml_dtypes.float8_e4m3fn).astype(np.float32)
        exact = numbers_of(page_of(59))[: len(eights)]
        assert relative(exact, torch.from_numpy(eights)) < 0.03
        with pytest.raises(ServerError, match="AS int8: accepted are raw, bfloat16"):
            client.get(keys[0], as_="int8")
        with pytest.raises(ServerError, match="layers 1 to 2 are not within 0 to 1"):
            client.get(keys[0], as_="raw", layers=(1, 2))
        client.set(b"plain", b"value")
        with pytest.raises(ServerError, match="AS needs a page whose namespace has a schema"):
            client.get(b"plain", as_="raw")
        assert client.get(keys[0], as_="float16", deadline_ms=0) is None


def test_quality_measures_and_auto_chooses_what_keeps_to_the_target(tiered: ServerProcess) -> None:
    keys = keys_of(16)
    with Client(tiered.url) as client:
        client.schema_set("ns", **SHAPE, codecs={"nvme": "auto"}, max_error=0.012)
        with pytest.raises(ServerError, match="no pages to measure"):
            client.quality("ns", "rh4")
        for number, key in enumerate(keys):
            client.put(key, page_of(number))
        found = client.quality("ns", "rh4/i8")
        assert found["codec"] == "rh4/i8"
        assert 0.09 < found["key_relative_l2"] <= 0.112
        assert found["value_relative_l2"] <= 0.0095
        assert 0 < found["value_attention_error"] < 0.05
        assert 4 < found["key_bits"] < 4.6
        assert len(found["layers"]) == LAYERS
        deadline = time.monotonic() + 60
        while not (chosen := (client.schema_get("ns") or {})["chosen"]):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert chosen == ["i8", "i8"]
        client.schema_set("ns", **SHAPE, codecs={"nvme": "auto"}, min_ratio=5.0)
        deadline = time.monotonic() + 60
        while not (chosen := (client.schema_get("ns") or {})["chosen"]):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert all("rh" in each for each in chosen)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["CODEC", "gpu2", "raw"], "CODEC gpu2: this server has the tiers cpu, disk, nvme"),
        (["CODEC", "nvme", "zip"], "CODEC nvme zip: codec 'zip' is not one of raw, xs"),
        (["CODEC", "cpu", "i8"], "CODEC cpu i8: pages in memory are raw"),
        (["CODEC", "nvme", "auto"], "CODEC auto needs either MAXERROR or MINRATIO, and not both"),
        (["MAXERROR", "0.1"], "MAXERROR and MINRATIO need CODEC auto for at least one tier"),
        (["CODEC", "nvme", "auto", "MAXERROR", "5"], "MAXERROR 5: it is a part of 1"),
        (["CODEC", "nvme", "auto", "MINRATIO", "0.5"], "MINRATIO 0.5: pages would not get smaller"),
        (["CODEC", "nvme", "auto", "MAXERROR", "nan"], "MAXERROR must be a number greater than 0"),
        (["EXACT", "100", "29"], "EXACT 100 29: a page has 128 tokens"),
    ],
)
def test_what_a_schema_cannot_have_is_refused(
    tiered: ServerProcess, more: list[str], message: str
) -> None:
    with Client(tiered.url) as client:
        with pytest.raises(ServerError) as caught:
            client.command("KV.SCHEMA", "SET", "bad", *SHAPE_WORDS, *more)
        assert message in str(caught.value)
        assert client.schema_list() == []


def test_what_a_lossy_copy_gave_back_is_not_measured(tiered: ServerProcess) -> None:
    keys = keys_of(60)
    with Client(tiered.url) as client:
        client.schema_set("ns", **SHAPE, codecs={"nvme": "rh4"})
        for number, key in enumerate(keys):
            client.put(key, page_of(number))
        wait_until_in(client, keys[0], "nvme")
        fresh = client.quality("ns", "rh4")
        assert 0.09 < fresh["key_relative_l2"] <= 0.112, "those in memory are as they were put"
        for key in keys[30:]:
            client.delete(key)
        for key in keys[:8]:
            wait_until_in(client, key, "nvme")
        client.command("CONFIG", "SET", "promote", "first")
        for key in keys[:8]:
            assert client.get(key) is not None
        for key in keys[8:30]:
            client.delete(key)
        with pytest.raises(ServerError, match="no pages to measure that are as they were put"):
            client.quality("ns", "rh4")


def test_codecs_of_a_schema_survive_a_restart(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "maxmemory": "16mb",
        "nvme_path": tmp_path / "nvme",
        "nvme_bytes": "64mb",
    }
    first = ServerProcess(**settings)
    with Client(first.url) as client:
        client.schema_set("ns", **SHAPE, codecs={"nvme": "rh4/rh3"}, exact=(4, 8))
        client.put(keys_of(1)[0], page_of(0))
    assert first.stop() == 0
    second = ServerProcess(**settings)
    with Client(second.url) as client:
        schema = client.schema_get("ns") or {}
        assert schema["codecs"] == [["nvme", "rh4/rh3"]]
        assert (schema["exact_first"], schema["exact_last"]) == (4, 8)
        exact = numbers_of(page_of(0)).view(LAYERS, 2, TOKENS, -1)
        loaded = numbers_of(client.get(keys_of(1)[0])).view(LAYERS, 2, TOKENS, -1)
        assert torch.equal(loaded[:, :, :4], exact[:, :, :4])
        assert torch.equal(loaded[:, :, -8:], exact[:, :, -8:])
        assert 0 < relative(exact[:, 0], loaded[:, 0]) < relative(exact[:, 1], loaded[:, 1])
    assert second.stop() == 0
