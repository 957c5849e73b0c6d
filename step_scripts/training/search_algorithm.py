"""What the hyperparameter search tries: Optuna's samplers behind Ray Tune's interface, also after an interruption."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from step_scripts.parameters import TuneModelParams
from step_scripts.training.trial_records import TrialRecord

# Where people would begin; the ranges clip it.
_FIRST_TRIAL = {"max_depth": 3, "eta": 0.1, "min_child_weight": 1.0, "subsample": 0.8}


def search_space(params: TuneModelParams) -> dict[str, IntDistribution | FloatDistribution]:
    """Optuna's distributions of the tuned parameters; both ends of a range belong to it. `eta` is logarithmic."""
    v = params.resolved()
    return {
        "max_depth": IntDistribution(v["max_depth_min"], v["max_depth_max"]),
        "eta": FloatDistribution(v["eta_min"], v["eta_max"], log=True),
        "min_child_weight": FloatDistribution(v["min_child_weight_min"], v["min_child_weight_max"]),
        "subsample": FloatDistribution(v["subsample_min"], v["subsample_max"]),
    }


def first_trial(params: TuneModelParams) -> dict[str, float | int]:
    """Parameters of the first trial: customary values, moved into the ranges."""
    return {name: min(max(_FIRST_TRIAL[name], d.low), d.high) for name, d in search_space(params).items()}


def searcher(params: TuneModelParams, finished: list[TrialRecord], concurrent: int = 1) -> ContinuedSearch:
    """The search algorithm, in the state in which a search was that `finished` these trials, in that order.

    It goes through the earlier search once more: the same proposals, and the results that are known. Where that is not
    possible (trials failed, or others ran at the same time), it is only told of the results and proposes others.
    """
    resolved = params.resolved()
    seed, trials = resolved["seed"], resolved["num_trials"]
    search = _algorithm(params, seed)
    # Random proposals do not depend on results, and so not on how many trials run at a time.
    waiting = _replay(search, finished, trials if resolved["search_algorithm"] == "random" else concurrent, trials)
    if waiting is not None:
        return ContinuedSearch(search, waiting)
    # Another seed: the same one would propose the finished trials again.
    search = _algorithm(params, (seed + len(finished)) % 2**32, first=False)
    for record in finished:
        if record.rmse is not None:
            search.add_evaluated_point(record.parameters, record.rmse)
    return ContinuedSearch(search, {}, replayed=False)


def _algorithm(params: TuneModelParams, seed: int, first: bool = True) -> OptunaSearch:
    """The search algorithm before any trial; `first`: it proposes `first_trial` to begin with."""
    resolved = params.resolved()
    if resolved["search_algorithm"] == "random":
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        startup = max(3, min(10, resolved["num_trials"] // 3))
        # constant_liar: trials that run at the same time shall not be alike.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
    return OptunaSearch(
        search_space(params),  # pyright: ignore[reportArgumentType]  # invariant dict
        metric="rmse",
        mode="min",
        sampler=sampler,
        points_to_evaluate=[first_trial(params)] if first else None,
    )


def _replay(
    search: OptunaSearch, finished: list[TrialRecord], concurrent: int, num_trials: int
) -> dict[int, dict[str, Any]] | None:
    """Have `search` propose and learn as it did when the trials ran: the next proposal whenever one of them ended.

    What it has proposed and was not finished, by number; None if it proposes something else than was tried.
    """
    proposed: dict[int, Any] = {}

    def propose() -> None:
        if (number := len(proposed) + 1) <= num_trials:
            proposed[number] = search.suggest(str(number))

    if not finished:
        return proposed
    for _ in range(concurrent):
        propose()
    for record in finished:
        if proposed.get(record.trial) != record.parameters:
            return None
        search.on_trial_complete(str(record.trial), {"rmse": record.rmse})
        propose()
    done = {record.trial for record in finished}
    return {number: parameters for number, parameters in proposed.items() if number not in done}


class ContinuedSearch(Searcher):
    """`search`, which has made the proposals `waiting` (by the trial's number) already: they are tried first.

    `replayed`: whether its proposals are those of a search that was not interrupted.
    """

    def __init__(self, search: OptunaSearch, waiting: dict[int, dict[str, Any]], replayed: bool = True) -> None:
        super().__init__(metric="rmse", mode="min")
        self.replayed = replayed
        self._search = search
        self._waiting = sorted(waiting.items())
        self._names: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The parameters of a trial that begins."""
        if not self._waiting:
            return self._search.suggest(trial_id)
        number, parameters = self._waiting.pop(0)
        self._names[trial_id] = str(number)
        return parameters

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell the algorithm of a report."""
        self._search.on_trial_result(self._names.get(trial_id, trial_id), result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the algorithm of an end."""
        self._search.on_trial_complete(self._names.get(trial_id, trial_id), result, error)

    def save(self, checkpoint_path: str) -> None:
        """For Ray Tune, which writes a file that is never read."""

    def restore(self, checkpoint_path: str) -> None:
        """Searches go on from the records of their trials instead."""
        raise NotImplementedError
