"""What is to be served is looked at before anything is loaded."""

from pathlib import Path

import pytest

from respkv.errors import ConfigError
from respkv.gateway.checkpoint import Checkpoint


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"accepted is a folder with a checkpoint") as caught:
        Checkpoint(folder=tmp_path)
    assert str(tmp_path) in str(caught.value)
