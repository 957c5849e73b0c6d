"""Hyperparameter values for tuning jobs: random and grid search over parameter ranges."""

import itertools
import math
import random
from collections.abc import Iterator

from tests.sagemaker_emulator.common import Params
from tests.sagemaker_emulator.errors import not_emulated, validation


def candidates(strategy: str, ranges: Params, seed: int | None) -> Iterator[dict[str, str]]:
    """Hyperparameter values, as strings, one set per training job.

    Bayesian search is random search here: the emulator runs jobs, it does not model objectives.
    """
    if strategy == "Grid":
        return _grid(ranges)
    return _random(ranges, random.Random(seed))


def check_ranges(strategy: str, ranges: Params) -> None:
    """Refuse what the platform refuses and what is not emulated."""
    if ranges.get("AutoParameters"):
        raise not_emulated("AutoParameters of tuning jobs")
    numeric = [*ranges.get("IntegerParameterRanges", []), *ranges.get("ContinuousParameterRanges", [])]
    categorical = ranges.get("CategoricalParameterRanges", [])
    names = [entry["Name"] for entry in [*numeric, *categorical]]
    if not names:
        raise validation("At least one hyperparameter range must be specified.")
    if len(names) != len(set(names)):
        raise validation("A hyperparameter can have only one range.")
    if strategy == "Grid" and numeric:
        raise validation("Grid search supports only categorical parameter ranges.")
    for entry in numeric:
        low, high = _number(entry, "MinValue"), _number(entry, "MaxValue")
        if low >= high:
            raise validation(f"MinValue of {entry['Name']} must be less than MaxValue.")
        scaling = entry.get("ScalingType", "Auto")
        if scaling == "Logarithmic" and low <= 0:
            raise validation(f"Logarithmic scaling of {entry['Name']} needs values greater than 0.")
        if scaling == "ReverseLogarithmic" and not (low >= 0 and high < 1):
            raise validation(f"ReverseLogarithmic scaling of {entry['Name']} needs values in [0, 1).")


def grid_size(ranges: Params) -> int:
    """Number of points of a grid."""
    return math.prod(len(entry["Values"]) for entry in ranges.get("CategoricalParameterRanges", []))


def _grid(ranges: Params) -> Iterator[dict[str, str]]:
    entries = ranges.get("CategoricalParameterRanges", [])
    for values in itertools.product(*(entry["Values"] for entry in entries)):
        yield {entry["Name"]: value for entry, value in zip(entries, values, strict=True)}


def _random(ranges: Params, source: random.Random) -> Iterator[dict[str, str]]:
    while True:
        chosen: dict[str, str] = {}
        for entry in ranges.get("IntegerParameterRanges", []):
            low, high = int(entry["MinValue"]), int(entry["MaxValue"])
            chosen[entry["Name"]] = str(min(high, max(low, round(_scaled(entry, source)))))
        for entry in ranges.get("ContinuousParameterRanges", []):
            chosen[entry["Name"]] = repr(_scaled(entry, source))
        for entry in ranges.get("CategoricalParameterRanges", []):
            chosen[entry["Name"]] = source.choice(entry["Values"])
        yield chosen


def _scaled(entry: Params, source: random.Random) -> float:
    low, high = float(entry["MinValue"]), float(entry["MaxValue"])
    scaling = entry.get("ScalingType", "Auto")
    if scaling == "Logarithmic":
        return math.exp(source.uniform(math.log(low), math.log(high)))
    if scaling == "ReverseLogarithmic":
        return 1 - math.exp(source.uniform(math.log(1 - high), math.log(1 - low)))
    return source.uniform(low, high)


def _number(entry: Params, member: str) -> float:
    try:
        return float(entry[member])
    except ValueError as error:
        raise validation(f"{member} of {entry['Name']} is not a number: {entry[member]}") from error
