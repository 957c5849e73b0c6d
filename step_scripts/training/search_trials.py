"""The trials of the search: what they try, by Optuna's samplers, how one runs, and which are stopped early.

Processes of trials import this module, and do without Optuna, which takes half a second to import; drivers have it from
`search`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any, Self

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from step_scripts.model import xgb
from step_scripts.parameters import TUNED, TuneModelParams
from step_scripts.training.boosting import TrialBoosting, quantile_matrices, useful_threads
from step_scripts.training.trials import TrialRecord

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution, IntDistribution
    from ray.tune.search.optuna import OptunaSearch

_REPORTS_PER_TRIAL = 8
_ROUNDS_WITHOUT_SCHEDULER = 250
_REDUCTION_FACTOR = 3


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


class LivesInDriver:
    """Base of what Ray Tune would copy, or write to a file that is never read, although the running search uses it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


class TrialProposals(LivesInDriver, Searcher):
    """Proposes the parameters of each trial: the same ones on a busy machine, where trials end in another order.

    Trial n is proposed from the results of the trials up to n - lag, and waits for these. Later trials count as
    running, whether they have ended or not. The lag grows with the number of trials at a time, so that few wait for a
    long one. Random proposals need no results.

    `finished` are the trials of an interrupted search. All its proposals are made once more, with the results that are
    known. Where they differ from `finished` (another number of trials at a time, trials that SageMaker proposed),
    `replayed` is False: the algorithm then learns from `finished`, and proposes from another seed.
    """

    def __init__(self, params: TuneModelParams, finished: list[TrialRecord], concurrent: int) -> None:
        super().__init__(metric="rmse", mode="min")
        resolved = params.resolved()
        random = resolved["search_algorithm"] == "random"
        self._lag = resolved["num_trials"] if random else max(concurrent, 2 * concurrent - 2)
        self._numbers: dict[str, int] = {}
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

    def number_of(self, trial_id: str) -> int:
        """The number of the trial that Ray Tune calls `trial_id`."""
        return self._numbers[trial_id]

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The parameters of a trial that begins; None if it has to wait for results."""
        proposal = self._waiting.pop(0) if self._waiting else self._propose()
        if proposal is None:
            return None
        self._numbers[trial_id], parameters = proposal
        return parameters

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take the result of a trial."""
        self._rmse[self._numbers[trial_id]] = result["rmse"] if result and not error else None

    def save(self, checkpoint_path: str) -> None:
        """Ray Tune's own checkpoints are not used: a search goes on from the records of its trials."""


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


class BoostingTrial(tune.Trainable):
    """Boosts `report_rounds` rounds a step and reports the best validation RMSE so far.

    The matrices are binned once an actor: the bins do not depend on what is tuned.
    """

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]  # `tune.with_parameters` adds the others
        self, config: dict[str, Any], *, settings: dict[str, Any], report_rounds: int, cpus: int
    ) -> None:
        """Begin the first trial in this actor, which has `cpus`. `settings` are the resolved ones of the step."""
        self._settings, self._report_rounds, self._cpus = settings, report_rounds, cpus
        self._binned: tuple[xgb.DMatrix, xgb.DMatrix] | None = None
        self.reset_config(config)

    def receive(self, matrices: list[ray.ObjectRef]) -> None:
        """Take references to the `Matrix` of each split, train first; called before the first step of each trial.

        Not a parameter of the trainable: Ray Tune keeps those, and with them the matrices, until the session ends.
        """
        self._matrices = matrices

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in this actor."""
        self._tuned = new_config
        self._boosting: TrialBoosting | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Boost until the next report, early stopping or the last round."""
        boosting = self._boosting = self._boosting or self._begin()
        stopped_by = boosting.advance(self._report_rounds)
        return {
            "rmse": boosting.best_rmse,
            "rounds": boosting.rounds,
            "best_rounds": boosting.best_rounds,
            "stopped_by": stopped_by or "scheduler",
            "done": stopped_by is not None,
        }

    def _begin(self) -> TrialBoosting:
        if self._binned is None:
            train, validation = ray.get(self._matrices)  # mapped, not copied
            self._threads = useful_threads(len(train.target), self._cpus)
            self._binned = quantile_matrices(train, validation, self._threads)
        return TrialBoosting(self._binned, self._tuned, self._threads, self._settings)


def report_rounds(rounds: int, stops_early: bool) -> int:
    """Rounds between two reports of a trial. Only the early-stopping scheduler and people who wait need them."""
    if not stops_early:
        return min(rounds, _ROUNDS_WITHOUT_SCHEDULER)
    return max(1, min(100, -(-rounds // _REPORTS_PER_TRIAL)))


def scheduler(name: str, rounds: int, reported: int) -> TrialScheduler:
    """What stops bad trials early. It waits for an eighth of the rounds: a small `eta` begins slowly."""
    grace = max(reported, rounds // 8)
    if name == "asha":
        return ASHAScheduler(
            time_attr="rounds", max_t=max(rounds, grace), grace_period=grace, reduction_factor=_REDUCTION_FACTOR
        )
    if name == "median":
        return MedianStoppingRule(time_attr="rounds", grace_period=grace, min_samples_required=2)
    return _ToTheirEnd()


class _ToTheirEnd(FIFOScheduler):
    """Runs all trials to their end. A trial whose actor is starting is left to that actor.

    Ray Tune would move it to an actor that is free, end the one that is starting, and start another for the next trial.
    In a search of short trials one actor would do all the work, and the CPUs would be busy with starting others.
    """

    def choose_trial_to_run(self, tune_controller: Any, **kwargs: Any) -> None:
        """None: trials that wait begin in their order, in actors that are free before others are started."""
        return
