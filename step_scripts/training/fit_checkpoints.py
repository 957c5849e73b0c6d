"""Checkpoints of a fit: each a booster with its history, in one file that is written atomically and proves itself."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from step_scripts.model.xgboost_native import xgb
from step_scripts.runner import storage
from step_scripts.runner.wording import counted
from step_scripts.training.boosting import history_of

_log = logging.getLogger(__name__)
_SUFFIX = ".checkpoint"
_KEPT = 2  # so that there is one before a damaged one


@dataclass(frozen=True)
class Checkpoint:
    """A model with `rounds` rounds in XGBoost's binary form, for `xgboost.train`."""

    model: bytes
    rounds: int

    @property
    def booster(self) -> xgb.Booster:
        """The model, with its history."""
        return xgb.Booster(model_file=bytearray(self.model))


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
        model = bytes(booster.save_raw("ubj"))
        name = f"{self._prefix}{booster.num_boosted_rounds():06d}{_SUFFIX}"
        try:
            storage.write_bytes(
                storage.join(self.uri, name), hashlib.sha256(model).hexdigest().encode() + b"\n" + model
            )
            for old in self._files()[:-_KEPT]:
                storage.delete(old)
        except OSError as error:
            _log.warning("round %d could not be kept below %s: %s", booster.num_boosted_rounds(), self.uri, error)

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
        if uri.rpartition("/")[2] != f"{self._prefix}{rounds:06d}{_SUFFIX}" or len(history_of(booster).train) != rounds:
            raise ValueError(f"it holds {counted(rounds, 'round')}, which is not what it should be")
        return Checkpoint(model, rounds)

    def _files(self) -> list[str]:
        """Checkpoints of this fit, by their rounds."""
        found = storage.list_files(self.uri)
        return [uri for uri in found if uri.rpartition("/")[2].startswith(self._prefix) and uri.endswith(_SUFFIX)]

    @property
    def _prefix(self) -> str:
        return f"{self.fit[:16]}-"


def _digest(model: bytes) -> bytes:
    return hashlib.sha256(model).hexdigest().encode()


def fit_fingerprint(**what: Any) -> str:
    """Identifies a fit by all that decides its result."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
