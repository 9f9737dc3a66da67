"""The benchmark of inference, tiny: every row once, and what its table says."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.inference import PARTS, main
from bench.inference_gpu import gpu_tiers
from bench.inference_setup import Bench, Sizes
from bench.inference_table import Row, markdown


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_row_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "inference.json"
    assert main(["--quick", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert {"date", "cpu", "respkv", "packages", "model of the demos", "took"} <= set(
        written["machine"]
    )
    rows = written["rows"]
    assert len({row["work"] for row in rows}) == len(rows)
    assert {row["part"] for row in rows} == {
        "demos",
        "full hit",
        "first token",
        "concurrent",
        "eviction",
        "gpu",
    }
    for row in rows:
        assert row["figure"] is not None, row["work"]
        assert "DIFFER" not in row["note"], row
        assert "differ" not in row["note"], row
        assert "NOT all" not in row["note"], row
    table = path.with_suffix(".md").read_text()
    assert capsys.readouterr().out.strip() == table.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: it would be measured")
def test_without_a_gpu_a_row_says_why_there_is_no_figure() -> None:
    said = list[str]()
    (row,) = gpu_tiers(Bench(Sizes(), said.append))
    assert row.figure is None
    assert row.note.startswith("not measured: ")
    assert row.note.removeprefix("not measured: ") in said[0]


@pytest.mark.parametrize(
    "words", [["--parts", "demos,other"], ["--threads", "0"]], ids=lambda words: words[0]
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert refused.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_the_parts_that_are_asked_for_keep_their_order() -> None:
    assert list(PARTS) == ["demos", "hits", "ttft", "concurrent", "policies", "gpu"]


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (Row("p", "w", figure=5.699, goal=5.7), "| 5.69 x | >= 5.70 x | MISSED |"),
        (Row("p", "w", figure=5.7, goal=5.7), "| 5.70 x | >= 5.70 x | met |"),
        (Row("p", "w", figure=0.9729, unit="%", goal=0.973), "| 97.2 % | >= 97.3 % | MISSED |"),
        (Row("p", "w", figure=0.973, unit="%", goal=0.973), "| 97.3 % | >= 97.3 % | met |"),
        (
            Row("p", "w", figure=0.003001, unit="ms", goal=0.003, is_at_most=True),
            "| 3.01 ms | <= 3.00 ms | MISSED |",
        ),
        (
            Row("p", "w", figure=1.0500001, goal=1.05, is_at_most=True),
            "| 1.06 x | <= 1.05 x | MISSED |",
        ),
        (Row("p", "w", goal=1.05), "| | >= 1.05 x | not measured |"),
        (Row("p", "w", figure=2.0), "| 2.00 x | | |"),
    ],
    ids=["below", "just", "share", "just a share", "time", "most", "absent", "no goal"],
)
def test_a_figure_is_rounded_against_us(row: Row, cells: str) -> None:
    line = " ".join(markdown([row], {}).splitlines()[2].split())
    assert cells in line
