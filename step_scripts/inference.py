"""The model in AWS's XGBoost image, whose own server calls these functions.

That server (the SageMaker containers library) imports this module as `inference`, calls `model_fn` once a process and
`transform_fn` for every request. Answers and errors are those of `step_scripts.serving.app`.
"""

from __future__ import annotations

import json
from typing import Any

from step_scripts.serving.deployment import JSON
from step_scripts.serving.request_rows import RequestError
from step_scripts.serving.served_model import ServedModel, container_record, load_served_model


def model_fn(model_dir: str) -> ServedModel:
    """The model in the folder. Raises `DamagedArtifactError` if it is not the one that was deployed."""
    return load_served_model(container_record(model_dir))


def transform_fn(model: ServedModel, content: bytes | str, content_type: str, accept: str) -> Any:
    """The answer to one request: body and media type, or a Flask response with status and reason."""
    try:
        answer = model.answer(content.encode() if isinstance(content, str) else content, content_type, accept)
        return answer.output_body.decode(), answer.output_type
    except RequestError as error:
        from flask import Response  # the server's own framework; a plain result would have status 200

        return Response(json.dumps(error.body()), status=error.status, mimetype=JSON)
