"""The contract between a step and its runner: request, context, artifacts, manifest.

A step module `step_scripts/<name>.py` defines `STEP = StepDefinition(...)`. It reads the artifacts named in the
request, writes new ones below `StepContext.output_uri(name)`, and returns a `StepOutcome`. The runner
(`step_scripts.runner`) commits them by writing `manifest.json` last: readers trust only a manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from step_scripts.runner import storage

Reporter = logging.Logger
"""Where a step's messages go: progress, facts worth reading, warnings."""
_SMALL_FILE, _QUICKLY_READ = 1 << 20, 1 << 30
_READERS = 8
_PARQUET = b"PAR1"
noted_operators: ContextVar[list[dict[str, Any]] | None] = ContextVar("operators", default=None)
"""Where Ray Data's passes add what their operators took (`StepResult.operators`)."""


class StepError(Exception):
    """What is wrong with the input or the parameters, and what to do about it. Trying again does not help.

    `details` holds figures and small tables to show beside the message. `keep` maps names to URIs of written files that
    help to find the fault: they are kept although the step failed.
    """

    def __init__(
        self, message: str, *, details: dict[str, JsonValue] | None = None, keep: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.details: dict[str, JsonValue] = details or {}
        self.keep = keep or {}


class DamagedArtifactError(ValueError):
    """A file of an artifact is missing or does not have the content that was recorded."""


class FrozenModel(BaseModel):
    """Base of what describes data and work. Unknown names are errors, values do not change.

    Validators are built when they are first needed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class StepParams(FrozenModel):
    """Base of the parameters of a step."""


class FileInfo(FrozenModel):
    """One file of an artifact: path relative to the artifact's URI, number of rows (tables only), size, SHA-256."""

    path: str
    rows: int | None = None
    bytes: int
    sha256: str


class Artifact(FrozenModel):
    """A committed, immutable set of files. `digest` depends on the content alone, not on where or when it was made."""

    uri: str
    digest: str
    rows: int | None = None
    bytes: int = 0
    files: tuple[FileInfo, ...] = ()

    @classmethod
    def of(cls, uri: str, files: Sequence[FileInfo], *, digest: str | None = None) -> Artifact:
        """The artifact of `files` below `uri`. Without `digest`, it is that of the files' paths and contents."""
        ordered = sorted(files, key=lambda f: f.path)
        content = hashlib.sha256()
        for file in ordered:
            content.update(f"{file.path}\0{file.sha256}\0".encode())
        counted = [f.rows for f in ordered if f.rows is not None]
        return cls(
            uri=uri,
            digest=digest or content.hexdigest(),
            rows=sum(counted) if counted else None,
            bytes=sum(f.bytes for f in ordered),
            files=tuple(ordered),
        )

    def file_uris(self, suffix: str = "") -> list[str]:
        """URIs of the files whose path ends with `suffix`, in order of path."""
        return [storage.join(self.uri, f.path) for f in self.files if f.path.endswith(suffix)]

    def file_uri(self, path: str) -> str:
        """URI of one file. Raises `KeyError` if the artifact does not hold it."""
        if path not in {f.path for f in self.files}:
            raise KeyError(f"{path} is not part of {self.uri}")
        return storage.join(self.uri, path)


class StepRequest(FrozenModel):
    """What to run: a step, its parameters, its inputs, and where the outputs go."""

    step: str
    params: dict[str, Any]
    inputs: dict[str, Artifact] = Field(default_factory=dict)
    output_root: str
    code_version: str
    environment: dict[str, str] = Field(
        default_factory=dict,
        description="Versions of the libraries that results depend on, see `code_version.library_versions`; `image`: "
        "that of the job.",
    )
    sources: dict[str, str] = Field(
        default_factory=dict,
        description="What `code_version` stands for: digests of sources by module. No part of the digest. Empty: the "
        "code that runs is not compared with what was asked for.",
    )
    not_before: datetime | None = Field(
        default=None, description="Manifests older than this are not reused. None: any age is good."
    )
    run_id: str | None = Field(default=None, description="The run that asks. No part of the digest.")
    checkpoint_uri: str | None = Field(
        default=None,
        description="Where a step keeps unfinished work for the next attempt at the same request; removed when it has "
        "succeeded. None: finished parts below `output_uri`. No part of the digest.",
    )

    @property
    def digest(self) -> str:
        """Depends on step, code, libraries, parameters and the content of the inputs; not on where they lie."""
        content = {"step": self.step, "params": self.params, **self.origins}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def origins(self) -> dict[str, Any]:
        """What results follow from beside the parameters: code, libraries, the content of the inputs."""
        inputs = {name: artifact.digest for name, artifact in sorted(self.inputs.items())}
        return {"code": self.code_version, "environment": self.environment, "inputs": inputs}

    @property
    def output_uri(self) -> str:
        """`<output_root>/<step>/<first 16 digits of the digest>`."""
        return storage.join(self.output_root, self.step, self.digest[:16])

    @property
    def manifest_uri(self) -> str:
        """Where the manifest of this request is once the step has finished."""
        return storage.join(self.output_uri, "manifest.json")

    def kept_uri(self, name: str) -> str:
        """Where a file is kept that a failed attempt leaves for people to read (`StepError.keep`)."""
        return storage.join(self.output_uri, "failed", name)

    @property
    def shared_checkpoint_uri(self) -> str:
        """Prefix for finished parts of the work, which all attempts at the request share."""
        if self.checkpoint_uri is None:
            return storage.join(self.output_uri, "unfinished")
        return storage.join(self.checkpoint_uri, "shared")


class StepResult(FrozenModel):
    """The manifest: what a finished step made. `seconds` holds the duration of each phase."""

    step: str
    request_digest: str
    code_version: str
    created_at: datetime
    params: dict[str, Any]
    inputs: dict[str, Artifact]
    outputs: dict[str, Artifact]
    metrics: dict[str, float] = Field(default_factory=dict)
    details: dict[str, Any] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    peak_memory_bytes: int | None = Field(default=None, description="Peak resident memory of the driver process.")
    cpus: float | None = Field(default=None, description="Logical CPUs of the Ray nodes together.")
    nodes: list[str] = Field(default_factory=list, description="Addresses of the Ray nodes that were there.")
    versions: dict[str, str] = Field(default_factory=dict)
    run_id: str | None = Field(default=None, description="The run that did the work; reuse does not change it.")
    reused: bool = Field(default=False, description="True if an earlier run's manifest answered the request.")
    unversioned: list[str] = Field(
        default_factory=list,
        description="Modules that took part and that the code version does not cover: not to be reused.",
    )
    operators: list[dict[str, Any]] = Field(
        default_factory=list, description="Operators of Ray Data, in the order of the passes, and what they took."
    )


@dataclass
class StepOutcome:
    """What a step's function returns. `metrics` are numbers to plot over time; `details` any JSON value."""

    outputs: dict[str, Artifact]
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


class StepContext:
    """What a step's function gets beside its parameters."""

    def __init__(self, request: StepRequest, attempt_uri: str, reporter: Reporter) -> None:
        self.request = request
        self.inputs = request.inputs
        self.attempt_uri = attempt_uri
        self.log = reporter
        self.seconds: dict[str, float] = {}
        self.confirm: Callable[[], None] = lambda: None
        """Raises `StepError` if the step runs with other code than what was asked for: for steps that change more than
        their outputs, before they do."""

    @property
    def attempt_checkpoint_uri(self) -> str | None:
        """Prefix for what only this attempt may continue, after its machines were replaced. None: nothing is kept."""
        if self.request.checkpoint_uri is None:
            return None
        return storage.join(self.request.checkpoint_uri, self.attempt_uri.rstrip("/").rpartition("/")[2])

    def output_uri(self, name: str) -> str:
        """Prefix below which output `name` is to be written. Not visible to readers until the step has returned."""
        return storage.join(self.attempt_uri, name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of the block to `seconds[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class StepDefinition:
    """A step: its parameter model, the names of its inputs and outputs, and its function."""

    params: type[StepParams]
    run: Callable[[StepContext, Any], StepOutcome]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    uses_ray: bool = True


def file_info(uri: str, relative_to: str, rows: int | None = None) -> FileInfo:
    """`FileInfo` of the file at `uri`, by reading it once. Cheapest where it was written: it is cached there."""
    with storage.open_plain(uri) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]  # Arrow's too
        size = file.tell()
    return FileInfo(path=uri.removeprefix(relative_to.rstrip("/") + "/"), rows=rows, bytes=size, sha256=digest)


def check_files(artifact: Artifact, contents: Literal["small", "local", "all"] = "small") -> None:
    """Raise `DamagedArtifactError` naming the first file that is missing, cut, or without the end of a Parquet file.

    `contents` says which files are read and compared with their digests. `small`: local files of up to 1 MiB; `local`:
    all local files, if the artifact has up to 1 GiB (about a second); `all`: all files. On S3 an object is complete or
    absent, so one listing of the sizes is enough.
    """
    sizes = storage.sizes(artifact.uri, [file.path for file in artifact.files])
    remote = storage.is_remote(artifact.uri)
    local_limit = math.inf if contents == "local" and artifact.bytes <= _QUICKLY_READ else _SMALL_FILE
    limit = math.inf if contents == "all" else -1 if remote else local_limit

    def check(file: FileInfo) -> None:
        uri = storage.join(artifact.uri, file.path)
        if (size := sizes.get(file.path)) is None:
            raise DamagedArtifactError(f"{uri} is missing; it was {file.bytes} bytes")
        if size != file.bytes:
            raise DamagedArtifactError(f"{uri} has {size} bytes, recorded were {file.bytes}")
        if size <= limit:
            if (found := file_info(uri, artifact.uri).sha256) != file.sha256:
                raise DamagedArtifactError(f"{uri} has SHA-256 {found}, recorded was {file.sha256}")
        elif not remote and uri.endswith(".parquet"):
            with storage.local_path(uri).open("rb") as opened:
                opened.seek(-len(_PARQUET), os.SEEK_END)
                if opened.read() != _PARQUET:
                    raise DamagedArtifactError(f"{uri} does not end as a Parquet file")

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(check, artifact.files))
