"""How long does the final fit of one host take, and how long `xgboost.train` with as many threads?

`python -m benchmarks.final_fit [--rows 2000000] [--rounds 100]`. 60 % of the rows are fitted, 20 % evaluated after
every round, on both sides. `seconds`: reading, binning and boosting, on a Ray session
whose workers have imported XGBoost.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import Side, compare, parser, stopwatch
from benchmarks.steps import read_inputs, scaled_split, warm_ray, write_splits

PARAMETERS = {
    "objective": "reg:squarederror",
    "eval_metric": "rmse",
    "tree_method": "hist",
    "max_depth": 6,
    "eta": 0.1,
    "seed": 42,
}


def on_ray(folder: str, rounds: int) -> dict[str, Any]:
    """The platform's engine `ray_train`."""
    from housing_assets.schema import HOUSING_TABLE
    from step_scripts.training.boosting import read_splits
    from step_scripts.training.engines import FitRequest, fit

    importlib.import_module("step_scripts.tune_model")  # the step whose second half the fit is
    figures: dict[str, float] = {}
    with warm_ray("step_scripts.training.boosting"), stopwatch(figures):
        _, train, validation = read_splits(read_inputs(folder), HOUSING_TABLE)
        fitted = fit(
            "ray_train",
            FitRequest(
                train=train,
                validation=validation,
                parameters=PARAMETERS,
                num_boost_round=rounds,
                early_stopping_rounds=rounds,
            ),
        )
    return {"figures": figures, "result": {"rmse": fitted.validation_rmse, "rounds": len(fitted.history.validation)}}


def in_process(folder: str, rounds: int) -> dict[str, Any]:
    """`xgboost.train`."""
    import xgboost as xgb

    threads = os.cpu_count() or 1
    figures: dict[str, float] = {}
    history: dict[str, Any] = {}
    with stopwatch(figures):
        train = xgb.QuantileDMatrix(*scaled_split(folder, "train"), nthread=threads)
        validation = xgb.QuantileDMatrix(*scaled_split(folder, "validation"), ref=train, nthread=threads)
        xgb.train(
            PARAMETERS | {"nthread": threads},
            train,
            rounds,
            evals=[(train, "train"), (validation, "validation")],
            evals_result=history,
            verbose_eval=False,
        )
    rmse = history["validation"]["rmse"]
    return {"figures": figures, "result": {"rmse": min(rmse), "rounds": len(rmse)}}


def main(arguments: list[str] | None = None) -> None:
    """Compare both in turn."""
    options = parser(__doc__, rows=2_000_000)
    options.add_argument("--rounds", type=int, default=100, help="boosting rounds (default 100)")
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as folder:
        write_splits(Path(folder), chosen.rows)
        work = {"folder": folder, "rounds": chosen.rounds}
        compare(
            "final_fit",
            Side("engine ray_train, one host", on_ray, work),
            Side("xgboost.train", in_process, work),
            pairs=chosen.pairs,
            warm_ups=chosen.warm_ups,
            agree={"rmse": 0.001, "rounds": 0},
            rows=chosen.rows,
            rounds=chosen.rounds,
        )


if __name__ == "__main__":
    main()
