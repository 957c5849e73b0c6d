"""Captured requests: what is written, how much of it is kept, and what can be read back."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from housing_assets.deployments import load_resources
from housing_assets.schema import HOUSING_TABLE
from resources.endpoints.base import PROBE_ID
from resources.endpoints.captured_files import CapturedRows, read_captured
from resources.endpoints.local import LocalDataCapture, LocalEndpointHost
from resources.endpoints.server_process import find_server
from resources.model_registry.local import LocalModelRegistry
from step_scripts.serving import deployment
from step_scripts.serving.app import InferenceApp
from step_scripts.serving.deployment import (
    CSV,
    JSON,
    JSON_LINES,
    AnsweredRequest,
    CaptureSettings,
    RequestCapture,
    captured_line,
)
from step_scripts.serving.served_model import encode
from tests.serving_models import house_rows, registered, request, small_model, smoke_test
from tests.waiting import until

LOG = logging.getLogger("test")
EVERYTHING = CaptureSettings()


def exchange(rows: int = 1, *, at: datetime | None = None, seed: int = 0, inference_id: str = "") -> AnsweredRequest:
    """A CSV request of valid rows; row i is answered with i."""
    body = house_rows(rows, seed).write_csv(include_header=False).encode()
    return AnsweredRequest(at or datetime.now(UTC), CSV, body, CSV, encode(np.arange(float(rows)), CSV), inference_id)


def captured(folder: Path, *, since: datetime | None = None, limit: int = 10_000, without: str = "") -> CapturedRows:
    since = since or datetime.now(UTC) - timedelta(days=3)
    return read_captured(str(folder), HOUSING_TABLE, since, limit, without)


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.jsonl"))


def test_a_line_has_the_form_of_sagemaker() -> None:
    at = datetime(2026, 3, 4, 5, 6, 7, 890_000, UTC)
    line = captured_line(AnsweredRequest(at, CSV, b"1,2\n", JSON, b'{"predictions": [3.0]}', "mine"))
    assert line.endswith(b"}\n")
    found = json.loads(line)
    assert found["captureData"] == {
        "endpointInput": {"observedContentType": CSV, "mode": "INPUT", "data": "1,2\n", "encoding": "CSV"},
        "endpointOutput": {
            "observedContentType": JSON,
            "mode": "OUTPUT",
            "data": '{"predictions": [3.0]}',
            "encoding": "JSON",
        },
    }
    assert found["eventVersion"] == "0"
    metadata = found["eventMetadata"]
    assert (metadata["inferenceTime"], metadata["inferenceId"]) == ("2026-03-04T05:06:07.890000Z", "mine")
    assert len(metadata["eventId"]) == 36


@given(st.text(max_size=50))
def test_bodies_survive_being_captured(text: str) -> None:
    line = captured_line(AnsweredRequest(datetime.now(UTC), JSON, text.encode(), CSV, b"1\n", ""))
    assert json.loads(line)["captureData"]["endpointInput"]["data"] == text
    assert line.count(b"\n") == 1


def test_what_is_captured_can_be_read_back(tmp_path: Path) -> None:
    capture = RequestCapture(tmp_path, EVERYTHING)
    frames = [house_rows(rows, seed=rows) for rows in (1, 3, 4)]
    matrices = [frame.cast(pl.Float64).to_numpy() for frame in frames]
    bodies = [
        (CSV, frames[0].write_csv().encode()),
        (JSON, json.dumps({"instances": [list(row) for row in frames[1].rows()]}).encode()),
        (JSON_LINES, frames[2].write_ndjson().encode()),
    ]
    for number, (media, body) in enumerate(bodies):
        answer = encode(np.full(len(matrices[number]), float(number)), media)
        capture.add(AnsweredRequest(datetime.now(UTC), media, body, media, answer, ""))
    capture.add(exchange(inference_id=PROBE_ID))
    capture.close()
    assert capture.counts().model_dump() == {"written": 4, "dropped": 0, "error": ""}

    found = captured(tmp_path, without=PROBE_ID)
    assert (len(found.predictions), found.requests, found.unreadable) == (8, 3, 0)
    np.testing.assert_array_equal(found.features, np.concatenate([matrices[2], matrices[1], matrices[0]]))
    assert found.predictions.tolist() == [2.0] * 4 + [1.0] * 3 + [0.0]
    assert captured(tmp_path).requests == 4
    first = captured(tmp_path, limit=5, without=PROBE_ID)
    assert first.predictions.tolist() == [2.0] * 4 + [1.0], "the latest"


def test_only_the_time_asked_for_is_read(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    capture = RequestCapture(tmp_path, EVERYTHING)
    for hours in (50, 30, 1):
        capture.add(exchange(at=now - timedelta(hours=hours)))
    capture.close()
    assert len(list(tmp_path.glob("AllTraffic/????/??/??/??/*.jsonl"))) == 3, "a file an hour"
    found = captured(tmp_path, since=now - timedelta(hours=31))
    assert found.requests == 2
    assert found.oldest is not None
    assert timedelta(0) <= now - timedelta(hours=30) - found.oldest < timedelta(seconds=1)
    assert captured(tmp_path / "nowhere").predictions.size == 0


def test_lines_that_are_no_request_of_the_table_are_counted(tmp_path: Path) -> None:
    capture = RequestCapture(tmp_path, EVERYTHING)
    capture.add(exchange(2))
    capture.add(exchange()._replace(input_body=b"1,2,3"))
    capture.add(exchange()._replace(output_body=b"1\n2\n"))
    capture.close()
    [file] = tmp_path.rglob("*.jsonl")
    good = json.loads(file.read_bytes().splitlines()[0])
    coded = good["captureData"]["endpointInput"]
    coded |= {"encoding": "BASE64", "data": base64.b64encode(coded["data"].encode()).decode()}
    with file.open("a") as more:
        more.write("[]\n{}\n" + json.dumps(good) + "\n" + json.dumps(good)[:100])
    found = captured(tmp_path)
    assert (len(found.predictions), found.requests, found.unreadable) == (4, 2, 5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=60), st.integers(2, 20))
def test_files_are_bounded_and_the_latest_stay(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], kilobytes: int
) -> None:
    """Whatever the sizes of the requests, and with restarts in between."""
    folder = tmp_path_factory.mktemp("captured")
    at = datetime.now(UTC) - timedelta(days=2)
    bound = CaptureSettings(megabytes=kilobytes / 1000)
    written: list[int] = []
    capture = RequestCapture(folder, bound)
    for number, (rows, hours) in enumerate(sizes):
        at += timedelta(hours=hours % 2, milliseconds=2)
        taken = exchange(rows, at=at)._replace(output_body=encode(np.full(rows, float(number)), CSV))
        capture.add(taken)
        if len(captured_line(taken)) <= kilobytes * 1000:
            written.append(number)
        if hours == 3:
            capture.close()
            capture = RequestCapture(folder, bound)
    capture.close()
    assert bytes_in(folder) <= kilobytes * 1000
    kept = sorted({int(value) for value in captured(folder).predictions})
    assert kept == written[len(written) - len(kept) :], "a gap"
    assert bool(kept) == bool(written)
    assert not [f for f in folder.rglob("*") if f.is_dir() and not any(f.iterdir())], "empty folders"


def test_the_sample_is_a_share(tmp_path: Path) -> None:
    capture = RequestCapture(tmp_path, CaptureSettings(sampling_percentage=25))
    taken = exchange()
    for _ in range(2000):
        capture.add(taken)
    capture.close()
    assert 350 < capture.counts().written < 650  # 500 +- 8 standard deviations
    assert captured(tmp_path).requests == capture.counts().written


def test_what_the_disk_cannot_keep_up_with_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = threading.Event()
    write = deployment._BoundedFiles.write

    def wait_and_write(files: Any, at: datetime, line: bytes) -> None:
        slow.wait(60)
        write(files, at, line)

    monkeypatch.setattr(deployment._BoundedFiles, "write", wait_and_write)
    taken = exchange()
    size = len(taken.input_body) + len(taken.output_body) + deployment._REQUEST_BYTES
    monkeypatch.setattr(deployment, "_WAITING_BYTES", 100 * size)
    capture = RequestCapture(tmp_path, EVERYTHING)
    for _ in range(500):
        capture.add(taken)
    assert 399 <= capture.counts().dropped <= 400  # one may be on its way to the disk
    large = taken._replace(input_body=b"1" * 100 * size)
    slow.set()
    until(lambda: capture.counts().written >= 100)
    before = capture.counts().dropped
    capture.add(large)
    assert capture.counts().dropped == before + 1
    capture.add(taken)
    capture.close()
    counts = capture.counts()
    assert counts.written + counts.dropped == 502
    assert captured(tmp_path).requests == counts.written


def test_a_disk_that_fails_costs_requests_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "captured"
    blocked.write_text("a file where the folder should be")
    capture = RequestCapture(blocked, EVERYTHING)
    for _ in range(3):
        capture.add(exchange())
    until(lambda: capture.counts().dropped == 3)
    assert "Not a directory" in capture.counts().error
    assert caplog.text.count("requests cannot be captured") == 1, "said once"
    blocked.unlink()
    capture.add(exchange())
    until(lambda: capture.counts().written == 1)
    assert capture.counts().error == ""
    capture.close()
    assert captured(blocked).requests == 1


def test_closing_twice_and_adding_afterwards(tmp_path: Path) -> None:
    capture = RequestCapture(tmp_path, EVERYTHING)
    capture.close()
    capture.close()
    capture.add(exchange())
    assert capture.counts().dropped == 1
    assert InferenceApp().capture is None, "off by default"


def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    root = {"HOUSING_ROOT": str(tmp_path)}
    assert load_resources(root)["endpoint_host"].data_capture is None
    variables = {"HOUSING_DATA_CAPTURE": "on", "HOUSING_CAPTURE_PERCENT": "5", "HOUSING_CAPTURE_MEGABYTES": "1.5"}
    host = load_resources(root | variables)["endpoint_host"]
    assert host.data_capture == LocalDataCapture(sampling_percentage=5, megabytes=1.5)
    with pytest.raises(ValueError, match="HOUSING_DATA_CAPTURE='yes': choose on or off"):
        load_resources(root | {"HOUSING_DATA_CAPTURE": "yes"})
    aws = {"HOUSING_DEPLOYMENT": "sagemaker", "HOUSING_ROOT": "s3://bucket/housing"}
    aws["HOUSING_ROLE_ARN"] = "arn:aws:iam::123456789012:role/housing"
    assert load_resources(aws)["endpoint_host"].data_capture is None
    host = load_resources(aws | {"HOUSING_DATA_CAPTURE": "on", "HOUSING_CAPTURE_PERCENT": "5"})["endpoint_host"]
    assert host.data_capture.sampling_percentage == 5


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., LocalEndpointHost]]:
    """Makes hosts of one root: with data capture, or without."""
    root = str(tmp_path / "endpoints")

    def made(capture: LocalDataCapture | None = None) -> LocalEndpointHost:
        return LocalEndpointHost(root=root, data_capture=capture)

    yield made
    for status in made().list():
        made().delete(status.name)


def test_an_endpoint_captures_through_changes_of_model_until_it_is_switched_off(
    hosts: Callable[..., LocalEndpointHost], tmp_path: Path
) -> None:
    registry = LocalModelRegistry(root=str(tmp_path / "registry"))
    models = [small_model(tmp_path / name, factor=factor) for name, factor in (("1", 100), ("2", 200))]
    versions = [registered(registry, model) for model in models]
    since = datetime.now(UTC) - timedelta(hours=1)
    host = hosts(LocalDataCapture())
    assert host.captured("housing", HOUSING_TABLE, since, 100) is None
    rows = house_rows(3)
    served: list[float] = []
    for version, model in zip(versions, models, strict=True):
        host.deploy("housing", version, smoke_test(model), LOG)
        answer = json.loads(host.invoke("housing", rows.write_csv().encode(), CSV, JSON))
        served = answer["predictions"] + served
    server = find_server(Path(host.root) / "housing")
    assert server is not None
    status, _, _ = request(server.port, "/invocations", b"1,2", Content_Type=CSV)
    assert status == 400

    def counted() -> int:
        described = host.describe("housing")
        assert described is not None
        assert described.captured is not None
        return described.captured.written

    # 12 rows of the smoke test at once and one by one, of each deployment, are captured as this project's own.
    until(lambda: counted() == 2 * (1 + 12 + 1))
    found = host.captured("housing", HOUSING_TABLE, since, 100)
    assert found is not None
    assert (found.requests, found.unreadable) == (2, 0), "refused requests and test requests are left out"
    assert found.predictions.tolist() == served
    np.testing.assert_array_equal(found.features[:3], rows.cast(pl.Float64).to_numpy())

    before = host.describe("housing")
    assert before is not None
    off = hosts().deploy("housing", versions[1], smoke_test(models[1]), LOG)
    assert (off.pid, off.version, off.previous_version) == (before.pid, before.version, before.previous_version)
    assert off.captured is None
    host.invoke("housing", rows.write_csv().encode(), CSV, JSON)
    assert hosts().captured("housing", HOUSING_TABLE, since, 100) is None

    on = hosts(LocalDataCapture(megabytes=1)).deploy("housing", versions[1], smoke_test(models[1]), LOG)
    assert on.captured is not None
    shutil.rmtree(Path(host.root) / "housing" / "captured")  # somebody tidies up
    again = host.captured("housing", HOUSING_TABLE, since, 100)
    assert again is not None
    assert again.predictions.size == 0

    def captured_again() -> int:
        assert json.loads(host.invoke("housing", rows.write_csv().encode(), CSV, JSON))["predictions"] == served[:3]
        found = host.captured("housing", HOUSING_TABLE, since, 100)
        return len(found.predictions) if found else 0

    until(captured_again)
