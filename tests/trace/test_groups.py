"""Errors out of task groups."""

import pytest

from respkv.errors import Busy, CacheError
from respkv.trace.groups import answers_alone


def test_an_answer_leaves_its_groups() -> None:
    with pytest.raises(Busy, match="later"), answers_alone():
        raise ExceptionGroup("outer", [ExceptionGroup("inner", [Busy("later"), CacheError("x")])])


def test_a_bug_stays_with_all_that_was_raised_beside_it() -> None:
    with pytest.raises(ExceptionGroup) as caught, answers_alone():
        raise ExceptionGroup("outer", [CacheError("no"), KeyError("bug")])
    assert len(caught.value.exceptions) == 2


def test_what_is_no_group_passes() -> None:
    with pytest.raises(KeyError), answers_alone():
        raise KeyError("bug")
