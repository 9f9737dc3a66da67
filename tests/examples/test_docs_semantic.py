"""The examples in docs/semantic.md run as they stand there."""

import re
from pathlib import Path
from typing import Any

from tests.server_process import ServerProcess

PAGE = Path(__file__).parent.parent.parent / "docs" / "semantic.md"


def test_the_examples_of_the_page_on_meaning_and_memory_run(server: ServerProcess) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    code = "\n".join(blocks).replace("respkv://127.0.0.1:7379", server.url)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    names["answers"].close()
    names["memory"].close()
