"""A full disk is said with the file, the room that is left, and the remedy."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from ray.exceptions import RayTaskError

from housing_assets.sample_data import write_sample
from step_scripts.runner import execution as runner
from step_scripts.runner import storage
from step_scripts.runner.contract import StepDefinition, StepError, StepParams, StepRequest
from step_scripts.runner.execution import PrintReporter, run_step
from step_scripts.runner.local_files import explain_full_disk
from step_scripts.runner.ray_data import each_call
from step_scripts.runner.ray_session import RaySession, RaySettings


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """No file can become larger, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_stream(uri: str) -> None:
    with storage.open_output(uri) as file:
        file.write(bytes(100_000))


def test_generated_data_for_which_there_is_no_room(tmp_path: Path) -> None:
    with (
        pytest.raises(StepError, match=r"/sales\.csv could not be written: .* bytes are free .* launch"),
        room(20_000),
    ):
        write_sample(tmp_path / "sales.csv", rows=10_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "write",
    [
        lambda uri: storage.write_bytes(uri, bytes(100_000)),
        write_stream,
    ],
    ids=["small file", "stream"],
)
def test_an_error_while_writing_names_the_file_and_the_room(tmp_path: Path, write: Callable[[str], None]) -> None:
    path = tmp_path / "folder" / "file"
    with pytest.raises(OSError, match="bytes are free there") as caught, room(20_000):
        write(str(path))
    assert caught.value.filename == str(path)
    text = explain_full_disk(caught.value, [])
    assert text is not None
    assert str(path) in text
    assert "HOUSING_ROOT" in text


@pytest.mark.parametrize("actors", [None, 1])
def test_a_task_of_ray_data_names_its_file(ray_session: RaySession, tmp_path: Path, actors: int | None) -> None:
    def fill(path: str) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            storage.write_bytes(path, bytes(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    path = str(tmp_path / "file")
    with pytest.raises(OSError, match="bytes are free there") as caught:
        list(each_call(fill, [(path,)], actors=actors))
    assert caught.value.filename == path
    assert str(explain_full_disk(caught.value, [])).startswith(f"{path} could not be written: ")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("17584 requested and 12272 written"),
        pl.exceptions.ComputeError("No space left on device (os error 28)"),
        RayTaskError("task", "traceback", OSError(errno.EDQUOT, "Disk quota exceeded")),
    ],
    ids=["system", "NumPy", "Polars", "Ray"],
)
def test_a_step_that_fails_because_the_disk_is_full_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run(*_: Any) -> Any:
        try:
            raise error
        except Exception as first:
            raise RuntimeError("the search did not end") from first

    step = StepDefinition(params=StepParams, run=run, outputs=(), uses_ray=False)
    monkeypatch.setattr(runner.importlib, "import_module", lambda _: SimpleNamespace(STEP=step))
    request = StepRequest(
        step="some.step",
        params={},
        inputs={},
        output_root=str(tmp_path),
        code_version="1",
        not_before=datetime.now(UTC),
    )
    with pytest.raises(StepError, match="could not be written") as caught:
        run_step(request, PrintReporter(), RaySession(RaySettings()))
    assert f"{tmp_path}: " in str(caught.value)
    assert "bytes are free there" in str(caught.value)
    assert "HOUSING_ROOT" in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    assert explain_full_disk(OSError(errno.EACCES, "Permission denied", "file"), []) is None
    assert explain_full_disk(ValueError("12 rows requested"), []) is None
