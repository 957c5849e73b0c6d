"""Waiting for a state."""

import time

import pytest

from resources.waiting import wait_until


def test_the_first_true_answer_is_returned_without_a_pause_if_it_is_there_at_once() -> None:
    start = time.monotonic()
    assert wait_until(lambda: {"status": "ready"}, timeout=60, interval=30, what="the job's end") == {"status": "ready"}
    assert time.monotonic() - start < 5


def test_intervals_grow_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    answers = iter([None, 0, "", [], None, "there"])
    found = wait_until(lambda: next(answers), timeout=60, interval=1.0, longest_interval=2.0, what="its appearance")
    assert found == "there"
    assert pauses == [1.0, 1.5, 2.0, 2.0, 2.0]


def test_time_that_is_up_is_an_error_that_says_what_was_waited_for() -> None:
    times: list[float] = []
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"the end of job x did not happen within 0\.3 s"):
        wait_until(lambda: times.append(time.monotonic()), timeout=0.3, interval=0.2, what="the end of job x")
    assert times[-1] - start >= 0.3, "the last look is at the deadline"
    assert time.monotonic() - start < 5


def test_errors_of_the_poll_pass_through() -> None:
    def fail() -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        wait_until(fail, timeout=60, interval=1, what="nothing")
