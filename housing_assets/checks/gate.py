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
from enum import IntEnum
from typing import Any

import dagster as dg

from housing_assets.checks.alerts import finished_checks
from housing_assets.code_location import definitions
from resources.feature_store.base import OfflineSnapshot
from resources.model_registry.base import GateEvidence, ModelVersion
from resources.references.evidence import Evidence, EvidenceStore, EvidenceUnreadable, Judged
from resources.references.io_manager import event_log_name
from resources.references.types import EvaluationRef, ModelRef, SnapshotRef, SourceRef, SplitRef
from step_scripts.runner import storage
from step_scripts.runner.wording import listed

GATE_CHECK = "rmse_threshold"  # the function in `checks.model`
# In the metadata of a blocking check's result: what it judged, and where the evidence is.
JUDGED, SUBJECT, EVIDENCE = "judged", "judged_subject", "evidence"
_HISTORY = 1000
_READERS = 16  # requests to S3 at once
_SHOWN = 3
REMEDIES = {
    "raw_csv": "correct the source, then materialize raw_csv and what follows",
    "feature_group": "materialize raw_csv and feature_group again",
    "train_split": "materialize the splits and what follows again",
    "evaluation_report": "improve the model, or materialize evaluation_report with another rmse_threshold",
}


class Rule(IntEnum):
    """Which evaluation decides: of exactly these inputs, or the latest of the same subject. Stricter is higher."""

    EXACT_OR_LATEST = 0
    EXACT = 1
    EXACT_AND_LATEST = 2


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


Standing = SourceRef | OfflineSnapshot | SnapshotRef | SplitRef | ModelRef | EvaluationRef | ModelVersion


def require_checks_passed(
    context: dg.AssetExecutionContext | dg.OpExecutionContext, evidence: EvidenceStore, asset: str, *inputs: Standing
) -> tuple[tuple[Judged, ...], list[Evidence]]:
    """What lets `asset` go on from `inputs`: every blocking check before it in the graph passed for exactly them.

    Returns what the asset stands on (for its own reference), and the evaluations that let it through. Raises
    `dagster.Failure`, naming check, asset, digests, run and remedy, if one failed, has not judged them, is said to have
    ended otherwise by the event log, or if the inputs do not say what they stand on.
    """
    checks = blocking_checks_before(asset)
    rules: dict[str, tuple[Judged, Rule]] = {}  # each judgement once, by the strictest of its rules
    for judged, rule in (need for value in inputs for need in _needs(value)):
        known_rule = rules.get(judged.digest, (judged, rule))[1]
        rules[judged.digest] = judged, max(rule, known_rule)
    known = {judged.asset for judged, _ in rules.values()}
    if missing := sorted({key.asset_key.to_user_string() for key in checks} - known):
        names = " and ".join(missing)
        kinds = ", ".join(dict.fromkeys(type(value).__name__.removesuffix("Ref").lower() for value in inputs))
        raise refusal(
            f"{asset} does not start: its input ({kinds}) does not say which {names} it was made from, so no check of "
            f"{names} vouches for it",
            "materialize it, and what it is made from, again",
        )
    history = {key: list(finished_checks(context.instance, key, limit=_HISTORY)) for key in checks}
    log = event_log_name(context.instance)
    questions = [
        _Question(key, judged, rule, evidence, log, history[key])
        for judged, rule in rules.values()
        for key in checks
        if key.asset_key.to_user_string() == judged.asset
    ]
    with ThreadPoolExecutor(_READERS if storage.is_remote(evidence.root) else 1) as pool:
        answers = [pool.submit(question.ask) for question in questions]
    if refused := [error for answer in answers if isinstance(error := answer.exception(), _Refused)]:
        texts = listed([one.text for one in refused], most=_SHOWN, sign="; ")
        raise refusal(f"{asset} does not start: {texts}", refused[0].remedy)
    return tuple(judged for judged, _ in rules.values()), [one for answer in answers for one in answer.result()]


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
    judged, evaluations = require_checks_passed(context, evidence, "registered_model", model, evaluation, train)
    report = judged_report(evaluation)
    gate = GateEvidence(
        passed=True,
        metric="rmse",
        value=evaluation.metrics["rmse"],
        threshold=evaluation.rmse_threshold,
        evaluation_digest=evaluation.report.digest,
        run_id=next(e.run_id for e in evaluations if e.check == GATE_CHECK and e.judged == report),
    )
    return gate, judged


@functools.cache
def blocking_checks_before(asset: str) -> tuple[dg.AssetCheckKey, ...]:
    """All blocking checks of assets that `asset` is made from, directly or not."""
    graph = definitions().resolve_asset_graph()
    before = graph.get_ancestor_asset_keys(dg.AssetKey(asset))
    return tuple(sorted(key for key in graph.asset_check_keys if key.asset_key in before and graph.get(key).blocking))


def refusal(reason: str, remedy: str) -> dg.Failure:
    """The failure that everything behind the gate raises."""
    return dg.Failure(f"refused by the quality gate: {reason}. Remedy: {remedy}.", allow_retries=False)


_Needs = Iterator[tuple[Judged, Rule]]


def _needs(value: Standing) -> _Needs:
    """What has to have been judged before `value` is used."""
    match value:
        case SourceRef():
            yield judged_source(value.rows.digest), Rule.EXACT
        case OfflineSnapshot():
            if value.dataset is not None:
                yield judged_group(value.group, value.artifact.digest, value.dataset), Rule.EXACT
        case SnapshotRef():
            yield from _of_datasets(value.group, value.digest, [dataset.digest for dataset in value.datasets])
        case SplitRef():
            yield from _carried(value.judged)
            if value.splits:
                yield judged_splits({**value.splits, value.name: value.rows.digest}), Rule.EXACT
        case ModelRef():
            yield from _carried(value.judged)
        case EvaluationRef():
            yield from _carried(value.judged)
            yield judged_report(value), Rule.EXACT
        case ModelVersion():
            yield from _of_version(value)


def _carried(judged: Iterable[Judged]) -> _Needs:
    # Of a group that goes on growing, a dataset is judged with the records that were there at the time.
    return ((one, Rule.EXACT_OR_LATEST if one.asset == "feature_group" else Rule.EXACT) for one in judged)


def _of_datasets(group: str, digest: str, datasets: Sequence[str]) -> _Needs:
    return _carried(j for d in datasets for j in (judged_source(d), judged_group(group, digest, d)))


def judged_report(evaluation: EvaluationRef) -> Judged:
    """What checks of `evaluation_report` judge, by its reference."""
    return judged_evaluation(evaluation.model_digest, evaluation.report.digest, evaluation.rmse_threshold)


def _of_version(version: ModelVersion) -> _Needs:
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
            yield judged_splits({name: str(digest) for name, digest in splits.items()}), Rule.EXACT
    gate = version.gate
    judged = judged_evaluation(version.artifact.digest, gate.evaluation_digest, gate.threshold)
    yield judged, Rule.EXACT_AND_LATEST


class _Refused(Exception):
    """Why something does not go on, and what people can do."""

    def __init__(self, text: str, remedy: str) -> None:
        self.text, self.remedy = text, remedy


@dataclass(frozen=True)
class _Question:
    """Has `check` passed for what was judged, by the evidence in `store`? `history`: what the event log says, `log`."""

    check: dg.AssetCheckKey
    judged: Judged
    rule: Rule
    store: EvidenceStore
    log: str
    history: Sequence[tuple[dg.AssetCheckEvaluation, str]]

    def ask(self) -> list[Evidence]:
        """The evaluations that let it through. Raises `_Refused`."""
        try:
            found = []
            exact = self.store.latest(self.judged, self.check.name)
            if exact is not None or self.rule != Rule.EXACT_OR_LATEST:
                found.append(self._weighed(exact, of_subject=False))
            if self.rule == Rule.EXACT_AND_LATEST or not found:
                latest = self.store.latest(self.judged, self.check.name, of_subject=True)
                found.append(self._weighed(latest, of_subject=True))
        except EvidenceUnreadable as error:
            raise _Refused(f"{self._words}: {error}", self._evaluate) from error
        return found

    def _weighed(self, evidence: Evidence | None, *, of_subject: bool) -> Evidence:
        """The evaluation. Raises `_Refused` if it has not passed, or the event log says something else."""
        logged = self._logged(of_subject)
        folder = self.store.folder_of(self.judged, self.check.name)
        if evidence is None:
            run = f"; {self.log} knows of run {logged[1]}" if logged else f", and {self.log} knows of none"
            reason = f"{self._words} has not judged {self.judged} (no evidence in {folder}{run})"
            raise _Refused(reason, self._evaluate)
        own = f"run {evidence.run_id} of {evidence.at:%Y-%m-%d %H:%M:%S} UTC"
        if logged is not None and logged[0].passed != evidence.passed:
            words = {True: "passed", False: "failed"}
            raise _Refused(
                f"{self._words} {words[evidence.passed]} for {evidence.judged} by the evidence in {folder} ({own}), "
                f"and {words[logged[0].passed]} by {self.log} (run {logged[1]})",
                f"find out which of them is right, then {self._evaluate}",
            )
        if evidence.blocks:
            what = f": {evidence.description}" if evidence.description else ""
            asset = self.judged.asset
            remedy = REMEDIES.get(asset, f"put right what it found, then materialize {asset} again")
            raise _Refused(f"{self._words} failed for {evidence.judged}{what} ({own})", remedy)
        return evidence

    def _logged(self, of_subject: bool) -> tuple[dg.AssetCheckEvaluation, str] | None:
        """The latest finished evaluation that the event log has of these inputs, or of the same subject."""
        name, value = (SUBJECT, self.judged.subject) if of_subject else (JUDGED, self.judged.digest)
        for check, run_id in self.history:
            if name in check.metadata and check.metadata[name].value == value:
                return check, run_id
        return None

    @property
    def _words(self) -> str:
        return f"check {self.check.name} of {self.judged.asset}"

    @property
    def _evaluate(self) -> str:
        return f"materialize {self.judged.asset} with its checks, or execute check {self.check.name} alone in the UI"
