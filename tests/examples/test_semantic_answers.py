"""The example of the semantic cache, as a person starts it, and over a server."""

import pytest

from examples import semantic_answers
from tests.server_process import ServerProcess


def test_paraphrases_are_answered_from_the_cache_and_no_answer_is_anothers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert semantic_answers.main(["--questions", "60", "--model-ms", "0"]) == 0
    shown = capsys.readouterr().out
    assert "wrong answers           0" in shown
    assert "the agent remembers     " in shown


def test_it_runs_over_a_server_too(server: ServerProcess) -> None:
    report = semantic_answers.run(60, server.url, model_ms=0)
    assert report.wrong == 0
    # One question of each topic has to be asked, and here and there another way to put it.
    assert report.hits >= 45
    assert 1 <= len(report.memory) <= 3
