"""docs/config.md says what the code says."""

from pathlib import Path

from respkv.cli.reference import page
from respkv.config import FIXED, SETTINGS

DOCS = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_is_current() -> None:
    again = "run: python -m respkv.cli.reference > docs/config.md"
    assert DOCS.read_text() == page(), again


def test_the_page_has_a_row_for_every_setting() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(SETTINGS)
    assert {row.count("|") for row in rows} == {6}
    assert all(f"`{name}`" in page() for name in FIXED)
