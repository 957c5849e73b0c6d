"""The trials of a search: what they try, by Optuna's samplers, what came of them, and where that is kept, so that an
interrupted search can go on. Imports nothing heavy, and Optuna, which takes half a second, only where it is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from step_scripts.parameters import TUNED, TuneModelParams
from step_scripts.runner import storage, wording

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution, IntDistribution
    from ray.tune.search.optuna import OptunaSearch

OBJECTIVE = "validation:rmse"
TRIAL_MODULE = "step_scripts.tune_trial"
"""What a trial that is a job of its own runs: part of the code of `tune_model` by being named here."""
METRICS = {
    OBJECTIVE: r"validation:rmse=([0-9.eE+-]+);",
    "trial:rounds": r"trial:rounds=([0-9]+);",
    "trial:best_rounds": r"trial:best_rounds=([0-9]+);",
}
"""What a trial that is a job of its own prints, as regular expressions by the name of the metric."""


class TrialRecord(BaseModel):
    """One trial. `rmse` is the smallest on the validation split, reached after `best_rounds` of `rounds` rounds."""

    model_config = ConfigDict(frozen=True)

    trial: int
    parameters: dict[str, float | int]
    rmse: float | None
    rounds: int
    best_rounds: int
    seconds: float
    status: Literal["completed", "failed"]
    stopped_by: Literal["early_stopping", "all_rounds", "scheduler", "error"]
    error: str | None = None

    def describe(self) -> str:
        """The trial in one line."""
        parameters = ", ".join(f"{name} {value:.4g}" for name, value in self.parameters.items())
        if self.rmse is None:
            return f"trial {self.trial} failed after {self.seconds:.1f} s ({parameters}): {self.error}"
        return (
            f"trial {self.trial}: RMSE {wording.number(self.rmse)} at round {self.best_rounds} of {self.rounds}, "
            f"{self.seconds:.1f} s ({parameters}), ended by {self.stopped_by.replace('_', ' ')}"
        )


class TrialStore:
    """Completed trials as one small JSON file each, in a folder below `uri` that is the search's alone.

    `fingerprint` tells the search from others.
    """

    def __init__(self, uri: str, fingerprint: str) -> None:
        self._uri = storage.join(uri, "trials", fingerprint[:32])

    def load(self) -> list[TrialRecord]:
        """The kept trials, by their numbers."""
        found: list[TrialRecord] = []
        for uri in storage.list_files(self._uri):
            if uri.endswith(".json"):
                with contextlib.suppress(ValidationError):  # it is damaged: the trial is run again
                    found.append(TrialRecord.model_validate_json(storage.read_bytes(uri)))
        return found

    def save(self, record: TrialRecord) -> None:
        """Keep one completed trial, atomically."""
        uri = storage.join(self._uri, f"{record.trial:05d}.json")
        storage.write_bytes(uri, record.model_dump_json(indent=2).encode())


def fingerprint(params: TuneModelParams, origins: Mapping[str, object]) -> str:
    """Identifies a search: trials with the same one are comparable, whatever the number of trials.

    `origins`: code, libraries and inputs, see `StepRequest.origins`.
    """
    resolved = params.resolved()
    trial = {name: resolved[name] for name in ("num_boost_round", "early_stopping_rounds", "seed")}
    text = json.dumps({"trial": trial, "ranges": params.ranges(), "origins": origins}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class SearchResult:
    """All trials, by number. `resumed`: so many of them an earlier attempt had finished.

    `repeatable`: whether a search with the same settings on as many CPUs tries the same trials and finds the same,
    interrupted or not. It is not where a scheduler may stop trials, which depends on the order in which they report,
    where a trial failed, or where an interrupted search could not be continued as it had begun.
    """

    records: list[TrialRecord]
    resumed: int
    repeatable: bool


def search_space(params: TuneModelParams) -> dict[str, IntDistribution | FloatDistribution]:
    """Optuna's distributions of the tuned parameters; both ends of a range belong to it."""
    from optuna.distributions import FloatDistribution, IntDistribution

    return {
        name: IntDistribution(*bounds)
        if TUNED[name].kind is int
        else FloatDistribution(*bounds, log=TUNED[name].logarithmic)
        for name, bounds in params.ranges().items()
    }


def first_trial(params: TuneModelParams) -> dict[str, float | int]:
    """Parameters of the first trial: customary values, moved into the ranges."""
    return {name: min(max(TUNED[name].customary, low), high) for name, (low, high) in params.ranges().items()}


class TrialProposals:
    """Proposes the parameters of each trial: the same ones on a busy machine, where trials end in another order.

    Trial n is proposed from the results of the trials up to n - lag, and waits for these. Later trials count as
    running, whether they have ended or not. The lag grows with the number of trials at a time, so that few wait for a
    long one. Random proposals need no results.

    `finished` are the trials of an interrupted search. All its proposals are made once more, with the results that are
    known. Where they differ from `finished` (another number of trials at a time, trials that SageMaker proposed),
    `replayed` is False: the algorithm then learns from `finished`, and proposes from another seed.
    `numbers`: of the trials that have begun, by the ids that Ray Tune gives them.
    """

    def __init__(self, params: TuneModelParams, finished: list[TrialRecord], concurrent: int) -> None:
        resolved = params.resolved()
        random = resolved["search_algorithm"] == "random"
        self._lag = resolved["num_trials"] if random else max(concurrent, 2 * concurrent - 2)
        self.numbers: dict[str, int] = {}
        self._begin(_algorithm(params, resolved["seed"], first_trial(params)), count(1))
        self.replayed = self._replay({record.trial: record for record in finished})
        if not self.replayed:
            # The same seed would propose the finished trials again.
            algorithm = _algorithm(params, (resolved["seed"] + len(finished)) % 2**32)
            for record in finished:
                if record.rmse is not None:
                    algorithm.add_evaluated_point(record.parameters, record.rmse)
            taken = {record.trial for record in finished}
            self._begin(algorithm, (number for number in count(1) if number not in taken))

    def _begin(self, algorithm: OptunaSearch, numbers: Iterator[int]) -> None:
        self._algorithm, self._free_numbers = algorithm, numbers
        self._proposed: list[int] = []  # numbers of trials, in order
        self._learned = 0  # so many of them, from the first on, have results that the algorithm knows
        self._rmse: dict[int, float | None] = {}  # of the trials that have ended; None if they failed
        self._waiting: list[tuple[int, dict[str, Any]]] = []  # proposed, but not yet begun

    def _replay(self, finished: dict[int, TrialRecord]) -> bool:
        """Make the proposals up to the last finished trial; whether they are those that were tried."""
        for _ in range(max(finished, default=0)):
            if (proposal := self._propose()) is None:
                return False
            number, parameters = proposal
            if number not in finished:
                self._waiting.append(proposal)
            elif finished[number].parameters != parameters:
                return False
            else:
                self._rmse[number] = finished[number].rmse
        return True

    def _propose(self) -> tuple[int, dict[str, Any]] | None:
        """Number and parameters of the next trial; None if a result that it depends on is not there."""
        known = max(len(self._proposed) + 1 - self._lag, self._learned)
        needed = self._proposed[self._learned : known]
        if any(number not in self._rmse for number in needed):
            return None
        for number in needed:
            rmse = self._rmse[number]
            self._algorithm.on_trial_complete(str(number), None if rmse is None else {"rmse": rmse}, error=rmse is None)
        self._learned = known
        number = next(self._free_numbers)
        parameters = self._algorithm.suggest(str(number))
        assert isinstance(parameters, dict)  # Optuna always has another proposal
        self._proposed.append(number)
        return number, parameters

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The parameters of a trial that begins; None if it has to wait for results."""
        proposal = self._waiting.pop(0) if self._waiting else self._propose()
        if proposal is None:
            return None
        self.numbers[trial_id], parameters = proposal
        return parameters

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take the result of a trial."""
        self._rmse[self.numbers[trial_id]] = result["rmse"] if result and not error else None


def _algorithm(params: TuneModelParams, seed: int, first: dict[str, float | int] | None = None) -> OptunaSearch:
    """The search algorithm before any trial; it proposes `first` to begin with."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    resolved = params.resolved()
    if resolved["search_algorithm"] == "random":
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        startup = max(3, min(10, resolved["num_trials"] // 3))
        # constant_liar: trials that run at the same time must differ.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
    return OptunaSearch(
        search_space(params),  # pyright: ignore[reportArgumentType]  # invariant dict
        metric="rmse",
        mode="min",
        sampler=sampler,
        points_to_evaluate=None if first is None else [first],
    )
