"""A model artifact, loaded to answer requests: raw features in, predictions out, in the media types that are agreed on.

It imports no server: AWS's image has one of its own.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

import numpy as np

from step_scripts.model import FILES, Scaler, load_model, xgb
from step_scripts.runner.contract import Artifact, DamagedArtifactError, check_files, file_info
from step_scripts.serving.deployment import CSV, JSON, JSON_LINES, MAX_BODY_BYTES, AnsweredRequest, DeploymentRecord
from step_scripts.serving.feature_parser import FeatureParser
from step_scripts.serving.request_rows import RequestError

_ROWS_ON_ONE_THREAD = 256  # with fewer, waking other threads takes longer than the trees
_MEDIA = {CSV: CSV, JSON: JSON, JSON_LINES: JSON_LINES, "application/x-jsonlines": JSON_LINES}
_MEDIA |= {"application/jsonl": JSON_LINES, "application/x-ndjson": JSON_LINES, "application/ndjson": JSON_LINES}
_WILDCARDS = {"*/*": "", "text/*": CSV, "application/*": ""}
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_FORMS = {  # of answers: before the first prediction, between two, after the last
    CSV: ("", "\n", "\n"),
    JSON: ('{"predictions": [', ", ", "]}"),
    JSON_LINES: ('{"prediction": ', '}\n{"prediction": ', "}\n"),
}
_ENCODED = 4096  # predictions
_GZIP = 16 + zlib.MAX_WBITS


@dataclass(frozen=True)
class ServedModel:
    """Immutable once loaded, so that it can be replaced as a whole while requests are answered."""

    record: DeploymentRecord
    parser: FeatureParser
    scaler: Scaler
    small: xgb.Booster
    large: xgb.Booster

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Predictions, float32, of raw features (float64, shape (rows, features))."""
        scaled = ((features - self.scaler.mean) / self.scaler.scale).astype(np.float32, order="C")
        booster = self.small if len(scaled) < _ROWS_ON_ONE_THREAD else self.large
        return booster.inplace_predict(scaled, validate_features=False)

    def answer(self, body: bytes, content_type: str, accept: str, content_encoding: str = "") -> AnsweredRequest:
        """The request, of which the last three are headers, with its answer. Raises `RequestError`."""
        given = request_media(content_type or "")
        wanted = response_media(accept or "", given)
        content = unpacked(body, content_encoding)
        answer = encode(self.predict(self.parser.parse(content, given)), wanted)
        return AnsweredRequest(datetime.now(UTC), given, content, wanted, answer)


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
    model = ServedModel(record, FeatureParser(small.table), small.scaler, small.booster, large.booster)
    for rows in (1, _ROWS_ON_ONE_THREAD):  # the first prediction of a booster prepares its trees
        model.predict(np.tile(small.scaler.mean, (rows, 1)))
    return model


@lru_cache(maxsize=256)
def request_media(content_type: str) -> str:
    """`CSV`, `JSON` or `JSON_LINES`. Raises `RequestError` 415 for another type or an encoding other than UTF-8."""
    name, parameters = _media_type(content_type)
    if (charset := parameters.get("charset", "utf-8").strip('"')) not in _CHARSETS:
        raise RequestError(415, f"charset {charset} is not supported; send UTF-8")
    if name not in _MEDIA:
        given = f"content type {name!r} is not supported" if name else "the request has no Content-Type"
        raise RequestError(415, f"{given}; send {CSV}, {JSON} or {JSON_LINES}")
    return _MEDIA[name]


@lru_cache(maxsize=256)
def response_media(accept: str, default: str) -> str:
    """The type among those of an Accept header with the highest weight; `default` where it leaves the choice.

    Raises `RequestError` 406 if it names none that can be sent.
    """
    if not accept.strip():
        return default
    best, best_weight = "", 0.0
    for entry in accept.split(","):
        name, parameters = _media_type(entry)
        try:
            weight = float(parameters.get("q", 1.0))
        except ValueError:
            weight = 0.0
        media = _WILDCARDS[name] or default if name in _WILDCARDS else _MEDIA.get(name, "")
        if media and weight > best_weight:
            best, best_weight = media, weight
    if not best:
        raise RequestError(406, f"{accept!r} cannot be sent; accepted are {CSV}, {JSON} and {JSON_LINES}")
    return best


def _media_type(text: str) -> tuple[str, dict[str, str]]:
    """The name and the parameters of a media type, in lower case."""
    name, *parameters = (part.strip() for part in text.lower().split(";"))
    pairs = (parameter.partition("=") for parameter in parameters)
    return name, {key.strip(): value.strip() for key, _, value in pairs}


def encode(predictions: np.ndarray, media: str) -> bytes:
    """Predictions as a body: one a line (CSV), `{"predictions": [...]}` (JSON), `{"prediction": x}` lines."""
    before, between, after = _FORMS[media]
    # In parts, between which other threads have their turn: one call for all would hold them up.
    parts = (predictions[at : at + _ENCODED].tolist() for at in range(0, len(predictions), _ENCODED))
    values = between.join(between.join(map(repr, part)) for part in parts)
    return f"{before}{values}{after}".encode()


def unpacked(body: bytes, encoding: str) -> bytes:
    """The body without its Content-Encoding.

    Raises `RequestError` 415 for another one than gzip, 400 if it is not what it says, 413 if it is too large then.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in ("gzip", "x-gzip"):
        raise RequestError(415, f"content encoding {encoding[:100]!r} is not supported; send gzip, or none")
    stream = zlib.decompressobj(wbits=_GZIP)
    try:
        content = stream.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error as error:
        raise RequestError(400, f"the body is not gzip: {error}") from error
    if len(content) > MAX_BODY_BYTES:
        raise too_large()
    if not stream.eof or stream.unused_data:
        problem = "something follows its end" if stream.eof else "its end is missing"
        raise RequestError(400, f"the body is not one gzip stream: {problem}")
    return content


def too_large() -> RequestError:
    """The refusal of a body that is larger than the limit."""
    return RequestError(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send the rows in several requests")
