"""One trial of step `tune_model`, as one training job of a SageMaker tuning job.

`python -m step_scripts.tune_trial`, with `HOUSING_JOB_URI` (the folder that holds `request.json`, the request of
`tune_model`). What is tuned stands in SageMaker's `hyperparameters.json`. The program boosts as a trial on Ray Tune
does, without a scheduler, and logs what SageMaker finds by the patterns in `METRICS`. Nothing else is kept.
`HOUSING_NODE_CPUS` limits the threads.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from step_scripts.cluster.job import JobFiles, failure_of, ml_root, write_failure
from step_scripts.parameters import TUNED, TuneModelParams
from step_scripts.runner.execution import CodeCheck
from step_scripts.runner.ray_session import RaySession, RaySettings
from step_scripts.training.boosting import TrialBoosting, quantile_matrices, read_splits, useful_threads

_ROUNDS_BETWEEN_LINES = 100
_log = logging.getLogger("step_scripts.tune_trial")


def run_trial(request_folder: str, hyperparameters: dict[str, str]) -> TrialBoosting:
    """Boost one trial to its end, and print how it goes. Raises `StepError` if the code is not what was asked for."""
    request = JobFiles(request_folder).request()
    code = CodeCheck(request, RaySession(RaySettings()))
    code.require()
    params = TuneModelParams.model_validate(request.params)
    tuned = {name: parameter.kind(float(hyperparameters[name])) for name, parameter in TUNED.items()}
    _log.info("trial: %s", ", ".join(f"{name} {value:.6g}" for name, value in tuned.items()))
    _, train, validation = read_splits(request.inputs, params.table)
    threads = useful_threads(train.rows, int(os.environ.get("HOUSING_NODE_CPUS") or os.cpu_count() or 1))
    matrices = quantile_matrices(train.load(), validation.load(), threads)
    boosting = TrialBoosting(matrices, tuned, threads, params.resolved())
    while (stopped_by := boosting.advance(_ROUNDS_BETWEEN_LINES)) is None:
        _log.info("round %d, RMSE %.6g", boosting.rounds, boosting.best_rmse)
    _log.info("ended by %s", stopped_by.replace("_", " "))
    code.require()
    # What SageMaker reads: see METRICS in step_scripts.training.trials.
    _log.info("validation:rmse=%r; trial:rounds=%d; trial:best_rounds=%d;",
              boosting.best_rmse, boosting.rounds, boosting.best_rounds)  # fmt: skip
    return boosting


def main() -> int:
    """Run the trial that this training job is for; returns the exit status."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    root = ml_root()
    try:
        given = json.loads(Path(root, "input", "config", "hyperparameters.json").read_text())
        run_trial(os.environ["HOUSING_JOB_URI"], given)
    except Exception as error:  # noqa: BLE001  # the process's boundary: becomes the job's failure
        failure = failure_of(error)
        _log.error("failed: %s", failure["message"], exc_info=error if "traceback" in failure else None)
        write_failure(root / "output" / "failure", failure)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
