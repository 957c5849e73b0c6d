"""How long does the whole graph take, compared with one script that uses polars, Optuna and XGBoost directly?

`python -m benchmarks.plain_script [--rows 10000] [--trials 8] [--rounds 1500] [--all-rounds]`. The script validates,
finds duplicates, writes a store and splits, searches in the same ranges with early stopping and successive halving,
fits, evaluates and saves the model. It has no checks, history, cache, registry or endpoint. Which trials are stopped
early, and how deep the trees are that are tried, is partly luck and differs between the two; with `--all-rounds` no
trial is stopped and all trees have a depth of 6, so that both do the same work.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.ingestion import polars_splits
from benchmarks.measuring import Side, compare, parser, stopwatch
from benchmarks.steps import TARGET
from benchmarks.whole_graph import whole_run
from housing_assets.sample_data import write_sample


def script(source: str, trials: int, rounds: int, all_rounds: bool = False) -> dict[str, Any]:
    """The plain script, from CSV to a saved and evaluated model."""
    import numpy as np
    import optuna
    import polars as pl
    import xgboost as xgb
    from xgboost.callback import TrainingCallback

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    threads, patience = os.cpu_count() or 1, rounds if all_rounds else 50
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as name, stopwatch(figures):
        folder = Path(name)
        _, statistics = polars_splits(source, folder)
        features = [
            key.removesuffix("_mean") for key in statistics if key.endswith("_mean") and key != f"{TARGET}_mean"
        ]

        def split(name: str) -> tuple[Any, Any]:
            frame = pl.read_parquet(folder / f"{name}.parquet")
            scaled = frame.select(
                ((pl.col(f).cast(pl.Float64) - statistics[f"{f}_mean"]) / (statistics[f"{f}_scale"] or 1.0)).cast(
                    pl.Float32
                )
                for f in features
            )
            return scaled.to_numpy(), frame[TARGET].cast(pl.Float32).to_numpy()

        train = xgb.QuantileDMatrix(*split("train"), nthread=threads)
        validation = xgb.QuantileDMatrix(*split("validation"), ref=train, nthread=threads)

        class Prune(TrainingCallback):
            def __init__(self, trial: optuna.Trial) -> None:
                super().__init__()
                self._trial = trial

            def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
                self._trial.report(evals_log["validation"]["rmse"][-1], epoch)
                return self._trial.should_prune()

        def fit(parameters: dict[str, Any], callbacks: list[Any]) -> tuple[xgb.Booster, float]:
            fixed = {"objective": "reg:squarederror", "tree_method": "hist", "seed": 42, "nthread": threads}
            booster = xgb.train(
                parameters | fixed,
                train,
                rounds,
                evals=[(validation, "validation")],
                early_stopping_rounds=patience,
                verbose_eval=False,
                callbacks=callbacks,
            )
            return booster, float(booster.best_score)

        def objective(trial: optuna.Trial) -> float:
            parameters = {
                "max_depth": trial.suggest_int("max_depth", 6 if all_rounds else 1, 6),
                "eta": trial.suggest_float("eta", 0.03, 0.2, log=True),
                "min_child_weight": trial.suggest_float("min_child_weight", 0.0, 10.0),
                "subsample": trial.suggest_float("subsample", 0.6, 1.0),
            }
            return fit(parameters, [Prune(trial)])[1]

        halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, rounds // 8), reduction_factor=3)
        pruner = optuna.pruners.NopPruner() if all_rounds else halving
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=42), pruner=pruner)
        study.enqueue_trial(
            {"max_depth": 6 if all_rounds else 3, "eta": 0.1, "min_child_weight": 1.0, "subsample": 0.8}
        )
        study.optimize(objective, n_trials=trials)
        booster, _ = fit(study.best_params, [])
        booster.save_model(folder / "model.ubj")
        test, target = split("test")
        predicted = booster.inplace_predict(test, iteration_range=(0, booster.best_iteration + 1))
        rmse = float(np.sqrt(np.mean((predicted - target) ** 2)))
        (folder / "evaluation.json").write_text(json.dumps({"rmse": rmse}))
    return {"figures": figures, "result": {"rmse": rmse}}


def main(arguments: list[str] | None = None) -> None:
    """Compare both in turn."""
    options = parser(__doc__, rows=10_000)
    options.add_argument("--trials", type=int, default=8, help="trials (default 8)")
    options.add_argument("--rounds", type=int, default=1500, help="most rounds of a trial (default 1500)")
    options.add_argument("--all-rounds", action="store_true", help="stop no trial early")
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as folder:
        source = str(write_sample(Path(folder, "sales.csv"), rows=chosen.rows))
        work = {"source": source, "trials": chosen.trials, "rounds": chosen.rounds, "all_rounds": chosen.all_rounds}
        compare(
            "whole_graph_against_script",
            Side("whole graph", whole_run, work),
            Side("polars, Optuna and XGBoost in one process", script, work),
            pairs=chosen.pairs,
            warm_ups=chosen.warm_ups,
            agree={"rmse": 0.3},
            rows=chosen.rows,
            trials=chosen.trials,
            rounds=chosen.rounds,
            all_rounds=chosen.all_rounds or None,
        )


if __name__ == "__main__":
    main()
