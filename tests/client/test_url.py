"""URLs and options."""

import ssl
from typing import Any

import pytest

from respkv.client.url import DEFAULT_PORT, DEFAULT_URL, Options, settings
from respkv.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (DEFAULT_URL, {"host": "127.0.0.1", "port": DEFAULT_PORT, "tls": None}),
        ("redis://cache", {"host": "cache", "port": DEFAULT_PORT, "password": None}),
        ("redis://cache:6379/3", {"port": 6379, "database": 3}),
        ("redis://cache?db=4", {"database": 4}),
        ("redis://[::1]:5", {"host": "::1", "port": 5}),
        ("redis://me:p%40ss@h", {"username": "me", "password": "p@ss"}),
        ("redis://:secret@h", {"username": None, "password": "secret"}),
        ("unix:///run/a%20b.sock", {"path": "/run/a b.sock", "host": ""}),
        ("unix://me:pw@/run/s?db=2", {"path": "/run/s", "username": "me", "database": 2}),
    ],
)
def test_a_url_says_where_and_who(url: str, expected: dict[str, Any]) -> None:
    found = settings(url, {})
    assert {name: getattr(found, name) for name in expected} == expected


def test_options_win_over_the_url() -> None:
    found = settings("redis://me:one@h", {"password": "two", "pool_max": 3})
    assert (found.username, found.password, found.pool_max) == ("me", "two", 3)


@pytest.mark.parametrize("scheme", ["rediss", "respkvs"])
def test_a_tls_url_uses_the_systems_trust_unless_told_otherwise(scheme: str) -> None:
    found = settings(f"{scheme}://cache", {}).tls
    assert found is not None
    assert found.verify_mode == ssl.CERT_REQUIRED
    own = ssl.create_default_context()
    assert settings(f"{scheme}://cache", {"tls": own}).tls is own


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "h:6379",
        "redis://h:port",
        "redis://h:70000",
        "redis://h/first",
        "redis://h?database=1",
        "redis://h?db=-1",
        "unix://",
        "unix://run/s",
        "redis://me:secret@h/x",
    ],
)
def test_a_wrong_url_is_named_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(url, {})
    assert url.rpartition("@")[2] in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("protocol", 4),
        ("pool_max", 0),
        ("timeout_s", 0.0),
        ("connect_timeout_s", -1.0),
        ("reconnect_max", -1),
        ("username", "me"),
    ],
)
def test_a_wrong_option_is_named(option: str, value: Any) -> None:
    options: Options = {}
    options[option] = value  # type: ignore[literal-required]
    name = "password" if option == "username" else option
    with pytest.raises(ConfigError, match=name):
        settings(DEFAULT_URL, options)


def test_settings_print_without_the_password() -> None:
    assert "secret" not in repr(settings("redis://me:secret@h", {}))
