"""What a gateway may be told."""

from typing import Any

import pytest

from respkv.errors import ConfigError
from respkv.gateway.settings import GatewaySettings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("max_waiting", 0),
        ("max_recompute_tokens", 0),
        ("heartbeat_s", -1.0),
        ("max_body_bytes", 0),
        ("read_timeout_s", float("inf")),
        ("read_timeout_s", float("nan")),
        ("keep_alive_s", 1 << 31),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(field: str, value: object) -> None:
    wrong: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError, match=f"{field} = {value}: accepted are"):
        GatewaySettings(**wrong)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("allow_origin", each)
            for each in ("chat.example", "https://a/b", "", "null", "https:// ")
        ),
        *(("allow_host", each) for each in ("https://llm.example", "llm.example:80", "", "a b")),
    ],
)
def test_a_wrong_origin_or_name_is_told(field: str, value: str) -> None:
    wrong: dict[str, Any] = {field: (value,)}
    with pytest.raises(ConfigError, match=f"{field} = '{value}': accepted are"):
        GatewaySettings(**wrong)


@pytest.mark.parametrize("token", ["", "two words", "\u20ac", "line\n"])
def test_a_wrong_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ConfigError, match="token: accepted are") as caught:
        GatewaySettings(token=token)
    assert not token or token not in str(caught.value)


def test_a_token_is_not_in_the_settings_text() -> None:
    assert "secret" not in repr(GatewaySettings(token="secret"))


def test_to_recompute_can_be_turned_off() -> None:
    assert GatewaySettings().recompute
    assert not GatewaySettings(recompute=False).recompute


def test_no_more_answers_than_the_queue_holds() -> None:
    assert GatewaySettings(max_waiting=3).choices_max == 3
    assert GatewaySettings().choices_max == 16
