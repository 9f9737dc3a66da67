"""From a folder to a model, and what is said when that cannot be."""

import json
from pathlib import Path

import pytest

from respkv.errors import CacheError, ConfigError
from respkv.gateway.checkpoint import Checkpoint
from respkv.gateway.loading import load
from tests.gateway.conftest import SMALL

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
