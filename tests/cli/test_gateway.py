"""``respkv gateway``: its options, and what it says before anything is loaded."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from respkv.cli.gateway import SETTINGS, command
from respkv.errors import ConfigError
from respkv.gateway.settings import GatewaySettings
from tests.cli.conftest import Cli

HEAVY = {"torch", "transformers", "fastapi", "uvicorn", "pydantic", "anyio"}


def test_help_needs_nothing_of_the_extra() -> None:
    script = (
        "import sys\nfrom respkv.cli import main\n"
        "try:\n    main(['gateway', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    shown, _, modules = done.stdout.rpartition("\n[")
    assert "--model DIR" in shown
    assert not {name for name in HEAVY if f"'{name}'" in modules}


def test_every_setting_has_an_option_with_its_default() -> None:
    of_settings = {each.name: each.default for each in dataclasses.fields(GatewaySettings)}
    del of_settings["token"]
    assert {name: default for name, _, default, _ in SETTINGS} == of_settings
    assert {name for name, *_ in SETTINGS} <= {each.name for each in command.params}


def test_a_missing_extra_is_named_with_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("respkv.cli.gateway.EXTRA", ("json", "no_such_package"))
    with pytest.raises(ConfigError, match=r"needs no_such_package, .*'respkv\[gateway\]'"):
        command.main(["--model", str(tmp_path)], standalone_mode=False)


def test_what_cannot_go_together_is_told(tmp_path: Path) -> None:
    words = ["--model", str(tmp_path), "--url", "respkv://x", "--maxmemory", "1gb"]
    with pytest.raises(ConfigError, match="--url: accepted without --maxmemory"):
        command.main(words, standalone_mode=False)


@pytest.mark.parametrize(
    ("option", "value"), [("--kv-memory", "much"), ("--token-file", "/no/such/file")]
)
def test_a_wrong_option_is_named(tmp_path: Path, option: str, value: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"{option}.*{value}"):
        command.main(["--model", str(tmp_path), option, value], standalone_mode=False)


def test_an_empty_token_is_no_token_that_was_forgotten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("RESPKV_GATEWAY_TOKEN", "")
    with pytest.raises(ConfigError, match="RESPKV_GATEWAY_TOKEN is empty: accepted are"):
        command.main(["--model", str(tmp_path)], standalone_mode=False)


def test_options_that_may_be_repeated_reach_the_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    words = ["--model", str(tmp_path), "--allow-origin", "https://a.example"]
    with pytest.raises(ConfigError, match="allow_origin = 'no-origin'"):
        command.main([*words, "--allow-origin", "no-origin"], standalone_mode=False)


def test_a_folder_without_a_model_is_one_line_and_exit_code_2(cli: Cli, tmp_path: Path) -> None:
    done = cli("gateway", "--model", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"respkv: --model {str(tmp_path)!r}: accepted is a folder")
    assert done.stderr.count("\n") == 1
