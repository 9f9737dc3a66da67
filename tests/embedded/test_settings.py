"""What an embedded engine is opened with."""

import threading
from pathlib import Path
from typing import Any

import pytest

import respkv
from respkv.config import OF_SOCKETS, Config
from respkv.embedded.settings import read_settings
from respkv.errors import ConfigError


def test_settings_are_those_of_a_server_by_their_python_names(tmp_path: Path) -> None:
    found = read_settings(
        None,
        {"maxmemory": "1gb", "nvme_path": tmp_path, "nvme_bytes": 1 << 30, "hugepages": False},
    )
    assert (found.maxmemory, found.nvme_path, found.hugepages) == (1 << 30, str(tmp_path), False)


def test_a_servers_file_can_be_used_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "respkv.toml"
    file.write_text(
        'port = 7000\ntimeout = 5\nrequirepass = "secret"\nshm = "rw"\nmaxmemory = "2gb"\n'
    )
    found = read_settings(file, {"maxmemory_policy": "lru"})
    assert (found.port, found.requirepass, found.shm, found.unixsocket) == (0, "", "off", "")
    assert (found.maxmemory, found.maxmemory_policy, found.timeout) == (2 << 30, "lru", 0)
    again = read_settings(Config.load(str(file)), {"maxmemory": "1gb"})
    assert (again.maxmemory, again.requirepass) == (1 << 30, "")
    assert again.with_value("lease-max", "99000").lease_max == 99000, "CONFIG SET goes on working"


@pytest.mark.parametrize("name", sorted(OF_SOCKETS))
def test_settings_of_sockets_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = '1': an embedded engine has no sockets"):
        read_settings(None, {name.replace("-", "_"): "1"})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"maxmemory": "lots"}, r"respkv.open: maxmemory = 'lots': accepted are"),
        ({"maxmemory": None}, r"respkv.open: maxmemory = None: accepted are"),
        ({"max_memory": "1gb"}, r"respkv.open: 'max-memory': unknown key; did you mean maxmemory"),
        ({"nvme_path": Path("/tmp")}, "nvme-bytes"),
        ({"durability": "durable"}, "it needs a file tier"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_settings(None, settings)


def test_what_is_no_configuration_is_told() -> None:
    with pytest.raises(ConfigError, match="config is a int; it is a path or a Config"):
        read_settings(5, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pool_max": "8"}, "pool_max is '8'; it must be a whole number"),
        ({"pool_max": 0}, "pool_max is 0; it must be at least 1"),
        ({"timeout_s": "1s"}, "timeout_s is '1s'; it must be a number of seconds"),
        ({"timeout_s": -1}, "timeout_s is -1; it must be more than 0"),
    ],
)
def test_how_calls_are_served_is_checked_before_anything_is_opened(
    options: dict[str, Any], told: str
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match=told):
        respkv.open_sync(maxmemory="16mb", **options)
    with pytest.raises(ConfigError, match=told):
        respkv.open(maxmemory="16mb", **options)
    assert not set(threading.enumerate()) - before


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        read_settings(tmp_path / "none.toml", {})
