"""The demos of one process as a person starts them, with a model so small that they take no time."""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from examples import (
    agentic_workflow,
    multi_turn_chat,
    repeated_prompts,
    shared_document,
    small_model,
)
from examples.processes import DemoFailed
from examples.readers import PlainReader, cached_reader
from examples.small_model import SmallModel, made
from tests.server_process import ServerProcess

Main = Callable[[Sequence[str]], int]
TEXT = Path(__file__).parents[2] / "examples" / "shared_prompt.py"
TINY = ["--layers", "2", "--hidden", "64", "--text", str(TEXT)]
DEMOS = {
    "repeated_prompts": (
        repeated_prompts.main,
        ["--prompts", "2", "--times", "2", "--prompt-tokens", "100", "--new-tokens", "4"],
    ),
    "agentic_workflow": (
        agentic_workflow.main,
        ["--instruction-tokens", "90", "--steps", "3", "--new-tokens", "3"],
    ),
    "shared_document": (
        shared_document.main,
        ["--document-tokens", "90", "--questions", "7", "--new-tokens", "3"],
    ),
    "multi_turn_chat": (
        multi_turn_chat.main,
        ["--system-tokens", "40", "--turns", "3", "--new-tokens", "5"],
    ),
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def subject() -> SmallModel:
    return made(TEXT.read_text(), layers=2, hidden=64)


def fact(output: str, name: str) -> str:
    """Return what the report says about something."""
    (line,) = [line for line in output.splitlines() if line.startswith(name + "  ")]
    return line.removeprefix(name).strip()


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_reuses_tokens_changes_none_and_draws_its_plot(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, options = DEMOS[name]
    code = main([*TINY, *options, "--plot", str(tmp_path)])
    output, errors = capsys.readouterr()
    assert code == 0, output + errors
    assert "DIFFERS" not in output
    assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
    assert re.match(r"[1-9]\d*, \d", fact(output, "tokens reused"))


def test_a_demo_runs_over_a_server(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    main, options = DEMOS["shared_document"]
    assert main([*TINY, *options, "--url", server.url]) == 0
    # The document is found to the token, though it does not fill its pages.
    assert "630 reused: 100.0%" in fact(capsys.readouterr().out, "document")


def test_an_exact_repeat_reuses_all_of_its_tokens(subject: SmallModel) -> None:
    with cached_reader(subject.model, None) as cached:
        workload = repeated_prompts.Workload(1, 2, prompt_tokens=100, new_tokens=3)
        comparison = repeated_prompts.run(subject, cached, workload)
    assert [each.cached.tokens_reused for each in comparison.pairs] == [0, 100]


def test_a_turn_reuses_the_answer_before_it_as_well(subject: SmallModel) -> None:
    with cached_reader(subject.model, None) as cached:
        workload = multi_turn_chat.Workload(system_tokens=30, turns=2, new_tokens=10)
        comparison = multi_turn_chat.run(subject, cached, workload)
    first, second = comparison.pairs
    # All but the last token of the answer, which nothing was computed after.
    assert second.cached.tokens_reused >= first.cached.prompt_tokens + 9


def test_only_the_first_step_of_an_agent_misses(capsys: pytest.CaptureFixture[str]) -> None:
    main, options = DEMOS["agentic_workflow"]
    assert main([*TINY, *options]) == 0
    assert fact(capsys.readouterr().out, "layers") == "4 of 6 looked up were there: 66.7%"


def test_the_kv_of_another_model_changes_tokens_and_fails_the_demo(subject: SmallModel) -> None:
    """Else equal tokens would prove nothing."""
    other = made(TEXT.read_text(), layers=2, hidden=64)
    with torch.no_grad():
        next(other.model.parameters()).mul_(-1)
    with cached_reader(other.model, None) as cached:
        workload = shared_document.Workload(document_tokens=60, questions=2, new_tokens=4)
        comparison = shared_document.run(subject, cached, workload)
    assert "tokens differ" in (comparison.failure() or "")


def test_a_model_without_any_kv_says_the_same_tokens(subject: SmallModel) -> None:
    prompt = subject.passage(0, 40)
    answers = [
        PlainReader(subject.model, use_cache=use_cache).answer(prompt, 5)
        for use_cache in (True, False)
    ]
    assert answers[0].new_tokens == answers[1].new_tokens
    for each in answers:
        assert 0 < each.first_token_s < each.total_s


def test_a_folder_without_a_model_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repeated_prompts.main(["--model", str(tmp_path)]) == 1
    assert f"{tmp_path} has no config.json" in capsys.readouterr().err


def test_a_text_too_short_is_refused_with_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("a page is a page")
    options = ["--layers", "1", "--hidden", "64", "--text", str(tmp_path / "text")]
    assert shared_document.main(options) == 1
    assert "1 passages of 470 need 470" in capsys.readouterr().err


def test_a_number_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shared_document.main(["--questions", "0"])
    assert "--questions" in capsys.readouterr().err


def test_a_checkpoint_is_read_from_its_folder(subject: SmallModel, tmp_path: Path) -> None:
    subject.model.save_pretrained(tmp_path)
    subject.tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = argparse.Namespace(model=tmp_path, text=[TEXT], threads=1)
    loaded = small_model.load(options)
    prompt = loaded.passage(0, 30)
    assert (
        PlainReader(loaded.model).answer(prompt, 4).new_tokens
        == PlainReader(subject.model).answer(prompt, 4).new_tokens
    )
    with pytest.raises(DemoFailed, match="shorter prompts"):
        loaded.passage(10_000, 10)
