"""A server where torch, or numpy as well, cannot be imported: what needs neither works."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from respkv.client import Client
from respkv.errors import ServerError
from tests.server_process import ServerProcess

SHAPE: dict[str, Any] = {"layers": 2, "heads": 4, "dim": 64, "tokens": 128, "dtype": "bfloat16"}
PAGE_BYTES = 2 * 2 * 4 * 64 * 128 * 2
Start = Callable[..., ServerProcess]

_BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"{{name}} is not here", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def start_without(tmp_path: Path, start_server: Start) -> Start:
    """Start servers that lack some packages, above an nvme and a disk tier."""

    def start(*names: str) -> ServerProcess:
        folder = tmp_path / "site"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(_BLOCKER.format(names=names))
        paths = [str(folder), os.environ.get("PYTHONPATH", "")]
        tiers = {"nvme_path": tmp_path / "nvme", "nvme_bytes": "64mb"}
        if "numpy" not in names:
            tiers |= {"disk_path": tmp_path / "disk", "disk_bytes": "64mb"}
        return start_server(
            maxmemory="8mb",
            small_value_memory="256kb",
            promote="never",
            environment={"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            **tiers,
        )

    return start


def key_of(number: int) -> bytes:
    return b"ns:%064x" % number


def page_of(number: int) -> bytes:
    """Return Gaussian numbers, cut to bfloat16."""
    numbers = np.random.default_rng(number).standard_normal(PAGE_BYTES // 2)
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def info_of(client: Client, key: bytes) -> Any:
    """Return what KV.INFO says, in text."""
    return words(client.command("KV.INFO", key))


def words(value: Any) -> Any:
    if isinstance(value, bytes | memoryview):
        return bytes(value).decode()
    return {words(k): words(v) for k, v in value.items()} if isinstance(value, dict) else value


def get(client: Client, number: int) -> bytes:
    return bytes(client.get(key_of(number)) or b"")


def fill(client: Client, count: int) -> None:
    """Put pages, more than memory holds, and wait until the first is in files alone."""
    for number in range(count):
        client.put(key_of(number), page_of(number))
    deadline = time.monotonic() + 60
    while info_of(client, key_of(0))["tier"] == "cpu":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_lossless_pages_need_no_torch(start_without: Start) -> None:
    server = start_without("torch")
    with Client(server.url) as client:
        client.schema_set("ns", **SHAPE, codecs={"nvme": "xs"})
        fill(client, 50)
        info = info_of(client, key_of(0))
        assert info["codecs"]["nvme"] == "xs"
        assert info["stored_bytes"]["nvme"] < PAGE_BYTES / 1.37
        assert all(get(client, number) == page_of(number) for number in range(50))
        stats = client.info()
        assert str(stats["kv_nvme_codecs"]).startswith("xs=")
        assert float(stats["kv_nvme_ratio"]) > 1.37
        written, decoded = int(stats["kv_nvme_encoded_bytes"]), int(stats["kv_nvme_decoded_bytes"])
        assert min(written, decoded) >= PAGE_BYTES
        assert min(int(stats["kv_nvme_encode_us"]), int(stats["kv_nvme_decode_us"])) > 0
    log = server.log
    assert server.stop() == 0
    assert "Traceback" not in log, log


@pytest.mark.parametrize("codec", ["rh4", "xs/f8", "rhz"])
def test_a_lossy_codec_is_refused_and_says_what_to_install(
    start_without: Start, codec: str
) -> None:
    server = start_without("torch")
    with Client(server.url) as client:
        with pytest.raises(ServerError, match=r"needs torch: install respkv\[torch\]"):
            client.schema_set("ns", **SHAPE, codecs={"nvme": "xs", "disk": codec})
        client.schema_set("ns", **SHAPE, codecs={"nvme": "raw", "disk": "xs"})


def test_a_schema_from_where_there_was_torch_is_kept_without_loss(start_without: Start) -> None:
    server = start_without()
    with Client(server.url) as client:
        client.schema_set("ns", **SHAPE, codecs={"nvme": "i8"})
        fill(client, 40)
        assert info_of(client, key_of(0))["codec"] == "i8"
    assert server.stop() == 0
    server = start_without("torch")
    with Client(server.url) as client:
        assert info_of(client, key_of(0))["codec"] == "i8"
        assert client.get(key_of(0)) is None, "to a worker it is as good as absent"
        assert "cannot be read: the page has a codec that needs torch" in server.log
        client.command("DEL", *[key_of(number) for number in range(40)])
        fill(client, 50)
        assert info_of(client, key_of(0))["codec"] == "xs"
        assert get(client, 0) == page_of(0)
        assert "stored without loss, larger than asked for" in server.log


def test_raw_pages_need_no_numpy(start_without: Start) -> None:
    server = start_without("torch", "numpy")
    with Client(server.url) as client:
        client.schema_set("ns", **SHAPE)
        fill(client, 50)
        assert info_of(client, key_of(0))["codecs"] == {"nvme": "raw"}
        assert get(client, 0) == page_of(0)
    log = server.log
    assert server.stop() == 0
    assert "Traceback" not in log, log
