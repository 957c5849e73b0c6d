"""Joining a Ray cluster that somebody else has started: its token, and a limit to how long it may be silent."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from step_scripts.runner.contract import StepError

CONNECT_SECONDS = "HOUSING_RAY_CONNECT_SECONDS"
_DEFAULT_SECONDS = 60.0
_MODE = "RAY_AUTH_MODE"


def join_cluster(address: str, **options: Any) -> None:
    """`ray.init(address, **options)` with the cluster's token, if there is one on this machine.

    Raises `StepError` if the cluster does not answer within `HOUSING_RAY_CONNECT_SECONDS`, or refuses.
    """
    if _MODE not in os.environ and _token_is_there():
        os.environ[_MODE] = "token"  # a cluster without authentication does not mind
    read_token_settings()
    limit = float(os.environ.get(CONNECT_SECONDS) or _DEFAULT_SECONDS)
    deadline = time.monotonic() + limit
    if (reason := _silent(address, deadline)) is not None:
        raise StepError(f"no Ray cluster answers at {address} (RAY_ADDRESS) within {limit:g} s: {reason}. {_REMEDY}")
    errors: list[BaseException] = []

    def join() -> None:
        import ray

        while True:
            try:
                ray.init(address=address, **options)
            except ConnectionError as error:  # a wrong token, or a head that is still starting
                errors[:] = [error]
                if time.monotonic() >= deadline:
                    return
                time.sleep(0.5)
            except BaseException as error:  # noqa: BLE001  # raised in the thread that waits
                errors[:] = [error]
                return
            else:
                errors.clear()
                return

    # Ray itself tries for minutes, and cannot be interrupted. The thread ends with the process.
    thread = threading.Thread(target=join, name="join-ray", daemon=True)
    thread.start()
    thread.join(max(1.0, deadline - time.monotonic()))
    if thread.is_alive() and not errors:
        raise StepError(f"the Ray cluster at {address} (RAY_ADDRESS) is silent for {limit:g} s. {_REMEDY}")
    if errors:
        reason = " ".join(str(errors[0]).split())
        raise StepError(
            f"the Ray cluster at {address} (RAY_ADDRESS) cannot be joined: {type(errors[0]).__name__}: {reason}. "
            "If it wants a token (RAY_AUTH_MODE=token), its token must stand in ~/.ray/auth_token here, or in the "
            "file that RAY_AUTH_TOKEN_PATH names; Ray and Python must have the cluster's versions"
        ) from errors[0]


def read_token_settings() -> None:
    """Have Ray look at the environment again: it remembers what it found when it was imported, or used a token."""
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


_REMEDY = (
    f"Start the cluster, correct RAY_ADDRESS, or unset it to use this machine; {CONNECT_SECONDS} is how long to wait"
)


def _token_is_there() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    home = os.environ.get("HOME")
    return home is not None and os.access(Path(home, ".ray", "auth_token"), os.R_OK)


def _silent(address: str, deadline: float) -> str | None:
    """Why nothing listens at `address`; None if something does, or if the address names no port."""
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
