"""Step `tune_model`: a hyperparameter search on Ray Tune, then the final fit, by the engine that was chosen.

Inputs: `train` and `validation` (Parquet files of raw rows), `statistics` (`scaler.json`, `statistics.json`).
Outputs: `model` (see `step_scripts.model`) and `report`:
`trials.json` (a list of `TrialRecord`), `learning_curve.json` (RMSE of both splits by round of the final fit) and
`importance.json` (gain, weight and cover of each feature).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from typing import Any

import numpy as np

from step_scripts.model import save_model, xgb
from step_scripts.parameters import TuneModelParams
from step_scripts.runner import storage
from step_scripts.runner.cluster_resources import node_cpus
from step_scripts.runner.contract import Artifact, StepContext, StepDefinition, StepOutcome, file_info
from step_scripts.runner.wording import counted, number
from step_scripts.training.boosting import History, read_splits, xgboost_parameters
from step_scripts.training.engines import FitRequest, fit
from step_scripts.training.search import run_search
from step_scripts.training.trials import TrialStore, fingerprint

_CURVE_POINTS = 500
_SHOWN_POINTS = 100
_SHOWN_TRIALS = 100
_VERSIONS = ("xgboost", "xgboost-ray", "ray", "optuna", "numpy", "polars")


def run(context: StepContext, params: TuneModelParams) -> StepOutcome:
    """Search, fit, and write model and report. Raises `StepError` for unusable splits or if every trial fails."""
    resolved = params.resolved()
    scaler_json, train, validation = read_splits(context.inputs, params.table)
    store = TrialStore(context.request.shared_checkpoint_uri, fingerprint(params, context.request.origins))

    with context.phase("tune"):
        search = run_search(params, train, validation, store, context.log)
    trials = search.records
    by_rmse = sorted(trials, key=lambda trial: math.inf if trial.rmse is None else trial.rmse)
    best = by_rmse[0]
    context.log.info(
        f"best of {counted(len(trials), 'trial')} in {context.seconds['tune']:.1f} s: {best.describe()}; "
        "now the final fit"
    )
    parameters = xgboost_parameters(best.parameters, resolved["seed"])
    with context.phase("fit"):
        fitted = fit(
            resolved["engine"],
            FitRequest(
                train=train,
                validation=validation,
                parameters=parameters,
                num_boost_round=resolved["num_boost_round"],
                early_stopping_rounds=resolved["early_stopping_rounds"],
                num_workers=resolved["num_workers"] or len(node_cpus()),
                checkpoint_uri=_checkpoint_uri(context),
            ),
            context.log,
        )
    context.log.info(
        f"final fit by {resolved['engine']} with {counted(fitted.num_workers, 'worker')}: validation RMSE "
        f"{number(fitted.validation_rmse)}, train RMSE {number(fitted.train_rmse)}, "
        f"{counted(fitted.history.best_rounds, 'round')}, "
        f"{fitted.seconds:.1f} s, {fitted.history.seconds:.1f} s of it boosting"
    )
    rmse = {"validation_rmse": fitted.validation_rmse, "train_rmse": fitted.train_rmse}
    with context.phase("write"):
        model = save_model(
            context.output_uri("model"),
            booster=fitted.booster,
            scaler=scaler_json,
            table=params.table,
            statistics=json.loads(storage.read_bytes(context.inputs["statistics"].file_uri("statistics.json"))),
            parameters=parameters,
            metrics=rmse | {"rounds": fitted.history.best_rounds},
            versions={name: importlib.metadata.version(name) for name in _VERSIONS},
        )
        importance = feature_importance(fitted.booster)
        report = {
            "trials.json": [t.model_dump(mode="json") for t in trials],
            "learning_curve.json": learning_curve(fitted.history, _CURVE_POINTS),
            "importance.json": importance,
        }
        uri = context.output_uri("report")
        for name, content in report.items():
            storage.write_json(storage.join(uri, name), content)
        files = [file_info(storage.join(uri, name), uri) for name in report]
    return StepOutcome(
        outputs={"model": model, "report": Artifact.of(uri, files)},
        metrics={
            **rmse,
            "best_rounds": float(fitted.history.best_rounds),
            "num_trials": float(len(trials)),
            "trials_failed": float(sum(t.status == "failed" for t in trials)),
            "tuning_seconds": round(context.seconds["tune"], 4),
            "fit_seconds": round(fitted.seconds, 4),
            "boosting_seconds": round(fitted.history.seconds, 4),
        },
        details={
            "best_parameters": best.parameters,
            "best_trial": best.trial,
            "trials": [t.model_dump(mode="json") for t in by_rmse[:_SHOWN_TRIALS]],
            "trials_resumed": search.resumed,
            "search_repeatable": search.repeatable,
            "learning_curve": learning_curve(fitted.history, _SHOWN_POINTS),
            "importance": importance,
            "engine": resolved["engine"],
            "num_workers": fitted.num_workers,
            "nodes": list(fitted.nodes),
            "fit_resumed_at_round": fitted.resumed_at,
        },
    )


def learning_curve(history: History, points: int) -> dict[str, Any]:
    """RMSE by round, thinned to about `points` rounds; the first, the best and the last round are among them."""
    best_rounds, rounds = history.best_rounds, len(history.train)
    thinned = {int(r) for r in np.linspace(1, rounds, min(rounds, max(points - 3, 1)))}
    chosen = sorted(thinned | {1, best_rounds, rounds})
    return {
        "round": chosen,
        "train": [history.train[r - 1] for r in chosen],
        "validation": [history.validation[r - 1] for r in chosen],
        "best_rounds": best_rounds,
    }


def feature_importance(booster: xgb.Booster) -> dict[str, dict[str, float]]:
    """For each feature: mean gain of its splits, their number (`weight`), and rows they saw on average (`cover`)."""
    scores = {kind: booster.get_score(importance_type=kind) for kind in ("gain", "weight", "cover")}
    return {
        name: {kind: float(np.sum(score.get(name, 0.0))) for kind, score in scores.items()}
        for name in booster.feature_names or []
    }


def _checkpoint_uri(context: StepContext) -> str:
    """Where all nodes can keep checkpoints: as the request says, or beside remote outputs; empty: on this machine."""
    if context.attempt_checkpoint_uri is not None:
        return storage.join(context.attempt_checkpoint_uri, "fit")
    return context.output_uri("checkpoints") if storage.is_remote(context.attempt_uri) else ""


STEP = StepDefinition(
    params=TuneModelParams, run=run, inputs=("train", "validation", "statistics"), outputs=("model", "report")
)
