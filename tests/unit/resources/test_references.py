"""What a step reads: what its own run wrote, or the run that it continues, or else the latest of the event log."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from resources.references.io_manager import ReferenceIOManager
from resources.references.types import DatasetRef
from tests.stored_references import leave

DAYS = dg.DailyPartitionsDefinition("2026-11-01", end_date="2026-11-11")
ROOT = "references"


class Digest(dg.Config):
    digest: str


@dg.asset
def data(config: Digest) -> DatasetRef:
    return DatasetRef(digest=config.digest)


@dg.asset
def model(data: DatasetRef) -> DatasetRef:
    return DatasetRef(digest=f"of {data.digest}")


@dg.asset_check(asset=data)
def known(context: dg.AssetCheckExecutionContext, data: DatasetRef) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True, metadata={"digest": data.digest})


@dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
def rows(config: Digest) -> DatasetRef:
    return DatasetRef(digest=config.digest)


@dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
def group(rows: DatasetRef) -> DatasetRef:
    return DatasetRef(digest=f"of {rows.digest}")


@dg.asset
def split(group: DatasetRef) -> DatasetRef:
    return DatasetRef(digest=f"split of {group.digest}")


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path / "dagster")) as ephemeral:
        yield ephemeral


Materialize = Callable[..., dg.ExecuteInProcessResult]


@pytest.fixture
def materialize(instance: dg.DagsterInstance, tmp_path: Path) -> Materialize:
    """A run over the named assets, by their functions."""

    def run(*selected: Any, digest: str = "", root: str = ROOT, days: str = "", **options: Any) -> Any:
        first, _, last = days.partition("...")
        tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last} if last else {}
        makes = [asset.key.to_user_string() for asset in selected if isinstance(asset, dg.AssetsDefinition)]
        ops = {name: {"config": {"digest": digest}} for name in ("data", "rows") if name in makes}
        return dg.materialize(
            [data, model, rows, group, split, known],
            selection=list(selected),
            instance=instance,
            resources={"io_manager": ReferenceIOManager(root=str(tmp_path / root))},
            run_config={"ops": ops},
            raise_on_error=False,
            partition_key=None if last else (first or None),
            tags=tags,
            **options,
        )

    return run


def value(result: dg.ExecuteInProcessResult, asset: str) -> str:
    assert result.success
    return result.output_for_node(asset).digest


def reason(result: dg.ExecuteInProcessResult) -> str:
    [failure] = [event for event in result.all_events if event.is_step_failure]
    assert failure.step_failure_data.user_failure_data is not None
    return failure.step_failure_data.user_failure_data.description or ""


def test_a_step_reads_what_its_run_wrote_although_another_run_went_through_meanwhile(
    materialize: Materialize, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    theirs: list[dg.ExecuteInProcessResult] = []

    @dg.asset(deps=[data])
    def meanwhile() -> None:
        theirs.append(materialize(data, model, digest="theirs"))

    @dg.asset(deps=[meanwhile])
    def late(data: DatasetRef) -> DatasetRef:
        return DatasetRef(digest=f"of {data.digest}")

    @dg.asset_check(asset=late, additional_ins={"data": dg.AssetIn("data")})
    def late_check(late: DatasetRef, data: DatasetRef) -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=late.digest == f"of {data.digest}")

    ours = dg.materialize(
        [data, meanwhile, late, late_check],
        instance=instance,
        resources={"io_manager": ReferenceIOManager(root=str(tmp_path / ROOT))},
        run_config={"ops": {"data": {"config": {"digest": "ours"}}}},
    )
    assert value(theirs[0], "model") == "of theirs"
    assert value(ours, "late") == "of ours"
    assert [check.passed for check in ours.get_asset_check_evaluations()] == [True]
    # Outside a run the latest counts, whichever run made it; and what was read is recorded.
    [made] = ours.asset_materializations_for_node("data")
    again = materialize(model)
    assert value(again, "model") == "of theirs"
    [read] = again.asset_materializations_for_node("model")
    metadata: Any = {name: found.value for name, found in read.metadata.items()}
    uri = metadata["references_read"]["data"]
    assert f"/data/{theirs[0].run_id}-" in uri
    assert uri != made.metadata["reference"].value
    stored = json.loads(Path(metadata["reference"]).read_text())
    assert stored["read"] == {"data": uri}


def job_that_breaks_while(broken: str, root: str) -> dg.JobDefinition:
    @dg.asset(name="model")
    def fragile(data: DatasetRef) -> DatasetRef:
        if Path(broken).exists():
            raise RuntimeError("broken")
        return DatasetRef(digest=f"of {data.digest}")

    return dg.Definitions(
        [data, fragile],
        jobs=[dg.define_asset_job("both", "*")],
        resources={"io_manager": ReferenceIOManager(root=root)},
        executor=dg.in_process_executor,
    ).resolve_job_def("both")


def test_a_run_that_goes_on_from_a_failure_reads_what_the_failed_run_wrote(
    materialize: Materialize, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    arguments: Any = (str(broken), str(tmp_path / ROOT))
    job = dg.build_reconstructable_job("tests.unit.resources.test_references", "job_that_breaks_while", arguments)
    config = {"ops": {"data": {"config": {"digest": "first"}}}}
    with dg.execute_job(job, instance, config) as failed:
        assert not failed.success
    assert materialize(data, digest="second").success
    broken.unlink()
    options = dg.ReexecutionOptions.from_failure(failed.run_id, instance)
    with dg.execute_job(job, instance, config, reexecution_options=options) as again:
        assert again.success
        [made] = again.asset_materializations_for_node("model")
    assert json.loads(Path(str(made.metadata["reference"].value)).read_text())["value"]["digest"] == "of first"


def test_days_are_read_by_day_together_and_as_the_latest(materialize: Materialize) -> None:
    assert materialize(rows, group, digest="both", days="2026-11-02...2026-11-03").success
    assert materialize(rows, digest="later", days="2026-11-04").success
    assert value(materialize(split), "split") == "split of of both"
    # A day by what was stored for it, by whichever run.
    assert value(materialize(group, days="2026-11-03"), "group") == "of both"
    assert value(materialize(group, days="2026-11-02...2026-11-03"), "group") == "of both"
    assert value(materialize(group, days="2026-11-04"), "group") == "of later"
    assert "of several runs" in reason(materialize(group, days="2026-11-03...2026-11-04"))
    assert re.search("partition 2026-11-05 of rows has not been", reason(materialize(group, days="2026-11-05")))
    # One day through everything: what has no days reads its own run.
    assert value(materialize(rows, group, split, digest="again", days="2026-11-02"), "split") == "split of of again"
    assert value(materialize(split), "split") == "split of of again"
    assert value(materialize(group, days="2026-11-03"), "group") == "of both"


def test_what_nobody_has_made_is_refused_with_the_place_where_it_was_looked_for(
    materialize: Materialize, instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert materialize(data, digest="elsewhere", root="environments/staging/references").success
    instance.report_runless_asset_event(dg.AssetMaterialization("data"))  # by hand, in the UI
    unset = reason(materialize(model))
    assert f"data has not been materialized below {tmp_path / ROOT}" in unset
    assert "because DAGSTER_HOME is not set" in unset
    assert "Materialize data first" in unset
    monkeypatch.setenv("DAGSTER_HOME", "/srv/dagster")
    assert "as far as the event log of DAGSTER_HOME=/srv/dagster knows" in reason(materialize(model))
    gone = leave(instance, str(tmp_path / ROOT), "data", DatasetRef(digest="gone"))
    Path(gone).unlink()
    assert f"{gone}, which the event log names as the reference of data, is gone" in reason(materialize(model))
    other = leave(instance, str(tmp_path / ROOT), "data", Text(text="of another version"))
    assert f"{other} was written by another version of the code" in reason(materialize(model))
    assert value(materialize(data, model, digest="here"), "model") == "of here"


class Text(BaseModel):
    text: str


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["data", "model", "both"]), st.integers(0, 2)), max_size=5))
def test_files_never_change_and_a_reader_gets_the_latest_whatever_ran_before(
    materialize: Materialize, tmp_path: Path, runs: list[tuple[str, int]]
) -> None:
    folder = tmp_path / ROOT
    before = {file: file.read_bytes() for file in folder.rglob("*.json")}
    assert materialize(data, digest="first").success
    latest = "first"
    for selected, digest in runs:
        if selected == "model":
            result = materialize(model)
        elif selected == "data":
            latest = str(digest)
            assert materialize(data, digest=latest).success
            continue
        else:
            latest = str(digest)
            result = materialize(data, model, digest=latest)
        assert value(result, "model") == f"of {latest}"
    assert before.items() <= {file: file.read_bytes() for file in folder.rglob("*.json")}.items()
