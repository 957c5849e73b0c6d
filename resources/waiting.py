"""The one way to wait for a state: ask again, at growing intervals, until it is there or the time is up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")
_GROWTH = 1.5


def wait_until(
    poll: Callable[[], Found | None],
    *,
    timeout: float,
    interval: float,
    what: str,
    longest_interval: float | None = None,
) -> Found:
    """The first true answer of `poll`, which is called at once and then every `interval` seconds.

    The interval grows by half each time, up to `longest_interval`; without one it stays. Errors of `poll` pass through.
    An interrupt ends the wait at once. Raises `TimeoutError`, saying `what` has not happened, after `timeout` seconds.
    """
    import tenacity

    def late(state: tenacity.RetryCallState) -> None:
        raise TimeoutError(f"{what} did not happen within {timeout:g} s")

    def pause(state: tenacity.RetryCallState) -> float:
        growing = interval * _GROWTH ** min(state.attempt_number - 1, 50)
        left = timeout - (state.seconds_since_start or 0.0)
        return min(growing, longest_interval or interval, max(0.0, left))  # the last call is made when the time is up

    return tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda found: not found),
        stop=tenacity.stop_after_delay(timeout),
        wait=pause,
        retry_error_callback=late,
    )(poll)  # pyright: ignore[reportReturnType]  # what is retried is never returned
