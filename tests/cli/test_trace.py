"""``respkv trace``."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from respkv.client import Client
from tests.cli.conftest import COMMAND_S, Cli, environment

MAKE = ("trace", "generate", "--sessions", "40", "--seconds", "600")


@pytest.fixture
def made(cli: Cli, tmp_path: Path) -> str:
    path = tmp_path / "made"
    done = cli(*MAKE, str(path))
    assert (done.returncode, done.stderr) == (0, "")
    return str(path)


def test_a_made_up_trace_is_in_the_public_format(cli: Cli, made: str) -> None:
    lines = [json.loads(line) for line in Path(made).read_text().splitlines()]
    assert len(lines) >= 40
    assert set(lines[0]) == {"timestamp", "input_length", "output_length", "hash_ids"}
    assert cli(*MAKE, "-").stdout == Path(made).read_text()
    assert cli(*MAKE, "-", "--seed", "1").stdout != Path(made).read_text()


def test_policies_are_simulated_told_in_a_table_and_drawn(
    cli: Cli, made: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    plot, found = tmp_path / "plot.svg", tmp_path / "out.json"
    done = cli(
        *("trace", "simulate", made, "--policy", "lru,survival,belady", "--capacity", "50,200"),
        *("--hints", "end", "--bytes-per-block", "64mb"),
        *("--plot", str(plot), "--json", str(found)),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "token hit rate" in done.stdout
    assert "survival + end hints" in done.stdout
    cells = json.loads(found.read_text())["cells"]
    assert [(cell["policy"], cell["capacity"]) for cell in cells][:2] == [("lru", 50), ("lru", 200)]
    assert len(cells) == 6
    assert "<svg" in plot.read_text()


def test_without_matplotlib_all_but_the_plot_works(
    cli: Cli, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    simulate = ("trace", "simulate", made, "--policy", "lru", "--capacity", "50")
    assert cli(*simulate).returncode == 0
    done = cli(*simulate, "--plot", str(tmp_path / "plot.svg"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "respkv: --plot needs matplotlib, which is not installed: pip install 'respkv[plot]'\n"
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--policy", "best"), 2, "policy 'best' is none of"),
        (("--capacity", "0"), 2, "holds nothing"),
        (("--capacity", "many"), 2, "accepted are numbers"),
        (("--bytes-per-block", "x"), 2, "accepted are sizes"),
        (("--admission", "second"), 2, "say --files, too"),
    ],
)
def test_a_wrong_option_is_named(
    cli: Cli, made: str, words: tuple[str, ...], code: int, said: str
) -> None:
    done = cli("trace", "simulate", made, *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


def test_a_file_that_is_no_trace_or_has_no_chains_is_refused(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("no trace\n")
    done = cli("trace", "simulate", str(path))
    assert done.returncode == 2
    assert "t:1 is no request of a trace" in done.stderr
    path.write_text("{}\n")
    assert (
        "request of a trace: 'timestamp' is missing" in cli("trace", "simulate", str(path)).stderr
    )
    path.write_text('{"format":"respkv-trace","version":1}\n')
    done = cli("trace", "simulate", str(path))
    assert done.returncode == 1
    assert "no requests with a chain of pages" in done.stderr


def test_a_trace_is_replayed_against_a_server(
    cli: Cli, made: str, server_url: str, tmp_path: Path
) -> None:
    found = tmp_path / "out.json"
    done = cli(
        *("trace", "replay", made, "--limit", "30", "--policy", "fifo", "--set", "answer-lease=0"),
        *("--workers", "3", "--page-bytes", "8kb", "--json", str(found)),
        url=server_url,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "token hit rate" in done.stdout
    figures = json.loads(found.read_text())
    assert figures["trace"]["requests"] == 30
    assert figures["hit_rate"] > 0
    assert figures["pages_wrong"] == figures["pages_lost"] == 0
    assert figures["settings"] == {"answer-lease": "0", "maxmemory-policy": "fifo"}
    assert figures["latency_us"]["match"]["calls"] == 30


def test_a_setting_without_a_value_is_refused(cli: Cli, made: str, nowhere: str) -> None:
    done = cli("trace", "replay", made, "--set", "answer-lease", url=nowhere)
    assert done.returncode == 2
    assert "--set 'answer-lease': accepted is NAME=VALUE" in done.stderr


def test_a_server_that_is_away_is_one_line_and_exit_code_1(
    cli: Cli, made: str, nowhere: str
) -> None:
    done = cli("trace", "replay", made, url=nowhere)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("respkv: cannot connect to ")
    assert len(done.stderr.splitlines()) == 1


def test_what_was_recorded_can_be_simulated_and_replayed(
    cli: Cli, made: str, server_url: str, tmp_path: Path
) -> None:
    file, listen = tmp_path / "recording", f"unix://{tmp_path / 'proxy'}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "respkv", "trace", "record", str(file)),
            *("--listen", listen, "--target", server_url),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(None),
    )
    assert process.stderr is not None
    try:
        assert "recording on unix://" in process.stderr.readline()
        done = cli("trace", "replay", made, "--limit", "20", url=listen)
        assert done.returncode == 0, done.stderr
        with Client(listen) as client:
            assert client.command("GET", "absent") is None
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=COMMAND_S)
    assert process.returncode == 0, said
    assert f"commands are in {file}" in said
    assert file.stat().st_mode & 0o777 == 0o600
    simulated = cli("trace", "simulate", str(file), "--policy", "lru", "--capacity", "100")
    assert "20 requests" in simulated.stdout
    assert "blocks of 512" in simulated.stdout
    replayed = cli("trace", "replay", str(file), url=server_url)
    assert replayed.returncode == 0
    assert "20 requests" in replayed.stdout
    again = cli("trace", "record", str(file), "--listen", listen)
    assert again.returncode == 2
    assert "is there already" in again.stderr


@pytest.mark.parametrize("way", ["--listen", "--target"])
def test_tls_cannot_be_recorded(cli: Cli, tmp_path: Path, way: str) -> None:
    done = cli("trace", "record", str(tmp_path / "t"), way, "respkvs://127.0.0.1:1")
    assert done.returncode == 2
    assert "without TLS" in done.stderr
    assert not (tmp_path / "t").exists()


def test_a_place_where_nobody_can_listen_is_one_line(cli: Cli, tmp_path: Path) -> None:
    absent = f"unix://{tmp_path}/absent/socket"
    done = cli("trace", "record", str(tmp_path / "t"), "--listen", absent)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith(f"respkv: cannot listen on {absent}: ")
