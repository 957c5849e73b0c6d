"""Requests to SageMaker endpoints, and what their errors mean."""

from __future__ import annotations

from typing import Any

from resources.aws.calls import error_code, error_message
from resources.endpoints.base import EndpointNotFound, InvocationFailed

MAX_BODY_BYTES = 6_291_456
_SHOWN = 2000


def send(
    client: Any,
    name: str,
    body: bytes,
    content_type: str,
    accept: str,
    inference_id: str | None,
) -> bytes:
    """The answer of the endpoint. Raises `EndpointNotFound`, or `InvocationFailed` with the container's answer."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        given: dict[str, Any] = {"EndpointName": name, "Body": body, "ContentType": content_type, "Accept": accept}
        if inference_id:
            given["InferenceId"] = inference_id
        answer = client.invoke_endpoint(**given)
        return answer["Body"].read()
    except ClientError as error:
        text = error_message(error)
        if error_code(error) == "ModelError":  # the container answered, with an error
            status = int(error.response.get("OriginalStatusCode", 500))
            original = str(error.response.get("OriginalMessage") or text)
            raise InvocationFailed(
                f"endpoint {name} answered {status}: {original[:_SHOWN]}", status=status, body=original.encode()
            ) from error
        if error_code(error) == "ValidationError" and "not found" in text:
            raise EndpointNotFound(text) from error
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
        raise InvocationFailed(
            f"endpoint {name}: {error_code(error)}: {text[:_SHOWN]}", status=status, body=text.encode()
        ) from error
    except BotoCoreError as error:
        raise InvocationFailed(f"endpoint {name} does not answer: {error}", status=504, body=b"") from error
