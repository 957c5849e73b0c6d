"""The gate: whatever stands behind a blocking check asks here first, and is refused unless the check passed.

A failed blocking check stops only the run that it is in, and an event log knows only what its own DAGSTER_HOME has
seen. Every evaluation is therefore kept as evidence below the root, with the digests that it judged
(`resources.references.evidence`), and the latest one for exactly the content at hand decides. No evidence is a refusal;
so is an event log that says something else. An event log that knows nothing of it is no disagreement.

References carry what they stand on (`judged`), and so does the lineage of a registered version.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dagster as dg
from pydantic import BaseModel

from housing_assets.checks.history import finished_checks
from housing_assets.code_location import whole
from resources.feature_store.base import OfflineSnapshot
from resources.model_registry.base import GateEvidence, ModelVersion
from resources.references.evidence import Evidence, EvidenceStore, EvidenceUnreadable, Judged
from resources.references.types import EvaluationRef, ModelRef, SnapshotRef, SourceRef, SplitRef
from step_scripts.runner import storage

GATE_CHECK = "rmse_threshold"
# In the metadata of a blocking check's result: what it judged, and where the evidence is.
JUDGED, SUBJECT, EVIDENCE = "judged", "judged_subject", "evidence"
_HISTORY = 1000
_READERS = 16  # requests to S3 at once
_SHOWN = 3
_TEMPORARY_HOME = ".tmp_dagster_home"  # what Dagster's command line makes where DAGSTER_HOME is not set
REMEDIES = {
    "raw_csv": "correct the source, then materialize raw_csv and what follows",
    "feature_group": "materialize raw_csv and feature_group again",
    "train_split": "materialize the splits and what follows again",
    "evaluation_report": "improve the model, or materialize evaluation_report with another rmse_threshold",
}

# Which evaluation decides: that of exactly these inputs; else the latest about the same subject; or both of them.
Rule = Literal["exact", "exact_or_latest", "exact_and_latest"]


def judged_source(digest: str) -> Judged:
    """What checks of `raw_csv` judge: the validated rows with this digest."""
    return Judged(asset="raw_csv", subject=digest, inputs={"raw_csv": digest})


def judged_group(group: str, digest: str, dataset: str) -> Judged:
    """What checks of `feature_group` judge: its records (`digest`), into which the rows `dataset` were ingested."""
    subject = hashlib.sha256(f"{group}\0{dataset}".encode()).hexdigest()
    return Judged(
        asset="feature_group",
        subject=subject,
        inputs={"group": group, "feature_group": digest, "raw_csv": dataset},
    )


def judged_splits(digests: Mapping[str, str]) -> Judged:
    """What checks of the splits judge: the three of them, by name (`train`, `validation`, `test`)."""
    return Judged(asset="train_split", subject=digests.get("train", ""), inputs=dict(digests))


def judged_evaluation(model: str, evaluation: str, threshold: float) -> Judged:
    """What checks of `evaluation_report` judge: the evaluation of a model, against a threshold."""
    inputs: dict[str, str | float] = {"model": model, "evaluation": evaluation, "threshold": threshold}
    return Judged(asset="evaluation_report", subject=model, inputs=inputs)


@dataclass(frozen=True)
class _Need:
    judged: Judged
    rule: Rule = "exact"


@dataclass(frozen=True)
class Passed:
    """What an asset stands on (for its own reference), and the evaluations that let it through."""

    judged: tuple[Judged, ...]
    evidence: tuple[Evidence, ...]


Standing = SourceRef | OfflineSnapshot | SnapshotRef | SplitRef | ModelRef | EvaluationRef | ModelVersion


def require_checks_passed(
    context: dg.AssetExecutionContext | dg.OpExecutionContext, evidence: EvidenceStore, asset: str, *inputs: Standing
) -> Passed:
    """What lets `asset` go on from `inputs`: every blocking check before it in the graph passed for exactly them.

    Raises `dagster.Failure`, naming check, asset, digests, run and remedy, if one failed, has not judged them, is said
    to have ended otherwise by the event log, or if the inputs do not say what they stand on.
    """
    checks = blocking_checks_before(asset)
    needs = _rules(need for value in inputs for need in _needs(value))
    known = {need.judged.asset for need in needs}
    if missing := sorted({key.asset_key.to_user_string() for key in checks} - known):
        names = " and ".join(missing)
        kinds = ", ".join(dict.fromkeys(_name(value) for value in inputs))
        raise refusal(
            f"{asset} does not start: its input ({kinds}) does not say which {names} it was made from, so no check of "
            f"{names} vouches for it",
            "materialize it, and what it is made from, again",
        )
    pairs = [(need, key) for need in needs for key in checks if key.asset_key.to_user_string() == need.judged.asset]
    logs = {key: list(finished_checks(context.instance, key, limit=_HISTORY)) for key in checks}
    look = functools.partial(_look, evidence, context.instance, logs)
    if storage.is_remote(evidence.root) and len(pairs) > 1:
        with ThreadPoolExecutor(_READERS) as pool:
            results = list(pool.map(look, pairs))
    else:
        results = [look(pair) for pair in pairs]
    if reasons := [result for result in results if isinstance(result, _Refused)]:
        first = reasons[0]
        texts = [reason.text for reason in reasons[:_SHOWN]]
        if len(reasons) > _SHOWN:
            texts.append(f"{len(reasons) - _SHOWN} more")
        raise refusal(f"{asset} does not start: {'; '.join(texts)}", first.remedy)
    found = tuple(item for result in results if not isinstance(result, _Refused) for item in result)
    return Passed(tuple(need.judged for need in needs), found)


def require_gate_passed(
    context: dg.AssetExecutionContext,
    evidence: EvidenceStore,
    model: ModelRef,
    evaluation: EvaluationRef,
    train: SplitRef,
) -> tuple[GateEvidence, tuple[Judged, ...]]:
    """Evidence that `model` passed the gate, and all that the version will stand on.

    Raises `dagster.Failure` if `evaluation` is of another model, or see `require_checks_passed`.
    """
    if evaluation.model_digest != model.model.digest:
        raise refusal(
            f"the evaluation is of model {evaluation.model_digest[:12]}, not of model {model.model.digest[:12]}",
            "materialize evaluation_report again",
        )
    passed = require_checks_passed(context, evidence, "registered_model", model, evaluation, train)
    judged = _of_evaluation(evaluation)
    gate = GateEvidence(
        passed=True,
        metric="rmse",
        value=evaluation.metrics["rmse"],
        threshold=evaluation.rmse_threshold,
        evaluation_digest=evaluation.report.digest,
        run_id=next(e.run_id for e in passed.evidence if e.check == GATE_CHECK and e.judged == judged),
    )
    return gate, passed.judged


@functools.cache
def blocking_checks_before(asset: str) -> tuple[dg.AssetCheckKey, ...]:
    """All blocking checks of assets that `asset` is made from, directly or not."""
    graph = whole().resolve_asset_graph()
    before = graph.get_ancestor_asset_keys(dg.AssetKey(asset))
    return tuple(sorted(key for key in graph.asset_check_keys if key.asset_key in before and graph.get(key).blocking))


def refusal(reason: str, remedy: str) -> dg.Failure:
    """The failure that everything behind the gate raises."""
    return dg.Failure(f"refused by the quality gate: {reason}. Remedy: {remedy}.", allow_retries=False)


def _needs(value: Standing) -> Iterator[_Need]:
    """What has to have been judged before `value` is used."""
    if isinstance(value, SourceRef):
        yield _Need(judged_source(value.rows.digest))
    elif isinstance(value, OfflineSnapshot):
        if value.dataset is not None:
            yield _Need(judged_group(value.group, value.artifact.digest, value.dataset))
    elif isinstance(value, SnapshotRef):
        yield from _of_datasets(value.group, value.digest, [dataset.digest for dataset in value.datasets])
    elif isinstance(value, SplitRef):
        yield from _carried(value.judged)
        if value.splits:
            yield _Need(judged_splits({**value.splits, value.name: value.rows.digest}))
    elif isinstance(value, ModelRef):
        yield from _carried(value.judged)
    elif isinstance(value, EvaluationRef):
        yield from _carried(value.judged)
        yield _Need(_of_evaluation(value))
    else:
        yield from _of_version(value)


def _carried(judged: Iterable[Judged]) -> Iterator[_Need]:
    # Of a group that goes on growing, a dataset is judged with the records that were there at the time.
    return (_Need(one, "exact_or_latest" if one.asset == "feature_group" else "exact") for one in judged)


def _of_datasets(group: str, digest: str, datasets: Sequence[str]) -> Iterator[_Need]:
    return _carried(j for d in datasets for j in (judged_source(d), judged_group(group, digest, d)))


def _of_evaluation(evaluation: EvaluationRef) -> Judged:
    return judged_evaluation(evaluation.model_digest, evaluation.report.digest, evaluation.rmse_threshold)


def _of_version(version: ModelVersion) -> Iterator[_Need]:
    """What its lineage says; of versions that were registered without `judged`, as far as other facts tell."""
    facts: dict[str, Any] = dict(version.lineage)
    if facts.get("judged"):
        yield from _carried(Judged.model_validate(one) for one in facts["judged"])
    else:
        group, datasets = facts.get("feature_group") or {}, facts.get("datasets") or []
        if group:
            yield from _of_datasets(group["group"], group["digest"], [dataset["digest"] for dataset in datasets])
        splits = {name: facts.get(f"{name}_digest") for name in ("train", "validation", "test")}
        if all(splits.values()):
            yield _Need(judged_splits({name: str(digest) for name, digest in splits.items()}))
    gate = version.gate
    judged = judged_evaluation(version.artifact.digest, gate.evaluation_digest, gate.threshold)
    yield _Need(judged, "exact_and_latest")


def _rules(needs: Iterable[_Need]) -> list[_Need]:
    """Each judgement once, by the strictest of its rules."""
    order: Sequence[Rule] = ("exact_or_latest", "exact", "exact_and_latest")
    found: dict[str, _Need] = {}
    for need in needs:
        other = found.get(need.judged.digest)
        if other is None or order.index(need.rule) > order.index(other.rule):
            found[need.judged.digest] = need
    return list(found.values())


@dataclass(frozen=True)
class _Refused:
    text: str
    remedy: str


_Log = Mapping[dg.AssetCheckKey, Sequence[tuple[dg.AssetCheckEvaluation, str]]]


def _look(
    store: EvidenceStore, instance: dg.DagsterInstance, logs: _Log, pair: tuple[_Need, dg.AssetCheckKey]
) -> list[Evidence] | _Refused:
    """The evaluations that let a need through one check, or why they do not."""
    need, key = pair
    try:
        exact = store.latest(need.judged, key.name)
        wanted = [(exact, False)]
        if need.rule == "exact_and_latest" or (need.rule == "exact_or_latest" and exact is None):
            latest = (store.latest(need.judged, key.name, of_subject=True), True)
            wanted = [latest] if exact is None and need.rule == "exact_or_latest" else [*wanted, latest]
    except EvidenceUnreadable as error:
        return _Refused(f"{_check(key)}: {error}", _evaluate(key))
    found = []
    for evidence, of_subject in wanted:
        logged = _logged(logs[key], need.judged, of_subject)
        said = _said(evidence, logged, need.judged, key, store, instance)
        if said is not None:
            return said
        assert evidence is not None
        found.append(evidence)
    return found


def _said(
    evidence: Evidence | None,
    logged: tuple[dg.AssetCheckEvaluation, str] | None,
    judged: Judged,
    key: dg.AssetCheckKey,
    store: EvidenceStore,
    instance: dg.DagsterInstance,
) -> _Refused | None:
    """Why this evaluation does not let anything through; None if it does."""
    log = _event_log(instance)
    if evidence is None:
        where = f"no evidence in {store.folder_of(judged, key.name)}"
        run = f"; {log} knows of run {logged[1]}" if logged else f", and {log} knows of none"
        return _Refused(f"{_check(key)} has not judged {judged} ({where}{run})", _evaluate(key))
    own = f"run {evidence.run_id} of {evidence.at:%Y-%m-%d %H:%M:%S} UTC"
    if logged is not None and logged[0].passed != evidence.passed:
        words = {True: "passed", False: "failed"}
        return _Refused(
            f"{_check(key)} {words[evidence.passed]} for {evidence.judged} by the evidence in "
            f"{store.folder_of(judged, key.name)} ({own}), and {words[logged[0].passed]} by {log} (run {logged[1]})",
            f"find out which of them is right, then {_evaluate(key)}",
        )
    if evidence.blocks:
        what = f": {evidence.description}" if evidence.description else ""
        remedy = REMEDIES.get(judged.asset, f"put right what it found, then materialize {judged.asset} again")
        return _Refused(f"{_check(key)} failed for {evidence.judged}{what} ({own})", remedy)
    return None


def _logged(
    history: Sequence[tuple[dg.AssetCheckEvaluation, str]], judged: Judged, of_subject: bool
) -> tuple[dg.AssetCheckEvaluation, str] | None:
    """The latest finished evaluation that the event log has of these inputs, or of the same subject."""
    name, value = (SUBJECT, judged.subject) if of_subject else (JUDGED, judged.digest)
    for check, run_id in history:
        if name in check.metadata and check.metadata[name].value == value:
            return check, run_id
    return None


def _check(key: dg.AssetCheckKey) -> str:
    return f"check {key.name} of {key.asset_key.to_user_string()}"


def _evaluate(key: dg.AssetCheckKey) -> str:
    asset = key.asset_key.to_user_string()
    return f"materialize {asset} with its checks, or execute check {key.name} alone in the UI"


def _event_log(instance: dg.DagsterInstance) -> str:
    """The event log, as people know it."""
    home = instance.root_directory
    if instance.is_ephemeral or Path(home).name.startswith(_TEMPORARY_HOME):
        return "the event log (DAGSTER_HOME is not set: a new one)"
    return f"the event log of DAGSTER_HOME={home}"


def _name(value: BaseModel) -> str:
    return type(value).__name__.removesuffix("Ref").removesuffix("Offline").lower()
