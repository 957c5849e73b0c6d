"""Both engines of the final fit on a real Ray, against plain XGBoost."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import xgboost as xgb

from step_scripts.runner.contract import StepError
from step_scripts.runner.ray_session import RaySession
from step_scripts.training.boosting import SegmentedBoosting, xgboost_parameters
from step_scripts.training.engines import ENGINES, FitRequest, FitResult, WorkersLost, boost, fit
from tests.split_files import sales, splits_of, write_inputs
from tests.waiting import until

PATIENCE = 5
PARAMETERS = xgboost_parameters({"max_depth": 3, "eta": 0.5, "min_child_weight": 1.0, "subsample": 1.0}, seed=7)
ENGINE_NAMES = list(ENGINES)


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> FitRequest:
    train, validation = sales(900), sales(301, seed=1)
    inputs = write_inputs(tmp_path_factory.mktemp("splits"), train, validation, files=3)
    return FitRequest(*splits_of(inputs, train), PARAMETERS, num_boost_round=120, early_stopping_rounds=PATIENCE)


@pytest.fixture(scope="module")
def plain(request_: FitRequest) -> tuple[xgb.Booster, dict[str, list[float]]]:
    """Booster and validation history of `xgboost.train`."""
    matrices = [xgb.DMatrix(*split.load()) for split in (request_.train, request_.validation)]
    evals: dict[str, dict[str, list[float]]] = {}
    booster = xgb.train(
        PARAMETERS | {"nthread": 1},
        matrices[0],
        request_.num_boost_round,
        evals=[(matrices[0], "train"), (matrices[1], "validation")],
        evals_result=evals,  # pyright: ignore[reportArgumentType]
        early_stopping_rounds=PATIENCE,
        verbose_eval=False,
    )
    return booster[: booster.best_iteration + 1], {name: values["rmse"] for name, values in evals.items()}


def _wait_for_free_cpus() -> None:
    until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


def _processes(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def _check(result: FitResult, request: FitRequest) -> None:
    """What must hold for any fit."""
    history = result.history
    assert len(history.train) == len(history.validation)
    assert result.history.best_rounds == int(np.argmin(history.validation)) + 1
    assert len(history.validation) in (result.history.best_rounds + PATIENCE, request.num_boost_round)
    assert result.booster.num_boosted_rounds() == result.history.best_rounds
    # The reported figures are those of the booster on the whole splits, whoever saw which rows.
    for split, rmse in ((request.train, result.train_rmse), (request.validation, result.validation_rmse)):
        features, target = split.load()
        predicted = result.booster.predict(xgb.DMatrix(features, feature_names=list(request.train.scaler.features)))
        assert rmse == pytest.approx(float(np.sqrt(np.mean((predicted - target) ** 2))), rel=1e-4)
    assert result.nodes == (ray.util.get_node_ip_address(),)
    assert 0 < history.seconds <= result.seconds


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_one_worker_equals_plain_xgboost(
    ray_session: RaySession,
    request_: FitRequest,
    plain: tuple[xgb.Booster, dict[str, list[float]]],
    engine: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    result = fit(engine, request_)
    _check(result, request_)
    booster, history = plain
    assert result.num_workers == 1
    np.testing.assert_allclose(result.history.validation, history["validation"], rtol=1e-5)
    np.testing.assert_allclose(result.history.train, history["train"], rtol=1e-5)
    matrix = xgb.DMatrix(request_.validation.load().features, feature_names=list(request_.train.scaler.features))
    expected = booster.predict(xgb.DMatrix(request_.validation.load().features))
    np.testing.assert_allclose(result.booster.predict(matrix), expected, rtol=1e-4)
    assert capfd.readouterr() == ("", "")


def test_a_fit_has_all_its_cores_where_openmp_was_loaded_with_one(ray_session: RaySession, tmp_path: Path) -> None:
    _wait_for_free_cpus()
    train, validation = sales(20_001), sales(100, seed=1)  # enough rows for two threads
    splits = splits_of(write_inputs(tmp_path, train, validation), train)
    request = FitRequest(*splits, PARAMETERS, num_boost_round=2, early_stopping_rounds=2, cpus_per_worker=2)

    class Process:  # an actor, because a worker of tasks may have started threads before
        def threads_started(self) -> int:
            boost(replace(request, cpus_per_worker=1))
            before = psutil.Process().num_threads()
            boost(request)
            return psutil.Process().num_threads() - before

    process: Any = ray.remote(Process).options(num_cpus=1).remote()
    assert ray.get(process.threads_started.remote()) == 1
    ray.kill(process)
    _wait_for_free_cpus()


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_two_workers_agree_within_tolerance(
    ray_session: RaySession,
    request_: FitRequest,
    plain: tuple[xgb.Booster, dict[str, list[float]]],
    engine: str,
    tmp_path: Path,
) -> None:
    _wait_for_free_cpus()
    uri = str(tmp_path / "checkpoints") if engine == "ray_train" else ""
    result = fit(engine, replace(request_, num_workers=2, checkpoint_uri=uri))
    _check(result, request_)
    assert result.num_workers == 2
    # Bins are made from both workers' summaries of their rows, and so are not quite the same.
    assert result.validation_rmse == pytest.approx(min(plain[1]["validation"]), rel=0.05)
    assert not uri or not [path for path in Path(uri).rglob("*") if path.is_file()]
    _wait_for_free_cpus()


@pytest.mark.parametrize(("engine", "num_workers"), [("ray_train", 2), ("xgboost_ray", 1)])
def test_an_interrupted_fit_is_the_fit_that_was_not_interrupted(
    ray_session: RaySession, request_: FitRequest, engine: str, num_workers: int, tmp_path: Path
) -> None:
    class Dies(SegmentedBoosting):
        """Ends the process of the first worker after two of the rounds: at the end of a segment, and within one."""

        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            over = super().after_iteration(model, epoch, evals_log)
            lost = tmp_path / f"lost-{model.num_boosted_rounds()}"
            if model.num_boosted_rounds() in (25, 60) and xgb.collective.get_rank() == 0 and not lost.exists():
                lost.touch()
                os._exit(1)
            return over

    class Interrupted(FitRequest):
        def segmented(self) -> SegmentedBoosting:
            keep = self.checkpoints.save
            return Dies(self.early_stopping_rounds, self.checkpoint_rounds, self.parameters["seed"], keep)

    _wait_for_free_cpus()
    sampling = {"subsample": 0.7, "colsample_bytree": 0.7, "eta": 0.1}
    request = replace(request_, parameters=PARAMETERS | sampling, num_workers=num_workers)
    undisturbed = fit(engine, request)
    _wait_for_free_cpus()
    interrupted = fit(engine, Interrupted(**{**request.__dict__, "checkpoint_uri": str(tmp_path / "kept")}))
    assert [(tmp_path / f"lost-{rounds}").exists() for rounds in (25, 60)] == [True, True]
    assert (undisturbed.resumed_at, interrupted.resumed_at) == (0, 50)
    assert interrupted.num_workers == num_workers
    assert interrupted.history.validation == undisturbed.history.validation
    assert interrupted.history.train == undisturbed.history.train
    assert interrupted.booster.save_raw() == undisturbed.booster.save_raw()
    _wait_for_free_cpus()


@pytest.mark.slow
def test_a_worker_that_xgboost_ray_loses_is_replaced_and_the_history_goes_on(
    ray_session: RaySession, request_: FitRequest
) -> None:
    """Of Ray Train: the interrupted fit above."""
    _wait_for_free_cpus()
    rounds = 3000
    request = replace(request_, num_boost_round=rounds, early_stopping_rounds=rounds, num_workers=2)
    killed: list[int] = []

    over = threading.Event()

    def kill() -> None:
        while not over.is_set():
            workers = _processes("_RemoteRayXGBoostActor.train")
            if len(workers) == 2:
                time.sleep(1.5)
                workers[1].kill()
                killed.append(workers[1].pid)
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        result = fit("xgboost_ray", request)
    finally:
        over.set()
        killer.join()
    assert killed
    assert len(result.history.validation) == rounds
    assert result.history.validation[result.history.best_rounds - 1] == min(result.history.validation)
    assert result.booster.num_boosted_rounds() == result.history.best_rounds
    _wait_for_free_cpus()


def test_xgboost_ray_leaves_nothing_behind_when_it_fails(ray_session: RaySession, request_: FitRequest) -> None:
    _wait_for_free_cpus()
    with pytest.raises(WorkersLost, match=r"xgboost_ray failed: (.|\n)*max_depth"):
        fit("xgboost_ray", replace(request_, parameters=PARAMETERS | {"max_depth": -3}, num_workers=2))
    _wait_for_free_cpus()
    until(lambda: not _processes("RemoteRayXGBoostActor"))  # their CPUs are free a moment before they have ended


def test_more_workers_than_cpus_are_refused(ray_session: RaySession, request_: FitRequest) -> None:
    with pytest.raises(StepError, match="num_workers is 3, but the Ray cluster has 2 CPUs"):
        fit("ray_train", replace(request_, num_workers=3))


def test_more_workers_than_rows_are_refused(ray_session: RaySession, request_: FitRequest) -> None:
    with pytest.raises(StepError, match="num_workers is 302, but a split has only 301 rows"):
        fit("xgboost_ray", replace(request_, num_workers=302))


def test_a_bad_split_is_reported_as_such(ray_session: RaySession, request_: FitRequest) -> None:
    bad = replace(request_.train, target="prize")
    for engine in ENGINE_NAMES:
        with pytest.raises(StepError, match=r"lacks the columns \['prize'\]"):
            fit(engine, replace(request_, train=bad))
