"""Whether a port answers."""

from __future__ import annotations

import socket


def is_open(address: str, port: int, seconds: float = 1.0) -> bool:
    """Whether something accepts TCP connections there."""
    try:
        with socket.create_connection((address, port), seconds):
            return True
    except OSError:
        return False
