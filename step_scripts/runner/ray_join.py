"""Joins a Ray cluster that somebody else has started, with its token and within a time limit."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from step_scripts.runner.background import run_in_thread
from step_scripts.runner.contract import StepError

CONNECT_SECONDS = "HOUSING_RAY_CONNECT_SECONDS"
_DEFAULT_SECONDS = 60.0
_REMEDY = (
    f"Start the cluster, correct RAY_ADDRESS, or unset it to use this machine; {CONNECT_SECONDS} is how long to wait"
)


def is_open(address: str, port: int, seconds: float = 1.0) -> bool:
    """Whether something accepts TCP connections there."""
    try:
        with socket.create_connection((address, port), seconds):
            return True
    except OSError:
        return False


def use_token_if_present() -> None:
    """Have Ray use the token that is on this machine, if there is one. Ray reads the setting when it is imported.

    A cluster without authentication ignores the token.
    """
    home = os.environ.get("HOME")
    file = home is not None and os.access(Path(home, ".ray", "auth_token"), os.R_OK)
    if file or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def join_cluster(address: str, **options: Any) -> None:
    """`ray.init(address, **options)` with the cluster's token, if there is one on this machine.

    Raises `StepError` if the cluster does not answer within `HOUSING_RAY_CONNECT_SECONDS`, or refuses.
    """
    use_token_if_present()
    limit = float(os.environ.get(CONNECT_SECONDS) or _DEFAULT_SECONDS)
    deadline = time.monotonic() + limit
    if (reason := _unreachable(address, deadline)) is not None:
        raise StepError(f"no Ray cluster answers at {address} (RAY_ADDRESS) within {limit:g} s: {reason}. {_REMEDY}")
    refusal: Exception | None = None

    def join() -> None:
        nonlocal refusal
        import ray

        while True:
            try:
                ray.init(address=address, **options)
            except ConnectionError as error:  # a wrong token, or a head that is still starting
                refusal = error
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.5)
            else:
                return

    try:
        # Ray itself tries for minutes, and cannot be interrupted.
        run_in_thread(join, timeout=max(1.0, deadline - time.monotonic()))
    except TimeoutError:
        if refusal is None:
            raise StepError(
                f"the Ray cluster at {address} (RAY_ADDRESS) does not answer within {limit:g} s. {_REMEDY}"
            ) from None
        raise _refused(address, refusal) from refusal
    except Exception as error:
        raise _refused(address, error) from error


def _refused(address: str, error: Exception) -> StepError:
    reason = " ".join(str(error).split())
    return StepError(
        f"the Ray cluster at {address} (RAY_ADDRESS) cannot be joined: {type(error).__name__}: {reason}. "
        "If it wants a token (RAY_AUTH_MODE=token), its token must stand in ~/.ray/auth_token here, or in the "
        "file that RAY_AUTH_TOKEN_PATH names; Ray and Python must have the cluster's versions"
    )


def _unreachable(address: str, deadline: float) -> str | None:
    """Why nothing accepts connections at `address`; None if something does, or if the address names no port."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return None
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), max(0.1, min(left, 5.0))).close()
        except OSError as error:
            if left <= 0:
                return str(error)
            time.sleep(min(0.5, max(left, 0.0)))
        else:
            return None
