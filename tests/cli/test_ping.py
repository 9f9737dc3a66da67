"""``respkv ping``, which every container runs every few seconds."""

import re
import subprocess
import sys
from pathlib import Path

from respkv.client import Client
from tests.cli.conftest import Cli

HEAVY = {"numpy", "anyio", "torch", "uvloop", "hiredis", "rich", "msgspec", "asyncio", "ssl"}


def test_a_server_that_is_there_answers_with_its_latency(cli: Cli, redis_url: str) -> None:
    done = cli("ping", url=redis_url)
    assert re.fullmatch(r"PONG \d+\.\d{3} ms\n", done.stdout)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_option_wins_over_the_environment(cli: Cli, redis_url: str, nowhere: str) -> None:
    assert cli("ping", "--url", redis_url, url=nowhere).returncode == 0
    assert cli("ping", "--url", nowhere, url=redis_url).returncode == 1


def test_a_server_that_is_away_is_one_line_and_exit_code_1(cli: Cli, nowhere: str) -> None:
    done = cli("ping", url=nowhere)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("respkv: cannot connect to 127.0.0.1:")
    assert "start one with `respkv serve`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_socket_that_is_not_there_is_answered_with_what_to_do(cli: Cli, tmp_path: Path) -> None:
    done = cli("ping", "--url", f"unix://{tmp_path}/none")
    assert done.stderr.startswith(f"respkv: cannot connect to unix://{tmp_path}/none: ")
    assert "start one with `respkv serve`" in done.stderr


def test_a_url_that_is_none_is_one_line_and_exit_code_2(cli: Cli) -> None:
    done = cli("ping", "--url", "http://user:hunter2@host")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr
    assert "as in respkv://127.0.0.1:7379" in done.stderr


def test_a_server_that_wants_a_password_is_not_well(cli: Cli, redis_url: str) -> None:
    guarded_url = redis_url.replace("://", "://:hunter2@")
    with Client(redis_url) as client, Client(guarded_url) as guarded:
        client.command("CONFIG", "SET", "requirepass", "hunter2")
        try:
            refused, granted = cli("ping", url=redis_url), cli("ping", url=guarded_url)
        finally:
            guarded.command("CONFIG", "SET", "requirepass", "")
    assert refused.returncode == 1
    assert refused.stderr.startswith("respkv: NOAUTH ")
    assert granted.returncode == 0


def test_a_ping_imports_nothing_heavy(redis_url: str) -> None:
    code = (
        "import sys\n"
        "from respkv.cli import main\n"
        f"main(['ping', '--url', {redis_url!r}], standalone_mode=False)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
