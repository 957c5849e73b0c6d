"""Ports for servers that tests start, which nobody takes between the choice and the start."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

# Below those that the system gives to whoever asks for any port, above those that Ray chooses for its workers.
_PORTS = range(20_000, 32_000)
_held: list[int] = []


def free_port() -> int:
    """A port that nobody listens on, and that no other test process on this machine gets while this one lives."""
    while True:
        port = random.choice(_PORTS)
        lock = os.open(Path(tempfile.gettempdir()) / f"test-port-{port}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            os.close(lock)
            continue
        _held.append(lock)
        return port
