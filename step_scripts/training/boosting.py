"""What all fits have in common: splits as matrices, parameters, early stopping, and segments that survive a restart.

Any worker can read its own part of a split: the rows of all files, in order, are cut into one contiguous range a
worker.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from step_scripts.model import Scaler, TrainingCallback, xgb
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepError
from step_scripts.runner.wording import counted
from step_scripts.table.spec import TableSpec

_HISTORY = "history"
_ROWS_PER_THREAD = 20_000
_SEGMENTS, _SMALLEST_SEGMENT = 10, 25  # rounds of the smallest
_SEED_STEP = 0x5851F42D  # odd, so that its multiples below 2**31 differ


class Matrix(NamedTuple):
    """Scaled features, float32, shape (rows, features), nulls as NaN; and the target, float32, shape (rows,)."""

    features: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class TrainingSplit:
    """Parquet files of one split, the rows in each, and how their columns become a `Matrix`. Cheap to send around."""

    name: str
    uris: tuple[str, ...]
    file_rows: tuple[int, ...]
    scaler: Scaler
    target: str

    @classmethod
    def of(cls, name: str, artifact: Artifact, scaler: Scaler, target: str) -> TrainingSplit:
        """The split in `artifact`. Raises `StepError` if it holds no rows."""
        # Absolute: workers of Ray Train have a working directory of their own.
        places = artifact.file_uris(".parquet")
        uris = tuple(uri if storage.is_remote(uri) else str(storage.local_path(uri).absolute()) for uri in places)
        rows = tuple(f.rows or 0 for f in artifact.files if f.path.endswith(".parquet"))
        if sum(rows) == 0:
            raise StepError(f"the {name} split at {artifact.uri} holds no rows: raise its fraction, or bring more data")
        return cls(name, uris, rows, scaler, target)

    @property
    def rows(self) -> int:
        """Rows in all files."""
        return sum(self.file_rows)

    def load(self, rank: int = 0, num_workers: int = 1) -> Matrix:
        """Part `rank` of `num_workers` nearly equal parts; one file at a time is in memory beside the result.

        Raises `StepError` for a missing column, or a target that is null, infinite or not a number.
        """
        start, stop = self.rows * rank // num_workers, self.rows * (rank + 1) // num_workers
        features = np.empty((stop - start, len(self.scaler.features)), dtype=np.float32)
        target = np.empty(stop - start, dtype=np.float32)
        position = 0
        for frame in self._frames(start, stop):
            end = position + frame.height
            features[position:end] = self.scaler.transform(frame)
            target[position:end] = frame[self.target].cast(pl.Float64).to_numpy()
            position = end
        if bad := int(np.count_nonzero(~np.isfinite(target))):
            raise StepError(
                f"{bad:,} of {counted(len(target), 'row')} of the {self.name} split without a finite {self.target}"
            )
        return Matrix(features, target)

    def _frames(self, start: int, stop: int) -> Iterator[pl.DataFrame]:
        """Rows `start` to `stop` of all files, in order."""
        columns, offset = [*self.scaler.features, self.target], 0
        for uri, rows in zip(self.uris, self.file_rows, strict=True):
            if offset < stop and offset + rows > start:
                with storage.open_input(uri) as source:
                    file = pq.ParquetFile(source, pre_buffer=storage.is_remote(uri))
                    if missing := [name for name in columns if name not in file.schema_arrow.names]:
                        raise StepError(f"{uri} lacks the columns {missing}; it has {file.schema_arrow.names}")
                    frame = pl.DataFrame(file.read(columns))
                yield frame[max(start - offset, 0) : stop - offset]
            offset += rows


def read_splits(
    inputs: Mapping[str, Artifact], table: TableSpec
) -> tuple[dict[str, Any], TrainingSplit, TrainingSplit]:
    """The content of `scaler.json` in the input `statistics`, and the splits `train` and `validation` scaled by it.

    Raises `StepError` if it lacks a feature or a split holds no rows.
    """
    statistics = inputs["statistics"]
    scaler_json = json.loads(storage.read_bytes(statistics.file_uri("scaler.json")))
    try:
        scaler = Scaler.from_json(scaler_json, table.features)
    except KeyError as error:
        raise StepError(
            f"{statistics.file_uri('scaler.json')} lacks the feature {error}: prepare the splits again"
        ) from error
    train, validation = (TrainingSplit.of(name, inputs[name], scaler, table.target) for name in ("train", "validation"))
    return scaler_json, train, validation


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


def quantile_matrices(train: Matrix, validation: Matrix, threads: int) -> tuple[xgb.DMatrix, xgb.DMatrix]:
    """Both splits in XGBoost's compressed form (a byte a value); the second in the bins of the first."""
    binned = xgb.QuantileDMatrix(train.features, train.target, nthread=threads)
    return binned, xgb.QuantileDMatrix(validation.features, validation.target, ref=binned, nthread=threads)


class TrialBoosting:
    """Boosts one trial, some rounds at a time, and keeps the best validation RMSE; the model itself is not wanted.

    In the segments of a fit of as many rounds, so that the final fit repeats the best trial. `settings`: the step's,
    resolved.
    """

    def __init__(
        self,
        matrices: tuple[xgb.DMatrix, xgb.DMatrix],
        tuned: dict[str, float | int],
        threads: int,
        settings: Mapping[str, Any],
    ) -> None:
        self._train, self._validation = matrices
        self._num_boost_round = settings["num_boost_round"]
        self._early_stopping_rounds = settings["early_stopping_rounds"]
        self._interval, self._seed = segment_rounds(self._num_boost_round), settings["seed"]
        parameters = xgboost_parameters(tuned, self._seed) | {"nthread": threads}
        # Updating the booster in place keeps its predictions; `xgboost.train` would make them again in every step.
        self._booster = xgb.Booster(parameters, matrices)
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
