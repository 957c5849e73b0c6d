"""Step `tune_model` on a real Ray: search, final fit, artifact, failures, interruption."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
import ray
import xgboost as xgb

from step_scripts.model import load_model
from step_scripts.runner.contract import Artifact, StepError, StepRequest, StepResult
from step_scripts.runner.execution import run_step
from step_scripts.runner.ray_session import RaySession, private_folder_of_session
from step_scripts.training import search
from step_scripts.training.trials import TrialRecord, TrialStore
from tests.split_files import TABLE, sales, scaler_of, write_inputs, write_split
from tests.waiting import until

FAST = {"num_boost_round": 40, "early_stopping_rounds": 10, "num_trials": 3, "eta_min": 0.1, "eta_max": 0.3}


class Messages(logging.Logger):
    """Collects what a step reports, and reacts to it."""

    def __init__(self, react: Callable[[list[str]], None] = lambda texts: None) -> None:
        super().__init__("messages")
        self.texts: list[str] = []
        self._react = react

    def handle(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self._react(self.texts)

    def trials(self) -> list[str]:
        return _done(self.texts)


def _done(texts: list[str]) -> list[str]:
    """The messages of trials that have ended."""
    return [text for text in texts if " done, trial " in text]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return write_inputs(tmp_path_factory.mktemp("splits"), sales(600), sales(200, seed=1), files=2)


@pytest.fixture
def tune(ray_session: RaySession, inputs: dict[str, Artifact], tmp_path: Path) -> Callable[..., StepResult]:
    def call(messages: Messages | None = None, changed: dict[str, Artifact] | None = None, **params: Any) -> StepResult:
        request = StepRequest(
            step="tune_model",
            params={"table": TABLE.model_dump(mode="json"), **FAST, **params},
            inputs=inputs | (changed or {}),
            output_root=str(tmp_path / "out"),
            code_version="1",
        )
        return run_step(request, messages or Messages(), ray_session)

    return call


def _json(artifact: Artifact, name: str) -> Any:
    return json.loads(Path(artifact.file_uri(name)).read_bytes())


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def _workers(title: str) -> list[psutil.Process]:
    """Processes of this test's Ray session that have `title` in their name."""
    return [p for p in psutil.Process().children(recursive=True) if title in _title(p)]


def _kill_the_worker(title: str) -> int:
    [worker] = _workers(title)
    worker.kill()
    return worker.pid


def _leftovers() -> list[Path]:
    """Files of a search in this Ray session's folder, where Ray Tune and the search put theirs."""
    session = private_folder_of_session()
    assert session is not None
    return [*session.glob("tune-*"), *session.glob("r/session_2*/artifacts/*/search-*")]


def _kept_trials(folder: Path) -> list[Path]:
    """Files of finished trials, below the step's outputs in `folder`."""
    return sorted(folder.glob("out/tune_model/*/unfinished/trials/*/*.json"))


def _wait_for_free_cpus() -> None:
    until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


def test_model_and_report(tune: Callable[..., StepResult], inputs: dict[str, Artifact]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    importlib.import_module("step_scripts.tune_model")  # a library sets a variable when it is imported
    environment = dict(os.environ)
    messages = Messages()
    result = tune(messages)
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert dict(os.environ) == environment
    assert not _leftovers()
    assert len(messages.trials()) == 3

    frame = sales(200, seed=1)
    model = load_model(result.outputs["model"].uri)
    predicted = model.predict(frame)
    scaled = scaler_of(sales(600)).transform(frame)
    booster = xgb.Booster(model_file=result.outputs["model"].file_uri("model.ubj"))
    np.testing.assert_array_equal(predicted, booster.predict(xgb.DMatrix(scaled, feature_names=list(TABLE.features))))
    rmse = float(np.sqrt(np.mean((predicted - frame["price"].to_numpy()) ** 2)))
    assert result.metrics["validation_rmse"] == pytest.approx(rmse, rel=1e-4)
    assert rmse < 0.25 * float(np.std(frame["price"].to_numpy()))
    assert not booster.attributes()
    assert booster.num_boosted_rounds() == result.metrics["best_rounds"]

    trials = [TrialRecord.model_validate(t) for t in _json(result.outputs["report"], "trials.json")]
    assert [t.trial for t in trials] == [1, 2, 3]
    assert all(0.1 <= t.parameters["eta"] <= 0.3 for t in trials)
    best = min(trials, key=lambda t: t.rmse or np.inf)
    assert result.details["best_parameters"] == best.parameters
    # The final fit repeats the best trial.
    assert result.metrics["validation_rmse"] == pytest.approx(best.rmse, rel=1e-3)
    assert result.metrics["best_rounds"] == best.best_rounds

    curve = _json(result.outputs["report"], "learning_curve.json")
    assert curve["validation"][curve["round"].index(curve["best_rounds"])] == result.metrics["validation_rmse"]
    importance = _json(result.outputs["report"], "importance.json")
    assert set(importance) == set(TABLE.features)
    assert max(importance, key=lambda name: importance[name]["gain"]) == "area"
    metrics = _json(result.outputs["model"], "metrics.json")
    assert metrics["rounds"] == result.metrics["best_rounds"]
    assert "seconds" not in json.dumps([_json(result.outputs["model"], "parameters.json"), metrics])
    assert _json(result.outputs["model"], "versions.json")["xgboost"] == xgb.__version__


def test_one_trial_with_fixed_parameters_is_reproducible(tune: Callable[..., StepResult]) -> None:
    fixed = {"max_depth": 2, "eta": 0.2, "min_child_weight": 3.0, "subsample": 0.7}
    bounds = {f"{name}_{end}": value for name, value in fixed.items() for end in ("min", "max")}
    digests = set()
    for scheduler in ("median", "asha"):
        result = tune(**bounds, num_trials=1, search_algorithm="random", scheduler=scheduler)
        assert result.details["best_parameters"] == fixed
        digests.add(result.outputs["model"].digest)
    assert len(digests) == 1


def test_the_same_search_on_a_busy_machine_finds_the_same(tune: Callable[..., StepResult], tmp_path: Path) -> None:
    """Trials end in another order, and the trials, the best one and the booster are the same, byte for byte."""

    def disturb() -> None:
        """Stop one process of a trial after the other for a while."""
        while not over.wait(0.05):
            for process in _workers("BoostingTrial") + _workers("ResourceTrainable"):
                with contextlib.suppress(psutil.Error):
                    process.suspend()
                over.wait(0.4)
                with contextlib.suppress(psutil.Error):
                    process.resume()

    found, orders = [], []
    for busy in (False, True):
        over, messages = threading.Event(), Messages()
        disturber = threading.Thread(target=disturb)
        if busy:
            disturber.start()
        try:
            result = tune(messages, num_trials=8, num_boost_round=300, early_stopping_rounds=20)
        finally:
            over.set()
            if busy:
                disturber.join()
        assert result.details["search_repeatable"] is True
        trials = _json(result.outputs["report"], "trials.json")
        found.append(([{**t, "seconds": 0} for t in trials], result.outputs["model"].digest))
        orders.append([text.partition(" done, ")[2].partition(":")[0] for text in messages.trials()])
        shutil.rmtree(tmp_path / "out")
    assert found[0] == found[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_what_a_scheduler_may_stop_is_not_repeatable(
    tune: Callable[..., StepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_WORTH_STOPPING", 0)
    for scheduler, repeatable in (("asha", False), ("median", False), ("none", True)):
        result = tune(scheduler=scheduler)
        assert result.details["search_repeatable"] is repeatable


def test_an_interrupted_search_goes_on(tune: Callable[..., StepResult], tmp_path: Path) -> None:
    def interrupt(texts: list[str]) -> None:
        if len(_done(texts)) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    settings = {"num_trials": 6, "num_boost_round": 400, "scheduler": "none"}
    with pytest.raises(KeyboardInterrupt):
        tune(Messages(interrupt), **settings)
    _wait_for_free_cpus()
    until(lambda: not _leftovers())
    kept = [json.loads(path.read_bytes()) for path in _kept_trials(tmp_path)]
    assert 2 <= len(kept) < 6

    messages = Messages()
    result = tune(messages, **settings)
    assert len(messages.trials()) == 6 - len(kept)
    trials = _json(result.outputs["report"], "trials.json")
    assert [t["trial"] for t in trials] == list(range(1, 7))
    assert all(record in trials for record in kept)
    assert result.details["trials_resumed"] == len(kept)
    assert not _kept_trials(tmp_path)
    assert len({json.dumps(t["parameters"]) for t in trials}) == 6


def test_an_interrupted_run_makes_the_model_of_one_that_was_not(
    tune: Callable[..., StepResult], tmp_path: Path
) -> None:
    def interrupt(texts: list[str]) -> None:
        if len(_done(texts)) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    # The fifth trial is proposed by what was learned from those before.
    settings = {"num_trials": 6, "max_concurrent_trials": 1, "num_boost_round": 60, "scheduler": "none"}
    undisturbed = tune(**settings)
    trials = _json(undisturbed.outputs["report"], "trials.json")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        tune(Messages(interrupt), **settings)
    _wait_for_free_cpus()
    resumed = tune(**settings)
    again = _json(resumed.outputs["report"], "trials.json")
    assert [t["parameters"] for t in again] == [t["parameters"] for t in trials]
    assert [t["rmse"] for t in again] == [t["rmse"] for t in trials]
    assert resumed.outputs["model"].digest == undisturbed.outputs["model"].digest
    assert resumed.details["trials_resumed"] >= 4
    assert resumed.details["search_repeatable"] is undisturbed.details["search_repeatable"] is True


def test_trials_of_another_search_are_not_taken_over(tmp_path: Path) -> None:
    record = TrialRecord(
        trial=4, parameters={"eta": 0.1}, rmse=1.0, rounds=9, best_rounds=8, seconds=0.5,
        status="completed", stopped_by="scheduler",
    )  # fmt: skip
    TrialStore(str(tmp_path), "a" * 64).save(record)
    assert TrialStore(str(tmp_path), "a" * 64).load() == [record]
    assert TrialStore(str(tmp_path), "b" * 64).load() == []
    next((tmp_path / "trials").rglob("*.json")).write_text("{")
    assert TrialStore(str(tmp_path), "a" * 64).load() == []


def test_a_lost_trial_is_in_the_table_and_the_others_count(tune: Callable[..., StepResult]) -> None:
    def during_the_second_trial(texts: list[str]) -> None:
        if _done(texts) == [texts[-1]]:
            # Between two trials the actor's process has the name of its class.
            [actor] = _workers("BoostingTrial")
            threading.Timer(0.3, actor.kill).start()

    long = {"num_boost_round": 5000, "early_stopping_rounds": 5000, "scheduler": "none"}
    result = tune(Messages(during_the_second_trial), max_concurrent_trials=1, **long)
    trials = _json(result.outputs["report"], "trials.json")
    assert [t["status"] for t in trials] == ["completed", "failed", "completed"]
    assert trials[1]["stopped_by"] == "error"
    assert "died" in trials[1]["error"]
    assert result.metrics["trials_failed"] == 1


def test_the_first_reason_is_told_if_all_trials_fail(tune: Callable[..., StepResult], tmp_path: Path) -> None:
    infinite = sales(600).with_columns(area=pl.lit(float("inf")))
    with pytest.raises(StepError, match=r"no trial of 3 succeeded; the first failure: .*XGBoostError.*inf") as caught:
        tune(changed={"train": write_split(tmp_path / "infinite", infinite)})
    assert len(caught.value.details["trials"]) == 3  # pyright: ignore[reportArgumentType]
    _wait_for_free_cpus()


def test_an_unreadable_split_is_named(tune: Callable[..., StepResult], tmp_path: Path) -> None:
    bad = write_split(tmp_path / "bad", sales(50).with_columns(price=pl.lit(None, dtype=pl.Float64)))
    with pytest.raises(StepError, match="50 of 50 rows of the validation split without a finite price"):
        tune(changed={"validation": bad})


def test_the_article_preset(tune: Callable[..., StepResult]) -> None:
    unset = dict.fromkeys(FAST)
    result = tune(**unset | {"preset": "article", "num_boost_round": 30})
    assert result.metrics["num_trials"] == 4
    assert all(0.2 <= t["parameters"]["eta"] <= 1 for t in result.details["trials"])
    assert all(t["rounds"] <= 30 for t in result.details["trials"])
