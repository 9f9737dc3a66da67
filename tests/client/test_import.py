"""What an import costs, told by what it loads."""

import subprocess
import sys

import pytest

import respkv.client

HEAVY = ["anyio", "asyncio", "hiredis", "ml_dtypes", "msgspec", "numpy", "ssl", "torch", "trio"]


def loaded_after(code: str) -> set[str]:
    """Return the top-level modules of a fresh interpreter that ran ``code``."""
    script = (
        f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_the_blocking_client_loads_nothing_heavy() -> None:
    code = "import respkv.client\nrespkv.client.Client('unix:///tmp/none')"
    assert not loaded_after(code) & set(HEAVY)


def test_the_asynchronous_client_loads_anyio_when_it_is_used() -> None:
    loaded = loaded_after("from respkv.client import AsyncClient")
    assert "anyio" in loaded
    assert not loaded & {"numpy", "torch", "ml_dtypes"}


@pytest.mark.parametrize("name", respkv.client.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(respkv.client, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = respkv.client.nothing
