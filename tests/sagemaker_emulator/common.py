"""Small helpers that every part of the emulator shares: calls, ARNs, time, listing."""

import base64
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.sagemaker_emulator.errors import validation

ACCOUNT = "123456789012"
DEFAULT_REGION = "us-east-1"

Params = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One validated API request."""

    operation: str
    params: Params
    region: str


Handler = Callable[[Call], Params]


def now() -> float:
    """Time as the API puts it on the wire: seconds since the epoch, milliseconds kept."""
    return round(time.time(), 3)


def arn(region: str, kind: str, name: str) -> str:
    """ARN of a SageMaker resource; SageMaker writes the name in lower case."""
    return f"arn:aws:sagemaker:{region}:{ACCOUNT}:{kind}/{name.lower()}"


def name_of(name_or_arn: str) -> str:
    """Last part of an ARN, or the name itself."""
    return name_or_arn.rsplit("/", 1)[-1] if name_or_arn.startswith("arn:") else name_or_arn


def pick(source: Mapping[str, Any], names: Iterable[str]) -> Params:
    """The members of `source` that are in `names` and set."""
    return {name: source[name] for name in names if source.get(name) is not None}


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def catalog_config(group: str, created: float, given: Params | None) -> Params:
    """The `DataCatalogConfig` of a group: the one of its request, or names as Athena recommends them."""
    name = f"{group}_{int(created)}".replace("-", "_").lower()
    return dict(given or {"Catalog": "AwsDataCatalog", "Database": "sagemaker_featurestore", "TableName": name})


@dataclass(frozen=True)
class Listing:
    """How one List operation names its filters, sort keys and result."""

    result: str
    name: str
    status: str | None = None
    created: str = "CreationTime"
    modified: str = "LastModifiedTime"
    sort_default: str = "CreationTime"
    order_default: str = "Descending"
    page_default: int = 10


def list_page(params: Mapping[str, Any], items: Sequence[Params], listing: Listing) -> Params:
    """Filter, sort and cut one page out of `items`, as SageMaker's List operations do."""
    chosen = [item for item in items if _matches(params, item, listing)]
    sort_by = str(params.get("SortBy", listing.sort_default))
    key = {"Name": listing.name, "Status": listing.status or listing.name}.get(sort_by, sort_by)
    key = {"LastModifiedTime": listing.modified, "CreationTime": listing.created}.get(key, key)
    order = params.get("SortOrder", listing.order_default)
    chosen.sort(key=lambda item: _sortable(item.get(key)), reverse=order == "Descending")
    start = _decode_token(params["NextToken"]) if params.get("NextToken") else 0
    size = int(params.get("MaxResults", listing.page_default))
    page: Params = {listing.result: chosen[start : start + size]}
    if start + size < len(chosen):
        page["NextToken"] = base64.b64encode(f"offset:{start + size}".encode()).decode()
    return page


def _matches(params: Mapping[str, Any], item: Params, listing: Listing) -> bool:
    if params.get("NameContains") and params["NameContains"] not in str(item.get(listing.name, "")):
        return False
    if listing.status and params.get("StatusEquals") and item.get(listing.status) != params["StatusEquals"]:
        return False
    bounds = (
        ("CreationTimeAfter", listing.created, 1),
        ("CreationTimeBefore", listing.created, -1),
        ("LastModifiedTimeAfter", listing.modified, 1),
        ("LastModifiedTimeBefore", listing.modified, -1),
    )
    return all(
        (float(item.get(field, 0)) - float(params[bound])) * sign > 0
        for bound, field, sign in bounds
        if params.get(bound) is not None
    )


def _sortable(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (1, float(value), "")
    return (0, 0.0, "" if value is None else str(value))


def _decode_token(token: str) -> int:
    try:
        return int(base64.b64decode(token, validate=True).decode().removeprefix("offset:"))
    except ValueError as error:
        raise validation("Invalid NextToken.") from error
