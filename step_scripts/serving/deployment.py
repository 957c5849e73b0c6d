"""Files through which an endpoint host and a serving process talk. Imports nothing heavy.

The state folder of an endpoint holds `deployment.json` (what is to be served; written by the host), `server.json` (the
process that serves; written by it once it listens), `reload.json` (how the last change of model ended; written by the
process), `server.log` (bounded), `server.lock` (held by the process as long as it lives) and `captured/` (requests and
answers, if they are captured; bounded).
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact

DEPLOYMENT_FILE = "deployment.json"
SERVER_FILE = "server.json"
RELOAD_FILE = "reload.json"
LOG_FILE = "server.log"
LOCK_FILE = "server.lock"
CAPTURE_FOLDER = "captured"
MAX_BODY_BYTES = 6_291_456  # of a request; SageMaker's limit


class _StateFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def read(cls, path: Path) -> Self:
        """From the file. Raises `FileNotFoundError`, or pydantic's `ValidationError` (a `ValueError`)."""
        return cls.model_validate_json(path.read_bytes())

    def write(self, path: Path) -> None:
        """To the file, atomically. What is not set is left out: a running process may know fewer fields."""
        storage.write_bytes(str(path), self.model_dump_json(indent=2, exclude_none=True).encode())


class CaptureSettings(BaseModel):
    """Which share of the requests is kept, and how much of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampling_percentage: float = Field(default=100.0, gt=0, le=100)
    megabytes: float = Field(default=100.0, gt=0, description="Bound of all files; the oldest are removed.")


class CaptureCounts(BaseModel):
    """Requests of the sample since the process began to capture. `error`: why the last one could not be written."""

    model_config = ConfigDict(frozen=True)

    written: int
    dropped: int
    error: str = ""


class DeploymentRecord(_StateFile):
    """What an endpoint is to serve. `deployment_id` is new for every deployment, also of the same version."""

    deployment_id: str
    endpoint_name: str
    version: str = Field(description="`<model group>/<version>`.")
    model: Artifact
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535, description="0: any free port.")
    port_is_required: bool = Field(default=False, description="False: take a free port if `port` is in use.")
    deployed_at: datetime
    previous_version: str | None = None
    capture: CaptureSettings | None = Field(default=None, description="None: requests are not captured.")


class ServerRecord(_StateFile):
    """The serving process. Its `create_time` (psutil: seconds since 1970) tells it from a later process of its pid."""

    pid: int
    create_time: float
    host: str
    port: int
    started_at: datetime


class ReloadRecord(_StateFile):
    """How the change to a deployment ended. `error` is empty if it succeeded."""

    deployment_id: str
    error: str = ""
    at: datetime
