"""The model: search and fit, evaluation, registration."""

from typing import Any

import dagster as dg

from housing_assets.checks.gate import require_checks_passed, require_gate_passed
from housing_assets.config import SLICES, EvaluationConfig, RegistrationConfig, TunedModelConfig
from housing_assets.reporting.lineage import lineage_facts
from housing_assets.reporting.metadata import made_by, materialized, plot_metadata, run_costs
from housing_assets.runs.executor import RAY_POOL
from resources.compute.base import ComputeBackend
from resources.model_registry.base import ModelRegistry, ModelVersion, champion_of
from resources.references.evidence import EvidenceStore
from resources.references.types import EvaluationRef, ModelRef, SplitRef
from resources.services.experiments import ExperimentTracker
from step_scripts.parameters import EvaluateModelParams, TuneModelParams
from step_scripts.runner.code_version import module_version, step_version
from step_scripts.runner.contract import Artifact, DamagedArtifactError, check_files


@dg.asset(group_name="model", kinds={"xgboost", "ray"}, code_version=step_version("tune_model"), pool=RAY_POOL)
def tuned_model(
    context: dg.AssetExecutionContext,
    config: TunedModelConfig,
    train_split: SplitRef,
    validation_split: SplitRef,
    compute: ComputeBackend,
    experiments: ExperimentTracker,
    evidence: EvidenceStore,
) -> dg.MaterializeResult[ModelRef]:
    """The best XGBoost model of a hyperparameter search, with all that is needed to predict from raw features.

    The artifact holds model, scaling statistics, schema, parameters and metrics in open formats. Read by
    `evaluation_report` and, if it passes the gate, by `registered_model`.
    """
    from housing_assets.reporting.plots import importance_plot, learning_curve_plot, load_matplotlib, trials_plot
    from housing_assets.schema import HOUSING_TABLE

    judged, _ = require_checks_passed(context, evidence, "tuned_model", train_split, validation_split)
    assert train_split.statistics is not None
    result = compute.run(
        context,
        "tune_model",
        TuneModelParams(**config.resolved(), table=HOUSING_TABLE),
        {"train": train_split.rows, "validation": validation_split.rows, "statistics": train_split.statistics},
        in_background=load_matplotlib,
    )
    model, details = result.outputs["model"], result.details
    tracked = experiments.try_to_record(result, context.run.run_id, context.log)
    value = ModelRef(
        model=model,
        report=result.outputs["report"],
        metrics=result.metrics,
        parameters=details["best_parameters"],
        request_digest=result.request_digest,
        **made_by(context, result),
        made_at=result.created_at,
        validation_digest=validation_split.rows.digest,
        train=train_split,
        versions=result.versions,
        judged=judged,
    )
    plots = {
        "learning_curve": lambda: learning_curve_plot(details["learning_curve"], HOUSING_TABLE),
        "importance": lambda: importance_plot(details["importance"]),
        "search": lambda: trials_plot(details["trials"]),
    }
    others = {name: value for name, value in details.items() if name not in plots}
    metadata = {**result.metrics, **plot_metadata(context, result, plots), **tracked, **others}
    return materialized(value, model, metadata, result)


@dg.asset(group_name="model", kinds={"xgboost", "ray"}, code_version=step_version("evaluate_model"), pool=RAY_POOL)
def evaluation_report(
    context: dg.AssetExecutionContext,
    config: EvaluationConfig,
    tuned_model: ModelRef,
    train_split: SplitRef,
    test_split: SplitRef,
    compute: ComputeBackend,
    model_registry: ModelRegistry,
    evidence: EvidenceStore,
) -> dg.MaterializeResult[EvaluationRef]:
    """How good the model is on records it never saw: errors, slices, and the comparison with simple baselines.

    `evaluation.json` has the form of SageMaker's model quality reports. The blocking check `rmse_threshold` on this
    asset is the quality gate. Read by `registered_model`.
    """
    from housing_assets.reporting.plots import prediction_plot, residual_plot
    from housing_assets.schema import HOUSING_TABLE

    judged, _ = require_checks_passed(context, evidence, "evaluation_report", tuned_model, train_split, test_split)
    damaged: dict[str, str] = {}
    approved = model_registry.list(config.model_group or model_registry.default_group, "Approved", damaged)
    for reason in damaged.values():
        context.log.warning(f"not compared with: {reason}")
    champion = champion_of(approved, tuned_model.model.digest)
    inputs: dict[str, Artifact] = {
        "model": tuned_model.model,
        "train": train_split.rows,
        "test": test_split.rows,
        **({"champion": champion.artifact} if champion else {}),
    }
    params = EvaluateModelParams(table=HOUSING_TABLE, slices=SLICES)
    result = compute.run(context, "evaluate_model", params, inputs)
    report = result.outputs["report"]
    value = EvaluationRef(
        report=report,
        model_digest=tuned_model.model.digest,
        test_digest=test_split.rows.digest,
        test=test_split.rows,
        metrics=result.metrics,
        rmse_threshold=config.rmse_threshold,
        **made_by(context, result),
        judged=judged,
    )
    details = dict(result.details)
    predictions = details.pop("predictions")
    plots = {
        "predicted_against_actual": lambda: prediction_plot(predictions, HOUSING_TABLE),
        "residuals": lambda: residual_plot(predictions, HOUSING_TABLE),
    }
    metadata: dict[str, Any] = {
        "rmse_threshold": config.rmse_threshold,
        **result.metrics,
        **details,
        **plot_metadata(context, result, plots),
        **({"champion": champion.reference} if champion else {}),
    }
    return materialized(value, report, metadata, result)


@dg.asset(group_name="model", kinds={"xgboost"}, code_version=module_version("step_scripts.model"))
def registered_model(
    context: dg.AssetExecutionContext,
    config: RegistrationConfig,
    tuned_model: ModelRef,
    evaluation_report: EvaluationRef,
    train_split: SplitRef,
    model_registry: ModelRegistry,
    evidence: EvidenceStore,
) -> dg.MaterializeResult[ModelVersion]:
    """A version of the model in the registry, with its metrics, its lineage and its approval status.

    Only a model whose evaluation passed the gate, made from data that passed their checks, is registered, whoever asks
    and whenever. Read by `endpoint`.
    """
    gate, judged = require_gate_passed(context, evidence, tuned_model, evaluation_report, train_split)
    rests_on = {
        "tuned_model": tuned_model.model,
        "evaluation_report": evaluation_report.report,
        "train_split": (tuned_model.train or train_split).rows,
        "test_split": evaluation_report.test,
    }
    for asset, artifact in rests_on.items():
        try:
            if artifact is not None:
                check_files(artifact, "all")
        except DamagedArtifactError as error:
            raise dg.Failure(
                f"{asset} is damaged: {error}. Nothing was registered. Materialize {asset} again, with "
                "HOUSING_CACHE=off, and what follows from it",
                allow_retries=False,
            ) from error
    version = model_registry.register(
        config.model_group or model_registry.default_group,
        tuned_model.model,
        metrics=evaluation_report.metrics,
        gate=gate,
        lineage=lineage_facts(context.run.run_id, train_split, tuned_model, evaluation_report, judged),
        status="Approved" if config.approval == "automatic" else "PendingManualApproval",
    )
    metadata = {
        "model_version": version.reference,
        "version": version.version,
        "approval_status": version.status,
        "rmse": gate.value,
        "rmse_threshold": gate.threshold,
        "lineage": dg.MetadataValue.json(version.lineage),
        **run_costs(context.instance, context.run.run_id),
    }
    return materialized(version, version.artifact, metadata)
