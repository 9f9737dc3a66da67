"""The examples in docs/batching.md run as they stand there."""

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parent.parent.parent / "docs" / "batching.md"


def test_the_examples_of_the_page_on_batching_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    finally:
        torch.set_num_threads(threads)
    assert not names["loop"].is_alive
