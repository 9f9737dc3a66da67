"""A cache that failed is asked again, but not so often that workers wait for it."""

import logging
import time

import pytest

from respkv.errors import CacheError, ConnectionLost, ServerError, TimedOut
from respkv.integrations.huggingface.availability import Availability


def assert_paused(state: Availability, error: CacheError, seconds: float, pause_s: float) -> None:
    before = time.monotonic()
    state.failed("match", error, seconds)
    assert before + pause_s <= state._retry_at <= time.monotonic() + pause_s
    assert not state.is_open or time.monotonic() >= state._retry_at


def test_what_hangs_is_asked_less_often_than_what_refuses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = Availability()
    with caplog.at_level(logging.WARNING):
        for seconds, pause_s in ((0.001, 1.0), (0.001, 2.0), (30.0, 300.0), (1000.0, 600.0)):
            assert_paused(state, TimedOut("no answer"), seconds, pause_s)
        for pause_s in (16.0, 32.0, 60.0, 60.0):
            assert_paused(state, ConnectionLost("refused"), 0.0, pause_s)
    assert (state.errors, state.last_error) == (8, "match: refused")
    assert len(caplog.records) == 2
    state.succeeded()
    assert_paused(state, ConnectionLost("refused"), 0.0, 1.0)


def test_an_error_of_one_request_is_no_reason_to_pause(caplog: pytest.LogCaptureFixture) -> None:
    state = Availability()
    with caplog.at_level(logging.WARNING):
        for nbytes in (256, 512, 256):
            state.failed("store", ServerError("OOM", f"no room for {nbytes} bytes"), 5.0)
    assert state.is_open
    assert (state.errors, len(caplog.records)) == (3, 1)
