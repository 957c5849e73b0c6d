"""The gate: evidence of blocking checks decides whether what stands behind them may start."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from housing_assets import code_location
from housing_assets.assets.ingestion import feature_group
from housing_assets.assets.model import evaluation_report, registered_model, tuned_model
from housing_assets.assets.serving import endpoint
from housing_assets.assets.splits import splits
from housing_assets.automation import jobs
from housing_assets.checks import gate
from housing_assets.checks import splits as splits_checks
from housing_assets.checks.blocking import blocking_check
from housing_assets.config import (
    EndpointConfig,
    EvaluationConfig,
    FeatureGroupConfig,
    RegistrationConfig,
    SplitsConfig,
    TunedModelConfig,
)
from housing_assets.definitions import defs
from resources.feature_store.base import OfflineSnapshot
from resources.inventory import NotOwned
from resources.model_registry.base import ModelVersion, StatusChange
from resources.references.evidence import Evidence, EvidenceStore, EvidenceUnreadable, Judged
from resources.references.types import DatasetRef, EvaluationRef, ModelRef, SnapshotRef, SourceRef, SplitRef
from step_scripts.runner.contract import Artifact, file_info
from tests.feature_rows import TABLE
from tests.serving_models import gate as gate_evidence
from tests.vouching import LINEAGE, record

NAMES = ("train", "validation", "test")
CHECKS = sorted(
    key for key in defs.resolve_asset_graph().asset_check_keys if defs.resolve_asset_graph().get(key).blocking
)


class Started(Exception):
    """An asset went past the gate."""


class Stub:
    """A resource that nobody may use before the gate is passed, but for what it is given."""

    def __init__(self, **known: Any) -> None:
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("_") else Started(name)


def artifact(name: str) -> Artifact:
    return Artifact(uri=f"/nowhere/{name}", digest=f"{name}-digest", rows=10)


JUDGED = {
    "raw_csv": gate.judged_source("rows-digest"),
    "feature_group": gate.judged_group("sales", "group-digest", "rows-digest"),
    "train_split": gate.judged_splits({name: f"{name}-digest" for name in NAMES}),
    "evaluation_report": gate.judged_evaluation("model-digest", "evaluation-digest", 15000.0),
}
DATA = (JUDGED["raw_csv"], JUDGED["feature_group"])
RAW = SourceRef(
    source="x", table=TABLE, rows=artifact("rows"), rejected=artifact("rejected"), rows_total=10, rows_rejected=0
)
GROUP = OfflineSnapshot(group="sales", artifact=artifact("group"), deduplicate=True, commit=1, dataset="rows-digest")
READ = SnapshotRef(group="sales", commit=1, digest="group-digest", datasets=(DatasetRef(digest="rows-digest"),))
SPLITS = {
    name: SplitRef(
        name=name, rows=artifact(name), fraction=0.3, configured_fraction=0.3, judged=DATA,
        statistics=artifact("statistics"), splits={other: f"{other}-digest" for other in NAMES},
    )
    for name in NAMES
}  # fmt: skip
MODEL = ModelRef(
    model=artifact("model"), report=artifact("report"), metrics={}, parameters={}, request_digest="r",
    judged=(*DATA, JUDGED["train_split"]),
)  # fmt: skip
EVALUATION = EvaluationRef(
    report=artifact("evaluation"), model_digest="model-digest", test_digest="test-digest", metrics={"rmse": 5000.0},
    rmse_threshold=15000.0, judged=(*DATA, JUDGED["train_split"]),
)  # fmt: skip
VERSION = ModelVersion(
    group="housing", version=1, artifact=artifact("model"), status="PendingManualApproval", metrics={},
    status_history=(StatusChange(status="PendingManualApproval", who="x", why="y", when=datetime.now(UTC)),),
    gate=gate_evidence(evaluation="evaluation-digest"), lineage=LINEAGE, created_at=datetime.now(UTC),
)  # fmt: skip


@dataclass
class Root:
    """A root's evidence, the event log that a run sees, and references that can be exchanged."""

    store: EvidenceStore
    instance: dg.DagsterInstance
    values: dict[str, Any] = field(
        default_factory=lambda: {
            "raw_csv": RAW, "feature_group": GROUP, "read": READ, "model": MODEL, "evaluation": EVALUATION,
            "version": VERSION, **SPLITS,
        }
    )  # fmt: skip

    def start(self, asset: str) -> None:
        """Let the asset start. Raises `Started`, or what the gate says."""
        try:
            list(STARTS[asset](self) or ())
        except FileNotFoundError as error:  # of the artifacts, which are nowhere
            raise Started(str(error)) from error

    def context(self) -> Any:
        return dg.build_asset_context(instance=self.instance)


STARTS: dict[str, Callable[[Root], Any]] = {
    "feature_group": lambda r: feature_group(
        r.context(), FeatureGroupConfig(), raw_csv=r.values["raw_csv"], compute=Stub(),
        feature_store=Stub(name_suffix=""), evidence=r.store,
    ),
    "splits": lambda r: splits(
        r.context(), SplitsConfig(), feature_group=r.values["feature_group"], compute=Stub(),
        feature_store=Stub(snapshot_lineage=lambda snapshot: r.values["read"]), evidence=r.store,
    ),
    "tuned_model": lambda r: tuned_model(
        r.context(), TunedModelConfig(), train_split=r.values["train"], validation_split=r.values["validation"],
        compute=Stub(), experiments=Stub(), evidence=r.store,
    ),
    "evaluation_report": lambda r: evaluation_report(
        r.context(), EvaluationConfig(), tuned_model=r.values["model"], train_split=r.values["train"],
        test_split=r.values["test"], compute=Stub(), model_registry=Stub(), evidence=r.store,
    ),
    "registered_model": lambda r: registered_model(
        r.context(), RegistrationConfig(), tuned_model=r.values["model"], evaluation_report=r.values["evaluation"],
        train_split=r.values["train"], model_registry=Stub(default_group="housing"), evidence=r.store,
    ),
    "endpoint": lambda r: endpoint(
        r.context(), EndpointConfig(), registered_model=r.values["version"], test_split=r.values["test"],
        model_registry=Stub(get=lambda group, number: r.values["version"]), endpoint_host=Stub(default_name="housing"),
        evidence=r.store,
    ),
    "endpoint, rolled back": lambda r: endpoint(
        r.context(), EndpointConfig(rollback=True), registered_model=r.values["version"], test_split=r.values["test"],
        model_registry=Stub(get=lambda group, number: r.values["version"]),
        endpoint_host=Stub(default_name="housing", describe=lambda name: Stub(previous_version="housing/1")),
        evidence=r.store,
    ),
    "approve": lambda r: jobs.approve(
        dg.build_op_context(instance=r.instance), jobs.DecisionConfig(version=1, who="ann", why="good"),
        model_registry=Stub(default_group="housing", get=lambda group, number: r.values["version"]),
        evidence=r.store,
    ),
}  # fmt: skip
# The asset of the graph whose checks before it count, where it has another name.
OF_GRAPH = {"splits": "train_split", "endpoint, rolled back": "endpoint", "approve": "endpoint"}
PAIRS = [(start, key) for start in STARTS for key in gate.blocking_checks_before(OF_GRAPH.get(start, start))]


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


@pytest.fixture
def root(tmp_path: Path, instance: dg.DagsterInstance) -> Root:
    """Everything has been judged, and everything passed."""
    store = EvidenceStore(root=str(tmp_path / "evidence"))
    for key in CHECKS:
        if judged := JUDGED.get(key.asset_key.to_user_string()):
            record(store, judged, key.name)
    return Root(store, instance)


def logged(root: Root, judged: Judged, check: str, *, passed: bool) -> None:
    """What another run of this event log has said."""
    root.instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey(judged.asset), check_name=check, passed=passed, blocking=True,
            metadata={gate.JUDGED: judged.digest, gate.SUBJECT: judged.subject},
        )
    )  # fmt: skip


def refused(root: Root, start: str, *words: str) -> str:
    with pytest.raises(dg.Failure) as caught:
        root.start(start)
    text = caught.value.description or ""
    assert "refused by the quality gate" in text
    assert "Remedy: " in text
    for word in words:
        assert word in text
    return text


def test_all_assets_behind_blocking_checks_are_known_here() -> None:
    graph = defs.resolve_asset_graph()
    behind = {
        key.to_user_string() for key in graph.get_all_asset_keys() if gate.blocking_checks_before(key.to_user_string())
    }
    started = set(STARTS) - set(OF_GRAPH) | {f"{name}_split" for name in NAMES}
    assert behind == started, "an asset that is new behind a blocking check needs a line in STARTS"
    for name in behind:
        needed = defs.get_assets_def(name).required_resource_keys
        assert "evidence" in needed, f"{name} cannot ask the gate"


def test_every_blocking_check_leaves_evidence() -> None:
    made = {key: checks for checks in defs.asset_checks or () for key in checks.check_keys}
    for key in CHECKS:
        assert "evidence" in made[key].required_resource_keys, f"{key.name}: use blocking_check"


@pytest.mark.parametrize("start", STARTS)
def test_what_passed_all_checks_starts(root: Root, start: str) -> None:
    with pytest.raises(Started):
        root.start(start)


@pytest.mark.parametrize(("start", "key"), PAIRS, ids=lambda v: v if isinstance(v, str) else v.name)
def test_each_asset_is_refused_for_each_check_before_it(root: Root, start: str, key: dg.AssetCheckKey) -> None:
    asset = key.asset_key.to_user_string()
    judged = JUDGED[asset]
    check = f"check {key.name} of {asset}"
    record(root.store, judged, key.name, passed=False, run="run-that-failed")
    digest = str(next(value for name, value in judged.inputs.items() if name != "group"))[:12]
    refused(root, start, f"{check} failed", digest, "run-that-failed", "as the test says")

    record(root.store, judged, key.name, passed=True)
    with pytest.raises(Started):
        root.start(start)

    for item in root.store.inventory():
        if item.name == f"evidence of {asset}/{key.name}":
            root.store.remove(item)
    refused(root, start, f"{check} has not judged", digest, "DAGSTER_HOME is not set")


@pytest.mark.parametrize("start", STARTS)
def test_an_event_log_that_says_something_else_is_a_disagreement(root: Root, start: str) -> None:
    [*_, key] = gate.blocking_checks_before(OF_GRAPH.get(start, start))
    judged = JUDGED[key.asset_key.to_user_string()]
    logged(root, judged.model_copy(update={"subject": "another", "inputs": {"x": "other"}}), key.name, passed=False)
    logged(root, judged, key.name, passed=True)
    with pytest.raises(Started):
        root.start(start)
    logged(root, judged, key.name, passed=False)
    text = refused(root, start, f"check {key.name}", "passed for", "failed by the event log", "run-check")
    assert root.store.root in text


def test_a_new_blocking_check_is_not_passed_over(root: Root) -> None:
    """Of an asset that is known, it counts at once; of another, nobody behind it starts."""

    @blocking_check(asset="train_split", judged=splits_checks._judged)
    def new_one(train_split: SplitRef) -> dg.AssetCheckResult:
        """New."""
        return dg.AssetCheckResult(passed=True)

    @blocking_check(asset="tuned_model", judged=lambda given, _: gate.judged_source(given["tuned_model"].model.digest))
    def another(tuned_model: ModelRef) -> dg.AssetCheckResult:
        """New."""
        return dg.AssetCheckResult(passed=True)

    for check, starts, words in (
        (new_one, ("tuned_model", "endpoint"), "check new_one of train_split has not judged"),
        (another, ("evaluation_report", "endpoint"), "does not say which tuned_model it was made from"),
    ):
        more = dg.Definitions.merge(defs, dg.Definitions(asset_checks=[check]))
        code_location.register(more)
        gate.blocking_checks_before.cache_clear()
        try:
            for start in starts:
                refused(root, start, words)
        finally:
            code_location.register(defs)
            gate.blocking_checks_before.cache_clear()


def test_references_that_do_not_say_what_they_stand_on_are_refused(root: Root) -> None:
    old = {name: split.model_copy(update={"judged": (), "splits": {}}) for name, split in SPLITS.items()}
    root.values |= old
    refused(root, "tuned_model", "does not say which feature_group and raw_csv and train_split")
    root.values["version"] = VERSION.model_copy(update={"lineage": {"run_id": "run-1"}})
    refused(root, "endpoint", "does not say which feature_group")


def test_another_split_than_those_judged_is_refused(root: Root) -> None:
    root.values["test"] = SPLITS["test"].model_copy(update={"rows": artifact("other")})
    refused(root, "evaluation_report", "check no_leakage of train_split has not judged", "other-digest")


def test_an_evaluation_of_another_model_is_refused(root: Root) -> None:
    root.values["evaluation"] = EVALUATION.model_copy(update={"model_digest": "another"})
    refused(root, "registered_model", "the evaluation is of model another")


def test_a_later_evaluation_of_the_same_model_counts_for_serving(root: Root) -> None:
    """And not for the registration of the evaluation that passed."""
    record(root.store, gate.judged_evaluation("model-digest", "evaluation-digest", 1.0), gate.GATE_CHECK, passed=False)
    with pytest.raises(Started):
        root.start("registered_model")
    for start in ("endpoint", "endpoint, rolled back", "approve"):
        refused(root, start, "check rmse_threshold of evaluation_report failed", "threshold 1")
    record(root.store, JUDGED["evaluation_report"], gate.GATE_CHECK)
    with pytest.raises(Started):
        root.start("endpoint")


def test_datasets_of_a_growing_group_are_judged_with_the_records_of_their_time(root: Root) -> None:
    """A day's rows were reconciled when the group was smaller; the latest day's with what it holds now."""
    grown = {"artifact": artifact("grown"), "dataset": "day2"}
    root.values["feature_group"] = GROUP.model_copy(update=grown)
    datasets = (DatasetRef(digest="rows-digest"), DatasetRef(digest="day2"))
    root.values["read"] = READ.model_copy(update={"digest": "grown-digest", "datasets": datasets})
    record(root.store, gate.judged_source("day2"), "schema")
    refused(root, "splits", "check reconciliation of feature_group has not judged", "day2")
    record(root.store, gate.judged_group("sales", "grown-digest", "day2"), "reconciliation")
    with pytest.raises(Started):
        root.start("splits")
    record(root.store, JUDGED["feature_group"], "reconciliation", passed=False)
    refused(root, "splits", "check reconciliation of feature_group failed", "rows-digest")
    record(root.store, gate.judged_group("sales", "grown-digest", "rows-digest"), "reconciliation")
    with pytest.raises(Started):
        root.start("splits")


def test_a_leak_stops_later_runs_of_any_dagster_home(tmp_path: Path) -> None:
    """The check itself, on files: 30 records of train are in test."""
    store = EvidenceStore(root=str(tmp_path / "evidence"))

    def split(name: str, ids: list[int]) -> SplitRef:
        folder = tmp_path / f"{name}-{len(ids)}"
        folder.mkdir(exist_ok=True)
        pl.DataFrame({"record_id": [f"{n:032x}" for n in ids]}).write_parquet(folder / "part.parquet")
        rows = Artifact.of(str(folder), [file_info(f"{folder}/part.parquet", str(folder), rows=len(ids))])
        return SPLITS[name].model_copy(update={"rows": rows, "fraction": 0.3, "configured_fraction": 0.3})

    def judge(test_ids: list[int]) -> Root:
        made = {
            "train": split("train", list(range(100))), "validation": split("validation", list(range(100, 200))),
            "test": split("test", test_ids),
        }  # fmt: skip
        digests = {name: value.rows.digest for name, value in made.items()}
        made = {name: value.model_copy(update={"splits": digests}) for name, value in made.items()}

        @dg.multi_asset(outs={f"{name}_split": dg.AssetOut(dagster_type=SplitRef) for name in NAMES})
        def given_splits():  # a type would have to name all three
            return tuple(made.values())

        with dg.DagsterInstance.ephemeral() as log:
            done = dg.materialize(
                [given_splits, splits_checks.no_leakage, splits_checks.split_fractions],
                resources={"evidence": store}, instance=log, raise_on_error=False,
            )  # fmt: skip
            assert done.success == (len(test_ids) == 100), "a failed blocking check fails its own run"
        for asset, check in (("raw_csv", "schema"), ("feature_group", "reconciliation")):
            record(store, JUDGED[asset], check)
        return Root(store, dg.DagsterInstance.ephemeral(), {**made, "model": MODEL, "evaluation": EVALUATION})

    leaking = judge([*range(200, 300), *range(30)])
    text = refused(
        leaking, "tuned_model", "check no_leakage of train_split failed", "records in more than one split: 30"
    )
    assert leaking.values["train"].rows.digest[:12] in text
    refused(leaking, "evaluation_report", "check no_leakage of train_split failed")
    clean = judge(list(range(200, 300)))
    with pytest.raises(Started):
        clean.start("tuned_model")
    refused(leaking, "tuned_model", "check no_leakage of train_split failed")


def evaluation(passed: bool, at: datetime, run: str, threshold: float = 1.0) -> Evidence:
    judged = gate.judged_evaluation("m", "e", threshold)
    return Evidence(check="c", judged=judged, passed=passed, severity="ERROR", run_id=run, at=at)


NOW = datetime(2026, 11, 1, tzinfo=UTC)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.booleans(), st.integers(-(10**6), 10**6), st.sampled_from([1.0, 2.0])), min_size=1))
def test_the_latest_written_counts_whatever_the_clocks_say(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[bool, int, float]]
) -> None:
    store = EvidenceStore(root=str(tmp_path_factory.mktemp("evidence")))
    for n, (passed, seconds, threshold) in enumerate(made):
        store.record(evaluation(passed, NOW + timedelta(seconds=seconds), f"run-{n}", threshold))
    for threshold in {threshold for *_, threshold in made}:
        last = max(n for n, (*_, t) in enumerate(made) if t == threshold)
        found = store.latest(gate.judged_evaluation("m", "e", threshold), "c")
        assert found is not None
        assert (found.run_id, found.passed) == (f"run-{last}", made[last][0])
    anything = store.latest(gate.judged_evaluation("m", "other", 3.0), "c", of_subject=True)
    assert anything is not None
    assert anything.run_id == f"run-{len(made) - 1}"
    assert store.latest(gate.judged_evaluation("m", "other", 3.0), "c") is None
    assert len(list(store.stored())) == len({threshold for *_, threshold in made}), "what is superseded is removed"


def test_runs_at_once_lose_no_result_and_readers_always_find_one(tmp_path: Path) -> None:
    store = EvidenceStore(root=str(tmp_path))
    store.record(evaluation(True, NOW, "first"))

    def work(n: int) -> str:
        if n % 2:
            store.record(evaluation(True, NOW + timedelta(seconds=random.randrange(9)), f"run-{n}"))
            return "written"
        found = store.latest(gate.judged_evaluation("m", "e", 1.0), "c")
        return found.run_id if found else "nothing"

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(200)))
    assert "nothing" not in results
    store.record(evaluation(False, NOW, "last"))
    found = store.latest(gate.judged_evaluation("m", "e", 1.0), "c")
    assert found is not None
    assert found.run_id == "last"


def test_a_damaged_file_is_named_and_refused_until_the_check_is_evaluated_again(root: Root) -> None:
    [damaged] = [uri for uri, _, found in root.store.stored() if found and found.check == "schema"]
    Path(damaged).write_text('{"check": "schema", "passed": tr')
    refused(root, "feature_group", damaged, "execute check schema")
    with pytest.raises(EvidenceUnreadable):
        root.store.latest(JUDGED["raw_csv"], "schema")
    record(root.store, JUDGED["raw_csv"], "schema")
    with pytest.raises(Started):
        root.start("feature_group")


def test_a_failure_that_only_warns_does_not_block(root: Root) -> None:
    warned = Evidence(
        check="schema", judged=JUDGED["raw_csv"], passed=False, severity="WARN", run_id="r", at=datetime.now(UTC)
    )
    root.store.record(warned)
    with pytest.raises(Started):
        root.start("feature_group")


def test_only_evidence_is_listed_and_removed(root: Root) -> None:
    place = Path(root.store.root)
    foreign = place / "raw_csv" / "schema" / "rows-digest" / "notes.json"
    foreign.write_text(json.dumps({}))
    names = {item.name for item in root.store.inventory()}
    assert {"evidence of raw_csv/schema", "evidence of train_split/no_leakage"} <= names
    items = root.store.inventory()
    for item in items:
        root.store.remove(item)
        root.store.remove(item)
    assert root.store.inventory() == []
    assert [path for path in place.rglob("*") if path.is_file()] == [foreign]
    with pytest.raises(NotOwned):
        root.store.remove(items[0].model_copy(update={"location": str(place.parent)}))
