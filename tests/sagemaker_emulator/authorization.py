"""Who calls, and whether the policies of the caller's role allow the call.

Roles and their policies are those of moto's IAM, as they are at the moment of the call. A request that is signed with
the credentials of such a role needs its permission for everything it does; any other access key is the account's
administrator, who may do everything.
"""

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moto.iam.models import Role, iam_backends
from moto.s3.models import s3_backends
from werkzeug.wrappers import Request, Response

from tests.sagemaker_emulator.common import ACCOUNT, Params
from tests.sagemaker_emulator.errors import ApiError, not_emulated, validation
from tests.sagemaker_emulator.iam_policies import Access, Decision, PolicyError, Statement, decide, parse_policy
from tests.sagemaker_emulator.iam_requests import (
    ACTION_PREFIXES,
    FREE_ACTIONS,
    SAGEMAKER,
    accesses,
    s3_accesses,
    s3_listing,
)
from tests.sagemaker_emulator.storage import INTERNAL_KEY

ADMINISTRATOR = "testing"
_ROLE = re.compile(rf"arn:aws:iam::{ACCOUNT}:role/(?:.*/)?([^/]+)")
_CBOR = re.compile(r"/service/\w+/operation/(\w+)")


@dataclass(frozen=True)
class Caller:
    """A role, and the name of the session in which somebody has taken it."""

    role: str
    session: str

    @property
    def arn(self) -> str:
        """As AWS names the caller in its messages."""
        return f"arn:aws:sts::{ACCOUNT}:assumed-role/{self.role}/{self.session}"


class AccessDenied(ApiError):
    """AWS's refusal of an access, in its words."""

    def __init__(self, caller: Caller, access: Access, decision: Decision) -> None:
        service = access.action.partition(":")[0]
        resource = f'"{access.resource}"' if service == "s3" else access.resource
        super().__init__(
            "AccessDenied" if service == "s3" else "AccessDeniedException",
            f"User: {caller.arn} is not authorized to perform: {access.action} on resource: {resource} "
            + decision.value.format(action=access.action),
            403,
        )


class Authorization:
    """Credentials of roles, and checks of what is done with them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callers: dict[str, Caller] = {}

    def access_key(self, role_arn: str | None, session: str, internal: bool = False) -> str:
        """An access key for a role, the administrator's if IAM has no such role.

        `internal`: for what SageMaker itself does in the role's name, which faults leave alone.
        """
        role = find_role(role_arn)
        if role is None:
            return INTERNAL_KEY if internal else ADMINISTRATOR
        digest = hashlib.sha256(f"{role.name}/{session}".encode()).hexdigest()[:16].upper()
        key = f"{INTERNAL_KEY if internal else 'ASIA'}{digest}"
        with self._lock:
            self._callers[key] = Caller(role.name, session)
        return key

    def caller(self, key: str) -> Caller | None:
        """The role that an access key belongs to; None for the administrator's."""
        with self._lock:
            return self._callers.get(key)

    def check(self, caller: Caller, wanted: Iterable[Access]) -> None:
        """Raise `AccessDenied` for the first access that the caller's policies do not allow."""
        statements = list(_statements(caller))
        for access in wanted:
            decision = decide(statements, access)
            if decision is not Decision.ALLOWED:
                raise AccessDenied(caller, access, decision)
            if access.action == "iam:PassRole":
                _require_trust(access.resource)

    def allows(self, key: str, wanted: Iterable[Access]) -> bool:
        """Whether whoever has an access key may do this."""
        caller = self.caller(key)
        try:
            if caller is not None:
                self.check(caller, wanted)
        except AccessDenied:
            return False
        return True

    def check_request(self, caller: Caller, request: Request, call: tuple[str, str, Params] | None, region: str,
                      service: str) -> None:  # fmt: skip
        """Raise unless the caller may send this. `call`: service, operation and parameters, where they are known."""
        if call is None and service == "s3":
            found = s3_accesses(request, lambda: body_of(request))
            if found is None:
                raise not_emulated(f"permission for {request.method} {request.full_path} on S3")
            bucket = request.path.lstrip("/").partition("/")[0]
            creates = any(access.action == "s3:CreateBucket" for access in found)
            if bucket and not creates and bucket not in s3_backends[ACCOUNT]["aws"].buckets:
                return  # that there is no such bucket is told to everybody
        else:
            name, operation, params = call or _call_of(request, service)
            if f"{name}:{operation}" in FREE_ACTIONS:
                return
            found = accesses(name, operation, params, region)
        self.check(caller, found)

    def hidden(self, caller: Caller, request: Request) -> AccessDenied | None:
        """What S3 answers instead of "not found" to a caller who may not list the bucket."""
        first = next(iter(s3_accesses(request, bytes) or []), None)
        listing = s3_listing(first) if first else None
        if first is None or listing is None or decide(list(_statements(caller)), listing) is Decision.ALLOWED:
            return None
        return AccessDenied(caller, listing, Decision.NOT_ALLOWED)


def find_role(role_arn: str | None) -> Role | None:
    """A role of moto's IAM; None if there is none of that name."""
    found = _ROLE.fullmatch(role_arn or "")
    roles = iam_backends[ACCOUNT]["aws"].roles.values() if found else ()
    return next((role for role in roles if found is not None and role.name == found[1]), None)


def denied_response(error: ApiError, request: Request, service: str) -> Response:
    """A refusal as S3 and the services of the query protocol word it."""
    code = "AccessDenied" if isinstance(error, AccessDenied) else error.code
    body = f"<Code>{code}</Code><Message>{_escaped(error.message)}</Message>"
    if service != "s3":
        body = f"<Type>Sender</Type>{body}"
    body = f"<Error>{body}</Error>"
    if service != "s3":
        body = f"<ErrorResponse>{body}</ErrorResponse>"
    return Response("" if request.method == "HEAD" else body, status=403, content_type="application/xml")


def body_of(request: Request) -> bytes:
    """The body, which whoever answers the request can read again."""
    data = request.get_data()
    request.environ |= {"wsgi.input": io.BytesIO(data), "CONTENT_LENGTH": str(len(data))}
    return data


def _statements(caller: Caller) -> Iterable[Statement]:
    role = find_role(f"arn:aws:iam::{ACCOUNT}:role/{caller.role}")
    if role is None:
        return
    documents: list[Any] = list(role.policies.values())
    for managed in role.managed_policies.values():
        documents += [version.document for version in managed.versions if version.is_default]
    for document in documents:
        try:
            yield from parse_policy(document)
        except PolicyError as error:
            raise not_emulated(f"the policies of role {caller.role}: {error}") from error


def _require_trust(role_arn: str) -> None:
    """SageMaker's error for a role that it may not assume; roles that IAM does not have are taken for good ones."""
    role = find_role(role_arn)
    if role is None:
        return
    document = role.assume_role_policy_document
    statements = (json.loads(document) if isinstance(document, str) else document)["Statement"]
    for statement in statements if isinstance(statements, list) else [statements]:
        services = statement.get("Principal", {}).get("Service", [])
        if statement["Effect"] == "Allow" and SAGEMAKER in ([services] if isinstance(services, str) else services):
            return
    raise validation(
        f"Could not assume role {role_arn}. Please ensure that the role exists and allows principal '{SAGEMAKER}' to "
        "assume the role."
    )


def _call_of(request: Request, service: str) -> tuple[str, str, Params]:
    """Service, operation and parameters of a request that moto answers."""
    name = ACTION_PREFIXES.get(service, service)
    if found := _CBOR.fullmatch(request.path):
        raise not_emulated(f"permission for {name}:{found[1]} in CBOR")
    body = body_of(request)
    if target := request.headers.get("X-Amz-Target"):
        return name, target.rpartition(".")[2], json.loads(body or b"{}")
    parameters = {**request.args, **request.form}
    if operation := parameters.get("Action"):
        return name, operation, parameters
    raise not_emulated(f"permission for {request.method} {request.path} of {name}")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
