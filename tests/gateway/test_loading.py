"""From a folder to a model, and what is said when that cannot be."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from transformers import MambaConfig, MambaForCausalLM

from respkv.client import Client
from respkv.errors import CacheError, ConfigError
from respkv.gateway.checkpoint import Checkpoint
from respkv.gateway.loading import load
from tests.conftest import StartServer
from tests.gateway.conftest import SMALL
from tests.gateway.running import Running
from tests.server_process import ServerProcess

ENGINE = {"maxmemory": "32mb", "prefault": False}


def test_a_checkpoint_is_loaded_with_an_engine_of_its_own(checkpoint: Path) -> None:
    made = load(Checkpoint(folder=checkpoint, settings=ENGINE, kv_memory=8 << 20), SMALL)
    try:
        assert (made.name, made.stop_tokens) == ("tiny-llama", frozenset([2]))
        stats = made.stats()
        assert stats.store_reachable
        assert stats.cache_size == stats.local_bytes == 0
        assert made.clear() == (0, 0)
    finally:
        made.close(0.0)


def test_quotas_of_the_namespace_outlive_a_clear(checkpoint: Path) -> None:
    made = load(Checkpoint(folder=checkpoint, settings=ENGINE, kv_memory=8 << 20), SMALL)
    try:
        assert made.store is not None
        assert made.pages is not None
        made.store.quota(made.pages.namespace, max_bytes=1 << 20, tenant_bytes=1 << 19)
        made.clear()
        kept = made.store.quota(made.pages.namespace)
        assert (kept["max_bytes"], kept["tenant_bytes"]) == (1 << 20, 1 << 19)
    finally:
        made.close(0.0)


def test_what_one_life_stored_in_a_server_the_next_one_has(
    checkpoint: Path, server: ServerProcess
) -> None:
    place = Checkpoint(folder=checkpoint, url=server.url, page_tokens=16, always_load=True)
    ask = {"prompt": "words that are said in both lives. " * 5, "max_new_tokens": 4}
    lives, stats = [], {}
    for _ in range(2):
        running = Running(load(place, SMALL), SMALL)
        try:
            lives.append(running.post("/generate", ask).json)
            stats = running.get("/cache/stats").json
        finally:
            running.close()
    first, second = lives
    assert second["text"] == first["text"]
    assert first["timings"]["prefix_tokens_saved"] == 0
    assert second["timings"]["prefix_tokens_saved"] == second["prompt_tokens"] > 100
    assert stats["store_pages"] > 0
    assert (stats["hits"], stats["local_tokens_reused"]) == (1, 0)


def test_a_model_that_has_no_pages_is_served_without(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "respkv.gateway"):
        made = load(Checkpoint(folder=folder, settings=ENGINE), SMALL)
    running = Running(made, SMALL)
    try:
        assert [each.levelname for each in caplog.records] == ["WARNING"]
        assert "nothing kept for the next" in caplog.text
        ask = {"prompt": "from pathlib", "max_new_tokens": 4}
        texts = [
            running.post("/generate", {**ask, "use_cache": use_cache}).json["text"]
            for use_cache in (True, False)
        ]
        assert texts[0] == texts[1]
        stats = running.get("/cache/stats").json
        assert (stats["hits"], stats["store_reachable"]) == (0, False)
        assert running.post("/cache/clear").json["store_pages"] == 0
    finally:
        running.close()


def test_a_model_that_has_no_pages_leaves_nothing_in_the_store(
    checkpoint: Path, tmp_path: Path, start_server: StartServer
) -> None:
    server = start_server()
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    made = load(Checkpoint(folder=folder, url=server.url), SMALL)
    try:
        assert made.store is None
        with Client(server.url) as client:
            assert client.command("KV.SCHEMA", "LIST") == []
    finally:
        made.close(0.0)


def test_a_template_that_fails_is_told_when_the_model_is_loaded(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages.no_such_method() }}")
    with caplog.at_level(logging.WARNING, "respkv.gateway"):
        load(Checkpoint(folder=folder, settings=ENGINE), SMALL).close(0.0)
    assert "no conversation can be served: the model's chat template refuses this" in caplog.text


def test_a_model_that_takes_no_cache_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    made = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1))
    made.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text())
    with pytest.raises(ConfigError, match="MambaForCausalLM"):
        load(Checkpoint(folder=tmp_path, settings=ENGINE), SMALL)


def test_a_checkpoint_without_weights_is_named(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((checkpoint / name).read_text())
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load(Checkpoint(folder=tmp_path), SMALL)


def test_a_checkpoint_that_is_no_model_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    (tmp_path / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text())
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load(Checkpoint(folder=tmp_path), SMALL)


def test_a_server_that_is_away_is_named(checkpoint: Path) -> None:
    with pytest.raises(CacheError, match=r"127\.0\.0\.1:1\b"):
        load(Checkpoint(folder=checkpoint, url="respkv://127.0.0.1:1"), SMALL)


def test_a_wrong_setting_of_the_engine_is_named(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="maxmemory"):
        load(Checkpoint(folder=checkpoint, settings={"maxmemory": "much"}), SMALL)
