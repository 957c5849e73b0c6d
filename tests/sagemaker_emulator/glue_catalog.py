"""The Glue Data Catalog: moto's, with what it lacks.

AWS keeps names in lower case, checks requests against the service model, and refuses an `UpdateTable` that names a
version which is not the table's latest: that is the lock of Iceberg's writers. Moto does none of it, and keeps every
version, whatever `SkipArchive` says.
"""

import io
import json
import threading
from typing import Any

from moto.core.exceptions import JsonRESTError
from moto.glue.models import glue_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from werkzeug.wrappers import Request, Response

from tests.sagemaker_emulator.authorization import body_of
from tests.sagemaker_emulator.common import ACCOUNT, Params
from tests.sagemaker_emulator.errors import ApiError
from tests.sagemaker_emulator.validation import check

TARGET = "AWSGlue."
_NAMES = ("Name", "DatabaseName", "TableName")


class GlueCatalog:
    """Answers Glue's requests."""

    def __init__(self, moto: DomainDispatcherApplication) -> None:
        self._moto = moto
        self._lock = threading.Lock()

    def answer(self, request: Request, region: str) -> Response:
        """The answer to a request whose target begins with `TARGET`. Raises `ApiError`."""
        operation = request.headers["X-Amz-Target"].removeprefix(TARGET)
        params = json.loads(body_of(request) or b"{}")
        check("glue", operation, params)
        params = _in_lower_case(params)
        body = json.dumps(params).encode()
        request.environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        if operation != "UpdateTable":
            return Response.from_app(self._moto, request.environ)
        with self._lock:
            return self._update_table(request, params, region)

    def _update_table(self, request: Request, params: Params, region: str) -> Response:
        table = _table(region, params["DatabaseName"], params["TableInput"]["Name"])
        before = None if table is None else table.as_dict()["VersionId"]
        if before is not None and params.get("VersionId") not in (None, before):
            raise ApiError("ConcurrentModificationException", "Update table failed due to concurrent modifications.")
        answer = Response.from_app(self._moto, request.environ)
        if table is not None and params.get("SkipArchive") and answer.status_code == 200:
            table.delete_version(before)
        return answer


def _table(region: str, database: str, name: str) -> Any:
    try:
        return glue_backends[ACCOUNT][region].get_table(database, name)
    except JsonRESTError:
        return None  # moto says what is missing


def _in_lower_case(params: Params) -> Params:
    """The request with the names of databases and tables as Glue keeps them."""
    changed = {name: value.lower() if name in _NAMES and isinstance(value, str) else value
               for name, value in params.items()}  # fmt: skip
    for member in ("DatabaseInput", "TableInput"):
        if member in params:
            changed[member] = {**params[member], "Name": params[member]["Name"].lower()}
    return changed
