"""A model artifact, loaded to answer requests: raw features in, predictions out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from step_scripts.model.artifact import FILES, load_model
from step_scripts.model.xgboost_native import xgb
from step_scripts.runner.contract import Artifact, DamagedArtifactError, check_files, file_info
from step_scripts.serving.deployment import DeploymentRecord
from step_scripts.serving.feature_parser import FeatureParser
from step_scripts.serving.media import encode, request_media, response_media, unpacked

_ROWS_ON_ONE_THREAD = 256  # with fewer, waking other threads takes longer than the trees


class Answer(NamedTuple):
    """What was asked, without its Content-Encoding, and what is answered, each with its media type."""

    input_type: str
    input_body: bytes
    output_type: str
    output_body: bytes


@dataclass(frozen=True)
class ServedModel:
    """Immutable once loaded, so that it can be replaced as a whole while requests are answered."""

    record: DeploymentRecord
    parser: FeatureParser
    mean: np.ndarray
    scale: np.ndarray
    small: xgb.Booster
    large: xgb.Booster

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Predictions, float32, of raw features (float64, shape (rows, features))."""
        scaled = ((features - self.mean) / self.scale).astype(np.float32, order="C")
        booster = self.small if len(scaled) < _ROWS_ON_ONE_THREAD else self.large
        return booster.inplace_predict(scaled, validate_features=False)

    def answer(self, body: bytes, content_type: str, accept: str, content_encoding: str = "") -> Answer:
        """The answer to a request; the last three are its headers. Raises `RequestError`.

        It imports no server: AWS's image has one of its own.
        """
        given = request_media(content_type or "")
        wanted = response_media(accept or "", given)
        content = unpacked(body, content_encoding)
        return Answer(given, content, wanted, encode(self.predict(self.parser.parse(content, given)), wanted))

    def description(self) -> dict[str, Any]:
        """What `/ping` says."""
        return {
            "status": "InService",
            "endpoint_name": self.record.endpoint_name,
            "version": self.record.version,
            "model_digest": self.record.model.digest,
            "deployment_id": self.record.deployment_id,
        }


def container_record(folder: str, name: str = "model") -> DeploymentRecord:
    """What a container serves: the model in `folder`, such as `/opt/ml/model`, which has no record of its own.

    The environment gives its version (else it is `name`) and the digest that it is checked against. Raises
    `DamagedArtifactError` naming a file that is missing, or if it is another model.
    """
    try:
        found = Artifact.of(folder, [file_info(f"{folder.rstrip('/')}/{file}", folder) for file in FILES])
    except FileNotFoundError as error:
        raise DamagedArtifactError(f"{folder} is no model artifact: {error}") from error
    digest, version = os.environ.get("HOUSING_MODEL_DIGEST"), os.environ.get("HOUSING_MODEL_VERSION", name)
    if digest and found.digest != digest:
        raise DamagedArtifactError(f"{folder} holds model {found.digest}, not the deployed one, {digest}")
    return DeploymentRecord(
        deployment_id="", endpoint_name=name, version=version, model=found, deployed_at=datetime.now(UTC)
    )


def load_served_model(record: DeploymentRecord) -> ServedModel:
    """Verify the files of the model, load them, and predict once.

    Raises `DamagedArtifactError` naming the file that is missing, altered or unreadable.
    """
    artifact = record.model
    check_files(artifact, "all")
    try:
        small, large = load_model(artifact.uri, threads=1), load_model(artifact.uri)
    except (xgb.core.XGBoostError, ValueError, KeyError, FileNotFoundError) as error:
        summary = str(error).partition("\n")[0]
        raise DamagedArtifactError(f"{artifact.uri} is no model artifact: {type(error).__name__}: {summary}") from error
    model = ServedModel(
        record=record,
        parser=FeatureParser(small.table),
        mean=small.scaler.mean,
        scale=small.scaler.scale,
        small=small.booster,
        large=large.booster,
    )
    for rows in (1, _ROWS_ON_ONE_THREAD):  # the first prediction of a booster prepares its trees
        model.predict(np.tile(model.mean, (rows, 1)))
    return model
