"""Requests, digests, manifests: what is reused, what is not, and what a failure leaves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from step_scripts import storage
from step_scripts.code_version import step_version
from step_scripts.contract import Artifact, FileInfo, StepError, StepRequest
from step_scripts.ray_session import RaySession
from step_scripts.runner import PrintReporter, find_result, run_step

PROBE = "tests.probe_step"


def request(root: Path, action: str = "write", **changes: object) -> StepRequest:
    values = {
        "step": PROBE,
        "params": {"action": action, "value": 1},
        "output_root": str(root),
        "code_version": step_version(PROBE),
    }
    return StepRequest.model_validate(values | changes)


def run(asked: StepRequest, session: RaySession):
    return run_step(asked, PrintReporter(), session)


def test_a_result_is_found_only_by_the_same_request(tmp_path: Path, ray_session: RaySession) -> None:
    asked = request(tmp_path)
    assert find_result(asked) is None
    result = run(asked, ray_session)
    assert not result.reused
    found = find_result(asked)
    assert found is not None
    assert found.reused
    assert found.outputs == result.outputs
    assert storage.read_bytes(found.outputs["value"].file_uri("value.txt")) == b"1"
    assert find_result(request(tmp_path, params={"action": "write", "value": 2})) is None
    assert find_result(request(tmp_path, code_version="other")) is None
    a = Artifact(uri="x", digest="1")
    assert find_result(request(tmp_path, inputs={"in": a})) is None
    assert run(asked, ray_session).reused


def test_an_old_manifest_or_a_lost_output_is_not_reused(tmp_path: Path, ray_session: RaySession) -> None:
    result = run(request(tmp_path), ray_session)
    later = datetime.now(UTC) + timedelta(seconds=1)
    assert find_result(request(tmp_path, not_before=later)) is None
    assert find_result(request(tmp_path, not_before=later - timedelta(hours=1))) is not None
    Path(result.outputs["value"].file_uri("value.txt")).unlink()
    assert find_result(request(tmp_path)) is None
    assert not run(request(tmp_path), ray_session).reused


def test_a_damaged_manifest_counts_as_none(tmp_path: Path, ray_session: RaySession) -> None:
    asked = request(tmp_path)
    run(asked, ray_session)
    manifest = Path(asked.manifest_uri)
    manifest.write_text(manifest.read_text()[:100])
    assert find_result(asked) is None
    assert not run(asked, ray_session).reused


@pytest.mark.parametrize(("action", "error"), [("reject", StepError), ("raise", RuntimeError)])
def test_a_failure_leaves_no_manifest_and_no_attempt(
    tmp_path: Path, ray_session: RaySession, action: str, error: type[Exception]
) -> None:
    asked = request(tmp_path, action)
    with pytest.raises(error):
        run(asked, ray_session)
    assert find_result(asked) is None
    left = [u.removeprefix(asked.output_uri) for u in storage.list_files(asked.output_uri)]
    assert left == (["/failed/bad.txt"] if action == "reject" else [])


def test_where_inputs_lie_does_not_matter_but_what_they_hold_does(tmp_path: Path) -> None:
    def digest(uri: str, content: str) -> str:
        return request(tmp_path, inputs={"in": Artifact(uri=uri, digest=content)}).digest

    assert digest("here", "1") == digest("there", "1")
    assert digest("here", "1") != digest("here", "2")


def test_wrong_parameters_inputs_and_steps_are_named(tmp_path: Path, ray_session: RaySession) -> None:
    with pytest.raises(StepError, match=r"value: Input should be a valid integer.*got 'x'"):
        run(request(tmp_path, params={"value": "x"}), ray_session)
    with pytest.raises(StepError, match=r"needs the inputs \['train', 'validation', 'statistics'\]"):
        run(request(tmp_path, step="tune_model"), ray_session)
    with pytest.raises(StepError, match=r"there is no step step_scripts\.nothing"):
        run(request(tmp_path, step="nothing"), ray_session)


def test_the_digest_of_an_artifact_is_that_of_its_content() -> None:
    def file(path: str, sha: str) -> FileInfo:
        return FileInfo(path=path, bytes=1, sha256=sha, rows=2)

    one = Artifact.of("u", [file("b", "2"), file("a", "1")])
    two = Artifact.of("v", [file("a", "1"), file("b", "2")])
    assert one.digest == two.digest
    assert one.rows == 4
    assert one.file_uris() == ["u/a", "u/b"]
    assert Artifact.of("u", [file("a", "2"), file("b", "1")]).digest != one.digest
    with pytest.raises(KeyError, match="c is not part of u"):
        one.file_uri("c")
