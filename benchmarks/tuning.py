"""How long does a hyperparameter search take on Ray Tune, and how long with Optuna in one process?

`python -m benchmarks.tuning [--rows 10000] [--trials 20] [--rounds 100]`. No early stopping on either side,
the same ranges and sampler. `seconds`: the search with reading, on a Ray session that is there, with the modules of
both main processes imported, but not those of our workers. `process_seconds`: all of it, with the start of Ray and the
imports.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import Side, compare, parser, stopwatch
from benchmarks.steps import SILENT, read_inputs, scaled_split, warm_ray, write_splits

_THREADS = 2
# The ranges of preset `default`.
_RANGES = {"max_depth": (1, 6), "eta": (0.03, 0.2), "min_child_weight": (0.0, 10.0), "subsample": (0.6, 1.0)}


def on_ray(folder: str, trials: int, rounds: int) -> dict[str, Any]:
    """The search of step `tune_model`."""
    from housing_assets.schema import HOUSING_TABLE
    from step_scripts.parameters import TuneModelParams
    from step_scripts.training.boosting import read_splits
    from step_scripts.training.search import run_search

    params = TuneModelParams(
        table=HOUSING_TABLE,
        num_trials=trials,
        num_boost_round=rounds,
        early_stopping_rounds=rounds,
        scheduler="none",
    )
    figures: dict[str, float] = {}
    with warm_ray(), stopwatch(figures):
        _, train, validation = read_splits(read_inputs(folder), HOUSING_TABLE)
        records = run_search(params, train, validation, None, SILENT).records
    done = [r for r in records if r.rmse is not None]
    return {"figures": figures, "result": _result([float(r.rmse or 0) for r in done], sum(r.rounds for r in done))}


def in_process(folder: str, trials: int, rounds: int) -> dict[str, Any]:
    """Optuna's loop around `xgboost.train`."""
    import optuna
    import xgboost as xgb

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    figures: dict[str, float] = {}
    with stopwatch(figures):
        train = xgb.QuantileDMatrix(*scaled_split(folder, "train"), nthread=_THREADS)
        validation = xgb.QuantileDMatrix(*scaled_split(folder, "validation"), ref=train, nthread=_THREADS)

        def objective(trial: optuna.Trial) -> float:
            parameters = {
                "max_depth": trial.suggest_int("max_depth", *_RANGES["max_depth"]),  # pyright: ignore[reportArgumentType]
                "eta": trial.suggest_float("eta", *_RANGES["eta"], log=True),
                "min_child_weight": trial.suggest_float("min_child_weight", *_RANGES["min_child_weight"]),
                "subsample": trial.suggest_float("subsample", *_RANGES["subsample"]),
                "objective": "reg:squarederror",
                "tree_method": "hist",
                "seed": 42,
                "nthread": _THREADS,
            }
            history: dict[str, Any] = {}
            xgb.train(
                parameters,
                train,
                rounds,
                evals=[(validation, "validation")],
                evals_result=history,
                verbose_eval=False,
            )
            return min(history["validation"]["rmse"])

        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=42))
        study.enqueue_trial({"max_depth": 3, "eta": 0.1, "min_child_weight": 1.0, "subsample": 0.8})
        study.optimize(objective, n_trials=trials)
    return {
        "figures": figures,
        "result": _result([float(t.value or 0) for t in study.trials], rounds * len(study.trials)),
    }


def _result(rmse: list[float], rounds: int) -> dict[str, Any]:
    return {"rmse": round(min(rmse), 1), "trials": len(rmse), "rounds": rounds}


def main(arguments: list[str] | None = None) -> None:
    """Compare both in turn."""
    options = parser(__doc__, rows=10_000)
    options.add_argument("--trials", type=int, default=20, help="trials (default 20)")
    options.add_argument("--rounds", type=int, default=100, help="boosting rounds of each trial (default 100)")
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as folder:
        write_splits(Path(folder), chosen.rows)
        work = {"folder": folder, "trials": chosen.trials, "rounds": chosen.rounds}
        compare(
            "tuning",
            Side("search of tune_model", on_ray, work),
            Side(f"Optuna in process, {_THREADS} threads", in_process, work),
            pairs=chosen.pairs,
            warm_ups=chosen.warm_ups,
            # The best of few trials: two searches with the same sampler need not find the same.
            agree={"trials": 0, "rounds": 0, "rmse": 0.25},
            rows=chosen.rows,
            trials=chosen.trials,
            rounds=chosen.rounds,
        )


if __name__ == "__main__":
    main()
