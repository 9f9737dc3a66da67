"""The demo as a person starts it, with a model so small that it takes seconds."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples.processes import Answer, DemoFailed
from examples.shared_prompt import Comparison, cut, find_failure

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "examples" / "shared_prompt.py"
TINY = [
    *("--layers", "2", "--hidden", "128", "--maxmemory", "64mb", "--nvme-bytes", "64mb"),
    *("--text", str(TEXT)),
    *("--document-tokens", "300", "--page-tokens", "32", "--new-tokens", "8"),
]


def start_demo(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start the demo with all its files under ``folder``."""
    return subprocess.Popen(
        [sys.executable, "-m", "examples.shared_prompt", *TINY, *options],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def cells(output: str, name: str) -> list[str]:
    """Return the cells of one row of all tables."""
    lines = [line for line in output.splitlines() if line.startswith(name + "  ")]
    return [cell for line in lines for cell in re.split(r" {2,}", line.strip())[1:]]


def assert_nothing_is_left(folder: Path, output: str) -> None:
    (name,) = set(re.findall(r"respkv-demo-\w+", output))
    assert not (folder / name).exists()
    assert not list(Path("/dev/shm").glob(f"{name}*"))
    assert not [line for line in command_lines() if name.encode() in line]


def command_lines() -> list[bytes]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes())
        except OSError:  # it ended meanwhile
            continue
    return lines


def test_each_worker_hits_the_pages_of_the_other_also_after_a_restart_and_no_token_changes(
    tmp_path: Path,
) -> None:
    demo = start_demo(tmp_path)
    output, errors = demo.communicate(timeout=240)
    assert demo.returncode == 0, output + errors
    assert cells(output, "worker") == ["B", "B", "A", "A", "B", "B"]
    assert cells(output, "pages come by") == ["socket", "shared memory"] * 3
    assert cells(output, "found in")[:5] == ["memory"] * 4 + ["nvme files"]
    assert cells(output, "pages hit") == ["9"] * 6
    assert cells(output, "KV read") == ["0.3 MiB"] * 6
    assert cells(output, "8 new tokens") == ["identical"] * 6
    assert cells(output, "logits of the first") == ["same bits"] * 6
    # All three documents', those of the first two rounds among them.
    assert "the new process found 27 pages in its files" in output
    assert errors == ""
    assert_nothing_is_left(tmp_path, output)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("starting workers", signal.SIGINT),
        ("B reads", signal.SIGTERM),
        ("started again", signal.SIGINT),
    ],
    ids=str,
)
def test_a_demo_that_is_stopped_leaves_nothing(
    tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    demo = start_demo(tmp_path)
    assert demo.stdout
    output = ""
    while moment not in output:
        character = demo.stdout.read(1)
        assert character, output
        output += character
    demo.send_signal(number)
    _, errors = demo.communicate(timeout=240)
    assert demo.returncode == 128 + number, output + errors
    assert_nothing_is_left(tmp_path, output)


def test_a_demo_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    demo = start_demo(tmp_path, "--model", str(tmp_path / "nothing"))
    output, errors = demo.communicate(timeout=240)
    assert demo.returncode == 1
    assert f"{tmp_path / 'nothing'} has no tokenizer.json" in errors
    assert "Traceback" not in errors
    assert_nothing_is_left(tmp_path, output)


def test_documents_follow_each_other_in_the_text() -> None:
    assert cut(list(range(7)), 3, 2) == [[0, 1, 2], [3, 4, 5]]


def test_a_text_too_short_is_refused_with_the_numbers() -> None:
    with pytest.raises(DemoFailed, match="has 7 tokens, 2 documents of 4 need 8"):
        cut(list(range(7)), 4, 2)


def answer(pages_hit: int, new_tokens: list[int]) -> Answer:
    return Answer(
        prompt_tokens=100,
        pages_hit=pages_hit,
        tokens_hit=32 * pages_hit,
        found_in="c",
        bytes_read=1024 * pages_hit,
        load_s=0.1,
        first_token_s=0.5,
        new_tokens=new_tokens,
        logits="",
        pages_stored=0,
        bytes_stored=0,
        store_s=0.0,
    )


@pytest.mark.parametrize(
    ("pages_hit", "new_tokens", "failure"),
    [
        (3, [1, 2, 3], None),
        (0, [1, 2, 3], "nothing was found in the cache"),
        (3, [1, 2, 4], "tokens differ with the cache"),
    ],
)
def test_one_miss_and_one_changed_token_are_failures(
    pages_hit: int, new_tokens: list[int], failure: str | None
) -> None:
    plain = answer(0, [1, 2, 3])
    good = Comparison("B", "socket", False, plain, answer(3, [1, 2, 3]))
    other = Comparison("B", "memory", True, plain, answer(pages_hit, new_tokens))
    assert find_failure([good, other]) == failure
