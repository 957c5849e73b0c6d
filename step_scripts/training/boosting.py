"""What all fits have in common: parameters, matrices, and early stopping and checkpoints that survive a restart."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from step_scripts.model.xgboost_native import TrainingCallback, xgb
from step_scripts.runner import storage
from step_scripts.runner.wording import counted

_log = logging.getLogger(__name__)
_HISTORY = "history"
_ROWS_PER_THREAD = 20_000
_SEGMENTS, _SMALLEST_SEGMENT = 10, 25  # rounds of the smallest
_SEED_STEP = 0x5851F42D  # odd, so that its multiples below 2**31 differ
_SUFFIX = ".checkpoint"
_KEPT = 2  # checkpoints, so that there is one before a damaged one


class Matrix(NamedTuple):
    """Scaled features, float32, shape (rows, features), nulls as NaN; and the target, float32, shape (rows,)."""

    features: np.ndarray
    target: np.ndarray


def xgboost_parameters(tuned: dict[str, float | int], seed: int) -> dict[str, Any]:
    """Parameters for `xgboost.train`, from the tuned ones (`max_depth`, `eta`, `min_child_weight`, `subsample`)."""
    return {
        "objective": "reg:squarederror",
        "eval_metric": "rmse",
        "tree_method": "hist",
        "seed": seed,
        **tuned,
    }


def useful_threads(rows: int, cpus: int) -> int:
    """How many of `cpus` threads help to fit `rows` rows: on small data they mostly wait for each other."""
    return max(1, min(cpus, -(-rows // _ROWS_PER_THREAD)))


@contextlib.contextmanager
def openmp_threads(threads: int) -> Iterator[None]:
    """Allow OpenMP, in this thread, that many threads.

    Ray allows a process as many as the task had CPUs in which OpenMP was loaded, and XGBoost starts no more than that,
    whatever `nthread` says: a fit on two cores would use one of them after trials that had a core each.
    """
    with threadpool_limits(threads, user_api="openmp"):
        yield


def quantile_matrices(train: Matrix, validation: Matrix, threads: int) -> tuple[xgb.DMatrix, xgb.DMatrix]:
    """Both splits in XGBoost's compressed form (a byte a value); the second in the bins of the first."""
    binned = xgb.QuantileDMatrix(train.features, train.target, nthread=threads)
    return binned, xgb.QuantileDMatrix(validation.features, validation.target, ref=binned, nthread=threads)


class TrialBoosting:
    """Boosts one trial, some rounds at a time, and keeps the best validation RMSE; the model itself is not wanted.

    In the segments of a fit of as many rounds, so that the final fit repeats the best trial.
    """

    def __init__(
        self,
        train: xgb.DMatrix,
        validation: xgb.DMatrix,
        parameters: dict[str, Any],
        num_boost_round: int,
        early_stopping_rounds: int,
    ) -> None:
        self._train, self._validation = train, validation
        self._num_boost_round, self._early_stopping_rounds = num_boost_round, early_stopping_rounds
        self._interval, self._seed = segment_rounds(num_boost_round), parameters["seed"]
        # Updating the booster in place keeps its predictions; `xgboost.train` would make them again in every step.
        self._booster = xgb.Booster(parameters, [train, validation])
        self.rounds, self.best_rounds, self.best_rmse = 0, 0, math.inf

    def advance(self, rounds: int) -> Literal["early_stopping", "all_rounds"] | None:
        """Boost so many rounds, or until the trial ends; what ended it, None if it goes on."""
        for _ in range(rounds):
            self._booster.update(self._train, self.rounds)
            result = self._booster.eval_set([(self._validation, "validation")], self.rounds)
            rmse = float(str(result).rsplit(":", 1)[1])
            self.rounds += 1
            if rmse < self.best_rmse:
                self.best_rmse, self.best_rounds = rmse, self.rounds
            if self.rounds - self.best_rounds >= self._early_stopping_rounds:
                return "early_stopping"
            if self.rounds >= self._num_boost_round:
                return "all_rounds"
            if self.rounds % self._interval == 0:
                begin_segment(self._booster, self._seed, self.rounds // self._interval)
        return None


@dataclass
class History:
    """RMSE on both splits after each round, in the target's unit, and the seconds that the rounds took."""

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def best_rounds(self) -> int:
        """Number of rounds with the smallest validation RMSE; the first such. 0 before the first round."""
        return int(np.argmin(self.validation)) + 1 if self.validation else 0


def segment_rounds(num_boost_round: int) -> int:
    """Rounds of a segment of a fit of at most `num_boost_round` rounds."""
    return max(_SMALLEST_SEGMENT, num_boost_round // _SEGMENTS)


def segment_seed(seed: int, segment: int) -> int:
    """The seed of a segment of a fit. That of the first is `seed` itself; no two segments of a fit have the same."""
    return (seed + segment * _SEED_STEP) % 2**31


class SegmentedBoosting(TrainingCallback):
    """Records the history, stops `early_stopping_rounds` after the best one, and cuts the fit into segments.

    XGBoost keeps neither the state of its random numbers nor its early stopping in a model. So every `interval` rounds
    the random numbers begin anew, whether the fit goes on in this process or in another one, from a seed that depends
    on `seed` and the number of the segment only; the history stands in the booster. A fit that goes on from the booster
    that `keep` was given, at a boundary, with the same number of workers, is then bit for bit the fit that was not
    interrupted. It must begin with the seed of its segment.

    In a distributed fit the metrics are those of all workers together, so that all of them stop in the same round;
    `keep` is called by the first one.
    """

    def __init__(
        self,
        early_stopping_rounds: int,
        interval: int,
        seed: int = 0,
        keep: Callable[[xgb.Booster], None] | None = None,
    ) -> None:
        super().__init__()
        self.history = History()
        self._round_since: float | None = None
        self._best_rmse, self._best_rounds = math.inf, 0
        self._early_stopping_rounds, self._interval = early_stopping_rounds, interval
        self._seed, self._save = seed, keep

    def before_training(self, model: Any) -> Any:
        """Take over the history of the rounds that `model` already has."""
        self.history = history_of(model)
        self._best_rounds = self.history.best_rounds
        self._best_rmse = self.history.validation[self._best_rounds - 1] if self._best_rounds else math.inf
        return model

    def before_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        """The first round begins: matrices are made, and workers have found each other."""
        if self._round_since is None:
            self._round_since = time.perf_counter()
        return False

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        """Record the round; whether to stop. At the end of a segment: keep the model, begin the next segment."""
        now = time.perf_counter()
        self.history.seconds += now - (self._round_since or now)
        self._round_since = now  # what other callbacks do between two rounds is part of the next
        self.history.train.append(evals_log["train"]["rmse"][-1])
        self.history.validation.append(evals_log["validation"]["rmse"][-1])
        rounds = len(self.history.validation)
        if self.history.validation[-1] < self._best_rmse:
            self._best_rmse, self._best_rounds = self.history.validation[-1], rounds
        if rounds - self._best_rounds >= self._early_stopping_rounds:
            return True
        if rounds % self._interval == 0:
            self._note(model)
            if self._save is not None and xgb.collective.get_rank() == 0:
                self._save(model)
            begin_segment(model, self._seed, rounds // self._interval)
        return False

    def after_training(self, model: Any) -> Any:
        """Keep the whole history in the booster."""
        self._note(model)
        return model

    def _note(self, model: Any) -> None:
        model.set_attr(**{_HISTORY: json.dumps(self.history.__dict__)})


def begin_segment(model: xgb.Booster, seed: int, segment: int) -> None:
    """Make XGBoost draw its random numbers as a new booster would.

    A new seed alone is not enough: what samples the columns belongs to the updater, which XGBoost makes anew when
    another one was asked for in between. A new booster would have to predict all rows with all trees, which costs
    more than half as much as the boosting.
    """
    model.set_param({"tree_method": "approx"})
    model.save_config()  # XGBoost takes new parameters up when it needs them
    model.set_param({"tree_method": "hist", "seed": segment_seed(seed, segment)})


def history_of(booster: xgb.Booster) -> History:
    """The history that stands in a booster; empty if there is none."""
    return History(**json.loads(booster.attr(_HISTORY) or "{}"))


def finished(booster: xgb.Booster, features: tuple[str, ...]) -> tuple[xgb.Booster, History]:
    """The booster of the best rounds only, with feature names and without traces of the fit; and the history."""
    history = history_of(booster)
    best = booster[: history.best_rounds]
    best.set_attr(**dict.fromkeys(best.attributes()))
    best.feature_names = list(features)
    best.feature_types = None
    return best, history


@dataclass(frozen=True)
class Checkpoint:
    """A model with `rounds` rounds in XGBoost's binary form, for `xgboost.train`; without any, where a fit begins."""

    model: bytes = b""
    rounds: int = 0


@dataclass(frozen=True)
class FitCheckpoints:
    """Files below `uri`: a line with the SHA-256 of the rest, then the model. Those of another `fit` are ignored.

    A local folder is made by whoever calls `latest`. A machine that does not have it keeps nothing.
    """

    uri: str
    fit: str

    def save(self, booster: xgb.Booster) -> None:
        """Keep the booster, and of those before only the latest. A failure is a warning: the fit needs none."""
        if not storage.is_remote(self.uri) and not storage.local_path(self.uri).is_dir():
            return
        model, rounds = bytes(booster.save_raw("ubj")), booster.num_boosted_rounds()
        try:
            storage.write_bytes(storage.join(self.uri, self._name(rounds)), _digest(model) + b"\n" + model)
            for old in self._files()[:-_KEPT]:
                storage.delete(old)
        except OSError as error:
            _log.warning("round %d could not be kept below %s: %s", rounds, self.uri, error)

    def latest(self, warn: Callable[[str], None] = _log.warning) -> Checkpoint | None:
        """The latest checkpoint that is whole; None if there is none. What is damaged is reported to `warn`."""
        if not storage.is_remote(self.uri):
            storage.local_path(self.uri).mkdir(parents=True, exist_ok=True)
        for uri in reversed(self._files()):
            try:
                return self._read(uri)
            except (OSError, ValueError, xgb.core.XGBoostError) as error:
                reason = str(error).strip().partition("\n")[0]
                warn(f"the checkpoint {uri} cannot be used ({reason}): the final fit goes on from the one before")
        return None

    def _read(self, uri: str) -> Checkpoint:
        digest, _, model = storage.read_bytes(uri).partition(b"\n")
        if _digest(model) != digest:
            raise ValueError("it is damaged: its digest is another one")
        booster = xgb.Booster(model_file=bytearray(model))
        rounds = booster.num_boosted_rounds()
        if uri.rpartition("/")[2] != self._name(rounds) or len(history_of(booster).train) != rounds:
            raise ValueError(f"it holds {counted(rounds, 'round')}, which is not what it should be")
        return Checkpoint(model, rounds)

    def _files(self) -> list[str]:
        """Checkpoints of this fit, by their rounds."""
        found = [(uri, uri.rpartition("/")[2]) for uri in storage.list_files(self.uri)]
        return [uri for uri, name in found if name.startswith(f"{self.fit[:16]}-") and name.endswith(_SUFFIX)]

    def _name(self, rounds: int) -> str:
        return f"{self.fit[:16]}-{rounds:06d}{_SUFFIX}"


def _digest(model: bytes) -> bytes:
    return hashlib.sha256(model).hexdigest().encode()
