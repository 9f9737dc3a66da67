"""Errors out of task groups, as they were raised."""

from collections.abc import Iterator
from contextlib import contextmanager

from respkv.errors import CacheError


@contextmanager
def answers_alone() -> Iterator[None]:
    """Raise an answer that ended a task group by itself, without the group around it.

    The first one, when all that was raised are answers: with several tasks they say the same thing
    several times. A bug among them is raised with all the rest.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        answers, others = group.split(CacheError)
        if answers is None or others is not None:
            raise
        raise _first(answers) from group


def _first(group: BaseExceptionGroup[CacheError]) -> CacheError:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
