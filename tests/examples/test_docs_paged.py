"""The examples in docs/paged.md run as they stand there, one after the other."""

import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[2] / "docs" / "paged.md"


def test_the_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for code in blocks:
            exec(compile(code, str(DOCS), "exec"), names)
    finally:
        torch.set_num_threads(threads)
