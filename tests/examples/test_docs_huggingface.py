"""The examples in docs/huggingface.md run as they stand there, one after the other."""

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


def test_the_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    scope: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), scope)
    finally:
        torch.set_num_threads(threads)
    assert (scope["cache"].loaded_tokens, scope["end"]) == (0, 30)
    scope["engine"].close()
