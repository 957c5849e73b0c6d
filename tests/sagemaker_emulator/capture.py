"""Data capture of endpoints: JSON lines on S3, in SageMaker's format."""

import base64
import json
import logging
import random
import threading
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

from botocore.exceptions import BotoCoreError, ClientError

from tests.sagemaker_emulator.common import Params
from tests.sagemaker_emulator.services import Services

log = logging.getLogger(__name__)
_MODES = {"Input": ("Input",), "Output": ("Output",), "InputAndOutput": ("Input", "Output")}


@dataclass(frozen=True)
class Exchange:
    """One request and its answer."""

    variant: str
    inference_id: str | None
    input_type: str
    input_body: bytes
    output_type: str
    output_body: bytes


class Capture:
    """Captures a sample of an endpoint's exchanges."""

    def __init__(self, services: Services, place: tuple[str, str | None], endpoint: str, config: Params) -> None:
        self._services = services
        self._region, self._role = place
        self._endpoint = endpoint
        self._config = config
        self._modes = {m for option in config["CaptureOptions"] for m in _MODES[option["CaptureMode"]]}
        headers = config.get("CaptureContentTypeHeader", {})
        self._csv = tuple(headers.get("CsvContentTypes", ["text/csv"]))
        self._json = tuple(headers.get("JsonContentTypes", ["application/json"]))
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._lines: dict[str, list[str]] = {}
        self._thread = threading.Thread(target=self._run, name=f"capture-{endpoint}", daemon=True)
        self._thread.start()

    def add(self, exchange: Exchange) -> None:
        """Record an exchange, if it falls into the sample."""
        if not self._config.get("EnableCapture"):
            return
        if random.uniform(0, 100) >= self._config["InitialSamplingPercentage"]:
            return
        data: Params = {}
        if "Input" in self._modes:
            data["endpointInput"] = self._part("INPUT", exchange.input_type, exchange.input_body)
        if "Output" in self._modes:
            data["endpointOutput"] = self._part("OUTPUT", exchange.output_type, exchange.output_body)
        metadata = {"eventId": str(uuid.uuid4()), "inferenceTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        if exchange.inference_id:
            metadata["inferenceId"] = exchange.inference_id
        line = json.dumps({"captureData": data, "eventMetadata": metadata, "eventVersion": "0"})
        with self._lock:
            self._lines.setdefault(exchange.variant, []).append(line)

    def close(self) -> None:
        """Write what is left and stop."""
        self._closed.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._closed.wait(self._services.settings.capture_flush_seconds):
            self._flush()
        if not self._services.closing.is_set():
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, {}
        for variant, found in lines.items():
            moment = datetime.now(UTC)
            name = f"{moment:%Y/%m/%d/%H/%M-%S}-{moment.microsecond // 1000:03d}-{uuid.uuid4()}.jsonl"
            base = self._config["DestinationS3Uri"].rstrip("/")
            uri = f"{base}/{self._endpoint}/{variant}/{name}"
            try:
                self._services.storage(self._region, self._role).put(uri, ("\n".join(found) + "\n").encode())
            except (ClientError, BotoCoreError):
                log.exception("captured data of endpoint %s could not be written", self._endpoint)

    def _part(self, mode: str, content_type: str, body: bytes) -> Params:
        plain = content_type.split(";")[0].strip()
        encoding = "CSV" if plain in self._csv else "JSON" if plain in self._json else "BASE64"
        text = base64.b64encode(body).decode() if encoding == "BASE64" else body.decode(errors="replace")
        return {"observedContentType": content_type, "mode": mode, "data": text, "encoding": encoding}
