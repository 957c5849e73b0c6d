"""Requests, digests, manifests: what is reused, what is not, and what a failure leaves."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step_scripts.runner import contract, local_files, storage
from step_scripts.runner.code_version import step_version
from step_scripts.runner.contract import (
    Artifact,
    DamagedArtifactError,
    FileInfo,
    StepError,
    StepRequest,
    check_files,
    file_info,
)
from step_scripts.runner.execution import PrintReporter, find_result, run_step
from step_scripts.runner.ray_session import RaySession
from tests.source_steps import CollectingReporter

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
    again = run(asked, ray_session)
    assert again.reused
    # To the order of names, which is that of metadata and of the columns of tables.
    fresh = result.model_copy(update={"reused": True})
    assert list(fresh.details) == ["ray_address", "driver"]
    assert [found.model_dump_json(), again.model_dump_json()] == [fresh.model_dump_json()] * 2


def test_an_old_manifest_or_a_lost_output_is_not_reused(tmp_path: Path, ray_session: RaySession) -> None:
    result = run(request(tmp_path), ray_session)
    later = datetime.now(UTC) + timedelta(seconds=1)
    assert find_result(request(tmp_path, not_before=later)) is None
    assert find_result(request(tmp_path, not_before=later - timedelta(hours=1))) is not None
    Path(result.outputs["value"].file_uri("value.txt")).unlink()
    assert find_result(request(tmp_path)) is None
    assert not run(request(tmp_path), ray_session).reused


@pytest.mark.parametrize("damage", [b"", b"12", b"2"], ids=["cut to nothing", "longer", "other content"])
def test_a_damaged_result_is_made_again_with_a_warning_that_names_the_file(
    tmp_path: Path, ray_session: RaySession, damage: bytes
) -> None:
    path = Path(run(request(tmp_path), ray_session).outputs["value"].file_uri("value.txt"))
    path.write_bytes(damage)
    reporter = CollectingReporter()
    again = run_step(request(tmp_path), reporter, ray_session)
    assert not again.reused
    assert Path(again.outputs["value"].file_uri("value.txt")).read_bytes() == b"1"
    assert [text for text in reporter.warnings if str(path) in text and "made again" in text]
    assert run(request(tmp_path), ray_session).reused


def test_a_damaged_input_is_named_before_the_step_runs(tmp_path: Path, ray_session: RaySession) -> None:
    made = run(request(tmp_path), ray_session).outputs["value"]
    asked = request(tmp_path, inputs={"rows": made}, params={"action": "write", "marker": str(tmp_path / "ran")})
    Path(made.file_uri("value.txt")).write_bytes(b"")
    with pytest.raises(StepError, match=r"input rows .* is damaged: .*value\.txt has 0 bytes, recorded were 1\. Mater"):
        run(asked, ray_session)
    assert not (tmp_path / "ran").exists()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(4, 40), min_size=1, max_size=4), data=st.data())
def test_any_damage_of_a_file_is_found(tmp_path: Path, sizes: list[int], data: st.DataObject) -> None:
    """Cut, removed, with another byte: in small files any byte, in large ones those at the end."""
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    paths = [folder / f"{index}.parquet" for index in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(bytes(size) + b"PAR1")
    artifact = Artifact.of(str(folder), [file_info(str(path), str(folder)) for path in paths])
    check_files(artifact)
    damaged = data.draw(st.sampled_from(paths))
    content = bytearray(damaged.read_bytes())
    match data.draw(st.sampled_from(["cut", "removed", "changed", "end of a large file"])):
        case "cut":
            damaged.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        case "removed":
            damaged.unlink()
        case "changed":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1
            damaged.write_bytes(content)
        case _:
            damaged.write_bytes(content[:-4] + bytes(4))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(contract, "_SMALL_FILE", 0)
                with pytest.raises(DamagedArtifactError, match=f"{damaged} does not end as a Parquet file"):
                    check_files(artifact)
    for contents in ("small", "local", "all"):
        with pytest.raises(DamagedArtifactError, match=str(damaged)):
            check_files(artifact, contents)


def test_files_and_their_folders_are_synced_before_the_manifest_is_written(
    tmp_path: Path, ray_session: RaySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[Path] = []
    sync = storage.sync_path

    def noted(path: Path) -> None:
        order.append(path)
        sync(path)

    for module in (storage, local_files):
        monkeypatch.setattr(module, "sync_path", noted)
    asked = request(tmp_path)
    result = run(asked, ray_session)
    monkeypatch.undo()
    file = Path(result.outputs["value"].file_uri("value.txt"))
    assert order[-1] == Path(asked.manifest_uri).parent  # after the manifest's renaming
    needed = {file, *(folder for folder in file.parents if folder.is_relative_to(tmp_path))}
    assert needed <= set(order[:-1])


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
