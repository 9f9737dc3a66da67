"""The settings of the adapter."""

from typing import Any

import pytest

from respkv.client.url import DEFAULT_URL
from respkv.integrations.huggingface import CacheConfig


def test_nothing_has_to_be_said() -> None:
    config = CacheConfig()
    assert (config.cache, config.chain, config.namespace) == (DEFAULT_URL, {}, None)
    assert config.never_slower


def test_what_prompts_differ_in_is_in_their_chain() -> None:
    words: dict[str, Any] = {"salt": "s", "tenant": b"t", "lora": "l", "lora_path": "p"}
    assert CacheConfig(**words).chain == words
    for name, word in words.items():
        one: dict[str, Any] = {name: word}
        assert CacheConfig(**one).chain == one
    chain = CacheConfig(salt="s").chain
    chain["session"] = "talk"
    assert "session" not in CacheConfig(salt="s").chain
    assert CacheConfig(salt="").chain == {"salt": ""}


@pytest.mark.parametrize("name", ["page_tokens", "min_tokens"])
def test_less_than_one_token_is_refused(name: str) -> None:
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        CacheConfig(**wrong)
    right: dict[str, Any] = {name: 1}
    assert getattr(CacheConfig(**right), name) == 1
