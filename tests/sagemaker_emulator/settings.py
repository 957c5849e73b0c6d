"""Configuration of an emulator."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

Isolation = Literal["auto", "namespaces", "loopback"]


@dataclass(frozen=True)
class Image:
    """What an image URI stands for on this machine: a Python interpreter and a default entry point.

    `python` comes first on PATH inside the job, so `python3` and everything installed beside it resolve to that
    environment. `entrypoint` is the image's ENTRYPOINT; `train` or `serve` is appended to it. `workdir` is its
    WORKDIR. `startup_timeout` is for endpoints, instead of the emulator's own.

    `installs`: containers install packages. Each has a copy of its own of the virtual environment that `python` is in;
    a job that comes after one that succeeded has what that one installed. Such jobs have the same requirements.
    """

    python: str = sys.executable
    entrypoint: tuple[str, ...] = ()
    workdir: str = "/"
    environment: Mapping[str, str] = field(default_factory=dict)
    startup_timeout: float | None = None
    installs: bool = False


@dataclass(frozen=True)
class Settings:
    """Everything that can be chosen about an emulator. Durations are seconds."""

    host: str = "127.0.0.1"
    port: int = 0
    isolation: Isolation = "auto"
    copy_on_write: bool = True
    images: Mapping[str, Image] = field(default_factory=dict)
    expose: Sequence[str | Path] = ()
    state_parent: str | Path | None = None
    stop_grace: float = 120.0
    failure_grace: float = 10.0
    serve_stop_grace: float = 30.0
    starting_seconds: float = 0.0
    sync_interval: float = 1.0
    spot_restart_delay: float = 0.5
    spot_billable_fraction: float = 0.3
    feature_group_delay: float = 0.3
    offline_store_delay: float = 1.0
    endpoint_startup_timeout: float = 60.0
    endpoint_wait_scale: float = 1.0
    invocation_timeout: float = 60.0
    capture_flush_seconds: float = 0.5

    def __post_init__(self) -> None:
        if not (self.host == "localhost" or self.host.startswith("127.")):
            raise ValueError(f"the emulator listens on this machine only, not on {self.host}")

    def image(self, uri: str) -> Image:
        """The image registered for `uri`; patterns are shell-style and the first match wins."""
        for pattern, image in self.images.items():
            if fnmatchcase(uri, pattern):
                return image
        return Image()
