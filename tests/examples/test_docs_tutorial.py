"""The tutorial runs as it stands, block after block, in one process."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.server_process import ServerProcess

PAGE = Path(__file__).parent.parent.parent / "docs" / "tutorial.md"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_tutorial_runs_to_its_end(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text()
    # What stands before a block becomes empty lines: the lines of a traceback are the page's.
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) >= 10
    names: dict[str, Any] = {}
    for block in blocks:
        lines = "\n" * text.count("\n", 0, block.start(1))
        code = lines + block[1].replace("respkv://127.0.0.1:7379", server.url)
        exec(compile(code, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "620 tokens computed" in said
    assert "0 errors" in said


def test_every_page_that_the_tutorial_points_to_is_there() -> None:
    links = re.findall(r"\]\(([\w.-]+\.md)\)", PAGE.read_text())
    assert len(links) >= 7
    assert not [link for link in links if not (PAGE.parent / link).exists()]
