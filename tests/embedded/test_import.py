"""What importing costs: respkv nothing, the embedded engine no torch."""

import pytest

import respkv
import respkv.embedded
from tests.client.test_import import HEAVY, loaded_after


def test_importing_respkv_is_free() -> None:
    assert not loaded_after("import respkv") & {*HEAVY, "inspect", "logging", "socket"}


def test_the_embedded_engine_loads_no_torch() -> None:
    loaded = loaded_after("import respkv\nrespkv.open_sync")
    assert "anyio" in loaded
    assert not loaded & {"torch", "transformers", "triton"}


def test_names_are_found_and_others_are_not() -> None:
    assert respkv.open is respkv.embedded.open
    assert respkv.open_sync is respkv.embedded.open_sync
    with pytest.raises(AttributeError, match="nothing"):
        _ = respkv.nothing
