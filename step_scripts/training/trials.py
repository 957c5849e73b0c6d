"""Records of trials, and where they are kept, so that an interrupted search can go on. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from step_scripts.parameters import TuneModelParams
from step_scripts.runner import storage
from step_scripts.runner.wording import number

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
            f"trial {self.trial}: RMSE {number(self.rmse)} at round {self.best_rounds} of {self.rounds}, "
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
