"""What the search proposes, and how the cluster is divided among workers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from step_scripts.parameters import PRESETS, TUNED, TuneModelParams
from step_scripts.runner.cluster_resources import cpus_per_worker
from step_scripts.training.boosting import useful_threads
from step_scripts.training.trials import TrialProposals, TrialRecord, fingerprint, first_trial
from tests.split_files import TABLE


def _range(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, Any]]:
    """Two values in order; often the same."""
    return st.one_of(st.tuples(values, values).map(lambda pair: (min(pair), max(pair))), values.map(lambda v: (v, v)))


_FRACTION = st.floats(1e-4, 1.0)
_RANGES = st.fixed_dictionaries(
    {
        "max_depth": _range(st.integers(1, 20)),
        "eta": _range(_FRACTION),
        "min_child_weight": _range(st.floats(0.0, 1e4)),
        "subsample": _range(_FRACTION),
    }
)


def _params(ranges: dict[str, tuple[Any, Any]], **others: Any) -> TuneModelParams:
    bounds = {f"{name}_{end}": pair[i] for name, pair in ranges.items() for i, end in enumerate(("min", "max"))}
    return TuneModelParams(table=TABLE, **bounds, **others)


def _record(number: int, parameters: dict[str, float | int], rmse: float | None) -> TrialRecord:
    return TrialRecord(
        trial=number, parameters=parameters, rmse=rmse, rounds=1, best_rounds=1, seconds=0.1,
        status="failed" if rmse is None else "completed", stopped_by="error" if rmse is None else "all_rounds",
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(ranges=_RANGES, algorithm=st.sampled_from(["optuna", "random"]), seed=st.integers(0, 2**31 - 1))
def test_proposals_stay_within_the_ranges(ranges: dict[str, tuple[Any, Any]], algorithm: str, seed: int) -> None:
    params = _params(ranges, search_algorithm=algorithm, seed=seed, num_trials=9)
    search = TrialProposals(params, [], concurrent=1)
    for number in range(9):
        proposed = search.suggest(str(number))
        assert proposed is not None
        assert set(proposed) == set(TUNED)
        if number == 0:
            assert proposed == pytest.approx(first_trial(params))
        for name, (low, high) in ranges.items():
            assert low <= proposed[name] <= high
        assert isinstance(proposed["max_depth"], int)
        search.on_trial_complete(str(number), {"rmse": 1.0 + abs(proposed["eta"] - 0.3)})


def _rmse(parameters: dict[str, Any]) -> float:
    return 10 + abs(parameters["eta"] - 0.11) + parameters["max_depth"] / 7


def _search(
    params: TuneModelParams, concurrent: int, ends: list[int], done: list[TrialRecord], up_to: int
) -> dict[int, dict[str, Any]]:
    """All proposals by number, of a search with `done` that goes on until `up_to` trials are, which are added to it.

    `ends` says which of the trials that run ends next.
    """
    search = TrialProposals(params, list(done), concurrent)
    assert search.replayed
    proposed = {record.trial: record.parameters for record in done}
    total, running, waits = params.num_trials or 0, [], 0
    while len(done) < up_to:
        while len(running) < concurrent and len(done) + len(running) < total:
            if (proposal := search.suggest(trial_id := f"id-{len(proposed)}-{waits}")) is None:
                waits += 1
                assert running, "nothing runs whose end it could wait for"
                break
            proposed[search.numbers[trial_id]] = proposal
            running.append(trial_id)
        trial_id = running.pop(ends[len(done)] % len(running))
        number = search.numbers[trial_id]
        search.on_trial_complete(trial_id, {"rmse": _rmse(proposed[number])})
        done.append(_record(number, proposed[number], _rmse(proposed[number])))
    return proposed


@settings(max_examples=40)
@given(
    algorithm=st.sampled_from(["optuna", "random"]),
    concurrent=st.integers(1, 4),
    ends=st.lists(st.integers(0, 3), min_size=14, max_size=14),
    others=st.lists(st.integers(0, 3), min_size=14, max_size=14),
    interruptions=st.lists(st.integers(0, 13), max_size=3).map(sorted),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_search_proposes_the_same_trials_in_whatever_order_they_end_and_after_interruptions(
    algorithm: str, concurrent: int, ends: list[int], others: list[int], interruptions: list[int], seed: int
) -> None:
    params = TuneModelParams.model_validate(
        {"table": TABLE, "num_trials": 14, "search_algorithm": algorithm, "seed": seed}
    )
    undisturbed = _search(params, concurrent, ends, [], 14)
    done: list[TrialRecord] = []
    for up_to in interruptions:
        _search(params, concurrent, others, done, up_to)
    assert _search(params, concurrent, others, done, 14) == undisturbed
    assert len({str(parameters) for parameters in undisturbed.values()}) == 14


@pytest.mark.parametrize("algorithm", ["optuna", "random"])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_where_a_search_cannot_be_repeated_other_trials_follow(algorithm: str, preset: str) -> None:
    """The trials are those of another seed, as where SageMaker has proposed trials."""
    params = TuneModelParams.model_validate({"table": TABLE, "preset": preset, "search_algorithm": algorithm})
    search, done = TrialProposals(params.model_copy(update={"seed": 5}), [], concurrent=3), []
    for number in range(3):
        proposed = search.suggest(str(number))
        assert proposed is not None
        done.append(_record(number + 1, proposed, 10.0 + number))
    resumed = TrialProposals(params, done, concurrent=3)
    assert not resumed.replayed
    again = [resumed.suggest(str(number)) for number in range(3)]
    assert not [p for p in again if p in [r.parameters for r in done]]
    assert [resumed.numbers[str(number)] for number in range(3)] == [4, 5, 6]


def test_a_trial_that_takes_long_holds_up_only_those_that_are_proposed_from_it() -> None:
    search = TrialProposals(TuneModelParams(table=TABLE, num_trials=9), [], concurrent=3)
    assert all(search.suggest(str(number)) for number in (1, 2, 3))
    for number in (2, 3):
        search.on_trial_complete(str(number), {"rmse": 1.0})
    assert search.suggest("4") is not None
    assert search.suggest("5") is None
    search.on_trial_complete("1", error=True)
    assert all(search.suggest(str(number)) for number in (5, 6, 7))
    assert search.suggest("8") is None


def test_the_search_learns_from_finished_trials() -> None:
    params = _params(
        {"subsample": (0.2, 1.0), "eta": (0.1, 0.1), "max_depth": (3, 3), "min_child_weight": (1, 1)}, num_trials=60
    )
    near = [0.2 + 0.016 * i for i in range(51)]
    done = [
        _record(i + 1, {"max_depth": 3, "eta": 0.1, "min_child_weight": 1.0, "subsample": s}, abs(s - 0.7))
        for i, s in enumerate(near)
    ]
    search = TrialProposals(params, done, concurrent=5)
    assert not search.replayed
    proposed = [search.suggest(str(i)) for i in range(5)]
    assert all(p is not None and abs(p["subsample"] - 0.7) < 0.15 for p in proposed)


def test_fingerprint_changes_with_what_makes_trials_comparable() -> None:
    def of(digest: str = "a", **values: Any) -> str:
        return fingerprint(TuneModelParams(table=TABLE, **values), {"train": digest})

    assert of() == of(num_trials=100, engine="xgboost_ray", max_concurrent_trials=1)
    assert len({of(), of("b"), of(eta_max=0.15), of(seed=1), of(num_boost_round=7), of(preset="article")}) == 6


@settings(max_examples=200)
@given(nodes=st.lists(st.integers(1, 16), min_size=1, max_size=5), num_workers=st.integers(1, 40))
def test_workers_fit_and_use_what_there_is(nodes: list[int], num_workers: int) -> None:
    nodes = sorted(nodes, reverse=True)
    cpus = cpus_per_worker(num_workers, nodes)
    if cpus == 0:
        assert num_workers > sum(nodes)
    else:
        assert sum(n // cpus for n in nodes) >= num_workers
        assert sum(n // (cpus + 1) for n in nodes) < num_workers


@given(rows=st.integers(1, 10**9), cpus=st.integers(1, 256))
def test_threads_are_between_one_and_the_cpus(rows: int, cpus: int) -> None:
    threads = useful_threads(rows, cpus)
    assert 1 <= threads <= cpus
    assert threads == 1 or rows > 20_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eta_min": 0.5, "eta_max": 0.1}, "eta_min"),
        ({"max_depth_min": 7}, "max_depth_min"),
        ({"num_trials": 0}, "num_trials"),
        ({"subsample_max": 1.5}, "subsample_max"),
    ],
)
def test_impossible_ranges_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TuneModelParams(table=TABLE, **values)
