"""``respkv info``."""

import json

import pytest

from respkv.cli.info import number, sections
from tests.cli.conftest import Cli


def test_info_prints_what_the_server_says(cli: Cli, redis_url: str) -> None:
    done = cli("info", url=redis_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# Server\nredis_version:")
    assert "# Memory\n" in done.stdout
    assert "\r" not in done.stdout


def test_one_section_can_be_asked_for(cli: Cli, redis_url: str) -> None:
    done = cli("info", "memory", url=redis_url)
    assert done.stdout.startswith("# Memory\nused_memory:")
    assert done.stdout.count("#") == 1


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_a_section_that_is_none_is_said_to_be_so(how: list[str], cli: Cli, redis_url: str) -> None:
    done = cli("info", "memroy", *how, url=redis_url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("respkv: INFO of this server has no section 'memroy'; ")


def test_json_holds_a_section_each_and_numbers_as_such(cli: Cli, redis_url: str) -> None:
    found = json.loads(cli("info", "--json", url=redis_url).stdout)
    assert found["server"]["redis_mode"] == "standalone"
    assert found["memory"]["used_memory"] > 0
    assert found["stats"]["total_commands_processed"] >= 1


def test_a_server_that_is_away_is_one_line_and_exit_code_1(cli: Cli, nowhere: str) -> None:
    done = cli("info", "--json", url=nowhere)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("respkv: cannot connect to ")


def test_sections_are_read_from_lines() -> None:
    text = "# Server\r\na:1\r\nb:x:y\r\n\r\n# KV\r\nempty:\r\nc:-2\r\n"
    assert sections(text) == {"server": {"a": 1, "b": "x:y"}, "kv": {"empty": "", "c": -2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-12", -12),
        ("1.50", 1.5),
        ("-0.5", -0.5),
        ("007", "007"),
        ("-0", "-0"),
        ("1e5", "1e5"),
        ("7.0.15", "7.0.15"),
        (".5", ".5"),
        ("5.", "5."),
        ("-", "-"),
        ("", ""),
        ("٣", "٣"),
        ("1.5K", "1.5K"),
    ],
)
def test_only_what_is_written_as_a_number_is_one(text: str, value: object) -> None:
    assert number(text) == value
    assert type(number(text)) is type(value)
