"""The decorator of blocking checks: every result is also stored as evidence, which `gate` reads in later runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import dagster as dg

# Dagster has no public name for it.
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData

from housing_assets.checks.gate import EVIDENCE, JUDGED, SUBJECT
from resources.compute.base import as_metadata
from resources.references.evidence import Evidence, EvidenceStore, Judged


def blocking_check(
    *,
    asset: str,
    judged: Callable[[Mapping[str, Any], dg.AssetCheckResult], Judged],
    name: str | None = None,
    partitions_def: dg.PartitionsDefinition | None = None,
    **more: Any,
) -> Callable[[Callable[..., dg.AssetCheckResult]], dg.AssetChecksDefinition]:
    """`dagster.asset_check` with `blocking=True`: each result is stored as evidence before Dagster records it.

    `judged(arguments, result)` names the data that the check has judged, by digests: a later run may use exactly this
    data, and no other. If the result cannot be stored the check fails, because no asset downstream starts without it.
    """

    def decorate(check: Callable[..., dg.AssetCheckResult]) -> dg.AssetChecksDefinition:
        own = inspect.signature(check, eval_str=True)
        key = dg.AssetCheckKey(dg.AssetKey(asset), name or check.__name__)

        @functools.wraps(check)
        def evaluate(context: dg.AssetCheckExecutionContext, **arguments: Any) -> dg.AssetCheckResult:
            store: EvidenceStore = arguments.pop("evidence")
            result = check(**({"context": context} if "context" in own.parameters else {}), **arguments)
            data, metadata = judged(arguments, result), result.metadata or {}
            values = {n: v.value if isinstance(v, dg.MetadataValue) else v for n, v in metadata.items()}
            uri = store.record(
                Evidence(
                    check=key.name,
                    judged=data,
                    passed=result.passed,
                    severity=result.severity.value,
                    description=result.description or "",
                    figures={n: v for n, v in values.items() if isinstance(v, str | int | float | bool)},
                    run_id=context.run.run_id,
                    at=datetime.now(UTC),
                )
            )
            facts = {JUDGED: data.digest, SUBJECT: data.subject, EVIDENCE: uri}
            kept = result.with_metadata(as_metadata({**metadata, **facts}))
            _record_by_day(context, partitions_def, key, kept)
            return kept

        # Dagster takes inputs and resources from the signature: those of `check`, and `evidence`.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = {
            "context": inspect.Parameter("context", kind, annotation=dg.AssetCheckExecutionContext),
            **own.parameters,
            "evidence": inspect.Parameter("evidence", kind, annotation=EvidenceStore),
        }
        signature = own.replace(parameters=[*parameters.values()])
        evaluate.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        decorator = dg.asset_check(asset=asset, name=key.name, blocking=True, partitions_def=partitions_def, **more)
        return decorator(evaluate)

    return decorate


def _record_by_day(
    context: dg.AssetCheckExecutionContext,
    partitions: dg.PartitionsDefinition | None,
    key: dg.AssetCheckKey,
    result: dg.AssetCheckResult,
) -> None:
    """Record the result for each partition of a run over several days.

    Dagster 1.13 records it once, without a partition; sensor `keep_up_to_date` would wait for the checks for ever.
    """
    run = context.op_execution_context
    if partitions is None or run.has_partition_key or not run.has_partition_key_range:
        return
    days = partitions.get_partition_keys_in_range(run.partition_key_range)  # pyright: ignore[reportAttributeAccessIssue]
    made = dg.AssetRecordsFilter(key.asset_key, asset_partitions=days)
    for record in context.instance.fetch_materializations(made, limit=len(days)).records:
        target = AssetCheckEvaluationTargetMaterializationData(
            storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp
        )
        evaluation = dg.AssetCheckEvaluation(
            asset_key=key.asset_key,
            check_name=key.name,
            passed=result.passed,
            metadata=result.metadata,
            description=result.description,
            severity=result.severity,
            blocking=True,
            partition=record.partition_key,
            target_materialization_data=target,
        )
        # As an event of this run: of those without a run, Dagster can store only one for each partition.
        event = dg.DagsterEvent(
            dg.DagsterEventType.ASSET_CHECK_EVALUATION.value, run.run.job_name, event_specific_data=evaluation
        )
        context.instance.report_dagster_event(event, run_id=run.run_id)
