"""What a request needs permission for: IAM actions and resources, by rule from botocore's service models.

The rule: an operation needs the action of its name, on the resource that the request names, and where it names none on
`*`. SageMaker's `CreateTrainingJob` has a member `TrainingJobName`, so its resource is a `training-job`; tags in a
request need `AddTags`, and roles in it `iam:PassRole`. Operations of Glue need their action on the catalog, the
database and the table. Operations of S3 are found by method, path and parameters. What differs stands in the tables.
"""

import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

from botocore.model import ListShape, StructureShape
from werkzeug.wrappers import Request

from tests.sagemaker_emulator.common import ACCOUNT, Params, arn, catalog_config, split_s3_uri
from tests.sagemaker_emulator.iam_policies import Access
from tests.sagemaker_emulator.validation import operation_model, service_model

SAGEMAKER = "sagemaker.amazonaws.com"
# Services that sign with another name than that of their actions.
ACTION_PREFIXES = {"monitoring": "cloudwatch"}
# Anybody may ask who he is.
FREE_ACTIONS = ("sts:GetCallerIdentity",)

_SAGEMAKER_SERVICES = ("sagemaker", "sagemaker-featurestore-runtime", "sagemaker-runtime")
_VERBS = re.compile(r"(?:Create|Describe|Update|Delete|Stop|Invoke|Put|Get)([A-Z]\w*)")
# Operations whose resource the rule does not find: kinds of resources with the members that name them.
_SAGEMAKER_RESOURCES: dict[str, tuple[tuple[str, str], ...]] = {
    "CreateEndpoint": (("endpoint", "EndpointName"), ("endpoint-config", "EndpointConfigName")),
    "UpdateEndpoint": (("endpoint", "EndpointName"), ("endpoint-config", "EndpointConfigName")),
    "ListTrainingJobsForHyperParameterTuningJob": (("hyper-parameter-tuning-job", "HyperParameterTuningJobName"),),
    "AddTags": (("", "ResourceArn"),),
    "DeleteTags": (("", "ResourceArn"),),
    "ListTags": (("", "ResourceArn"),),
    "PutRecord": (("feature-group", "FeatureGroupName"),),
    "GetRecord": (("feature-group", "FeatureGroupName"),),
    "DeleteRecord": (("feature-group", "FeatureGroupName"),),
}
# Operations on the records of several feature groups: the lists of their requests.
_BATCHES = {"BatchGetRecord": "Identifiers", "BatchWriteRecord": "Entries"}

# Operations of S3 whose actions have other names.
_S3_ACTIONS = {
    "HeadObject": "GetObject",
    "HeadBucket": "ListBucket",
    "ListObjects": "ListBucket",
    "ListObjectsV2": "ListBucket",
    "ListBuckets": "ListAllMyBuckets",
    "ListParts": "ListMultipartUploadParts",
    "ListMultipartUploads": "ListBucketMultipartUploads",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "CopyObject": "PutObject",
    "UploadPartCopy": "PutObject",
    "DeleteObjects": "DeleteObject",
}
# Parts of a request that need another action on the same object.
_S3_HEADERS = {"x-amz-acl": "PutObjectAcl", "x-amz-tagging": "PutObjectTagging"}

_LOG_STREAMS = ("GetLogEvents", "PutLogEvents", "DescribeLogStreams")


def accesses(service: str, operation: str, params: Params, region: str) -> list[Access]:
    """What an operation of any service but S3 does. `service`: the name of the service's actions."""
    if service == "sagemaker":
        return list(_sagemaker(operation, params, region))
    if service == "glue":
        return list(_glue(operation, params, region))
    resource, context = "*", {}
    if service == "logs":
        resource = _log_resource(operation, params, region)
    elif service == "cloudwatch" and params.get("Namespace"):
        context = {"cloudwatch:namespace": params["Namespace"]}
    elif service != "cloudwatch":
        resource = next((v for k, v in params.items() if k.endswith("Arn") and isinstance(v, str)), "*")
    return [Access(f"{service}:{operation}", resource, context)]


def log_accesses(region: str, group: str) -> list[Access]:
    """What it takes to write a log of a group, which may have to be made."""
    names = {"logGroupName": group, "logStreamName": "stream"}
    operations = ("CreateLogGroup", "CreateLogStream", "PutLogEvents")
    return [access for operation in operations for access in accesses("logs", operation, names, region)]


def image_accesses(region: str, uri: str) -> list[Access]:
    """What it takes to pull an image from ECR; nothing for an image that does not lie there."""
    found = re.match(r"(\d+)\.dkr\.ecr\.([a-z0-9-]+)\.[a-z.]+/([^:@]+)", uri)
    if found is None:
        return []
    repository = f"arn:aws:ecr:{found[2]}:{found[1]}:repository/{found[3]}"
    layers = ("BatchCheckLayerAvailability", "GetDownloadUrlForLayer", "BatchGetImage")
    return [Access("ecr:GetAuthorizationToken", "*"), *(Access(f"ecr:{action}", repository) for action in layers)]


def store_accesses(uri: str) -> list[Access]:
    """What it takes to keep an offline store below a URI."""
    bucket, key = split_s3_uri(uri)
    place = f"arn:aws:s3:::{bucket}"
    objects = [Access(f"s3:{action}", f"{place}/{key}/data.parquet") for action in ("PutObject", "PutObjectAcl")]
    return [Access("s3:GetBucketAcl", place), *objects]


def _log_resource(operation: str, params: Params, region: str) -> str:
    group = params.get("logGroupName") or "*"
    stream = f":log-stream:{params.get('logStreamName') or ''}" if operation in _LOG_STREAMS else ""
    return f"arn:aws:logs:{region}:{ACCOUNT}:log-group:{group}{stream}"


# -- Glue ------------------------------------------------------------------------------------------------------------


def _glue(operation: str, params: Params, region: str) -> Iterator[Access]:
    database = params.get("DatabaseName") or (params.get("Name") if operation.endswith("Database") else None)
    database = database or params.get("DatabaseInput", {}).get("Name")
    table = params.get("TableName") or params.get("TableInput", {}).get("Name")
    if table is None and not operation.endswith("Database"):
        table = params.get("Name") or ("*" if operation == "GetTables" else None)
    resources = ["catalog"]
    if database is not None:
        resources.append(f"database/{database.lower()}")
        if table is not None:
            resources.append(f"table/{database.lower()}/{table.lower()}")
    for resource in resources:
        yield Access(f"glue:{operation}", f"arn:aws:glue:{region}:{ACCOUNT}:{resource}")


def _table_creation(params: Params, region: str) -> Iterator[Access]:
    """What who creates a feature group does in Glue: its offline store's table is made with his permissions."""
    offline = params.get("OfflineStoreConfig") or {}
    if offline.get("TableFormat") != "Iceberg":
        return
    config = catalog_config(params["FeatureGroupName"], time.time(), offline.get("DataCatalogConfig"))
    yield from _glue("CreateDatabase", {"DatabaseInput": {"Name": config["Database"]}}, region)
    names = {"DatabaseName": config["Database"], "TableInput": {"Name": config["TableName"]}}
    yield from _glue("CreateTable", names, region)


# -- SageMaker -------------------------------------------------------------------------------------------------------


def _sagemaker(operation: str, params: Params, region: str) -> Iterator[Access]:
    resources = list(_sagemaker_resources(operation, params, region)) or ["*"]
    for resource in resources:
        yield Access(f"sagemaker:{operation}", resource)
    if operation == "AddTags":
        return
    if params.get("Tags"):
        yield Access("sagemaker:AddTags", resources[0])
    if operation == "CreateFeatureGroup":
        yield from _table_creation(params, region)
    model = _sagemaker_model(operation)
    if model is not None and model.input_shape is not None:
        for role in sorted(set(_roles(model.input_shape, params))):
            yield Access("iam:PassRole", role, {"iam:PassedToService": SAGEMAKER})
    for alarm in (params.get("DeploymentConfig", {}).get("AutoRollbackConfiguration") or {}).get("Alarms", []):
        yield Access("cloudwatch:DescribeAlarms", f"arn:aws:cloudwatch:{region}:{ACCOUNT}:alarm:{alarm['AlarmName']}")


def _sagemaker_resources(operation: str, params: Params, region: str) -> Iterator[str]:
    def resource(kind: str, name: str) -> str:
        return name if name.startswith("arn:") else arn(region, kind, name)

    if operation in _BATCHES:
        names = {str(entry["FeatureGroupName"]) for entry in params.get(_BATCHES[operation], [])}
        yield from (resource("feature-group", name) for name in sorted(names))
    elif operation == "CreateModelPackage" and (group := params.get("ModelPackageGroupName")):
        # The version has no number yet.
        yield f"{resource('model-package', group).replace(':model-package-group/', ':model-package/')}/*"
    elif operation in _SAGEMAKER_RESOURCES:
        for kind, member in _SAGEMAKER_RESOURCES[operation]:
            if name := params.get(member):
                yield resource(kind, name)
    elif noun := _VERBS.fullmatch(operation):
        kind = re.sub(r"(?<!^)(?=[A-Z])", "-", noun[1]).lower()
        if name := params.get(f"{noun[1]}Name") or params.get(f"{noun[1]}Arn"):
            yield resource(kind, name)


def _sagemaker_model(operation: str) -> Any:
    return next((model for s in _SAGEMAKER_SERVICES if (model := operation_model(s, operation))), None)


def _roles(shape: Any, value: Any) -> Iterator[str]:
    """Every role that the request names, by the service model's own type for them."""
    if shape.name == "RoleArn" and value:
        yield value
    elif isinstance(shape, StructureShape) and isinstance(value, dict):
        members: Any = shape.members
        for name in members.keys() & value.keys():
            yield from _roles(members[name], value[name])
    elif isinstance(shape, ListShape) and isinstance(value, list):
        for item in value:
            yield from _roles(shape.member, item)


# -- S3 --------------------------------------------------------------------------------------------------------------


def s3_operation(method: str, has_bucket: bool, has_key: bool, given: Mapping[str, Any]) -> str | None:
    """The operation with this method and place whose parameters are most completely `given` (query and headers)."""
    lower = {name.lower() for name in given}
    fitting = [
        (len(wanted), name)
        for name, of_method, of_bucket, of_key, wanted in s3_operations()
        if (of_method, of_bucket, of_key) == (method, has_bucket, has_key) and wanted <= lower
    ]
    # Of several that need the same the first in the alphabet would be chance: ListObjects stands for its like.
    best = max(fitting, key=lambda found: (found[0], found[1] == "ListObjects"), default=None)
    return best[1] if best else None


@functools.cache
def s3_operations() -> list[tuple[str, str, bool, bool, frozenset[str]]]:
    """All operations: name, method, whether path has bucket and key, what must be in query and headers."""
    model, found = service_model("s3"), []
    for name in model.operation_names:
        operation = model.operation_model(name)
        path, _, query = operation.http["requestUri"].partition("?")
        wanted = {part.partition("=")[0].lower() for part in query.split("&") if part}
        shape: Any = operation.input_shape
        required = [shape.members[member].serialization for member in shape.required_members] if shape else []
        for serialized in required:
            if serialized.get("location") in ("querystring", "header"):
                wanted.add(serialized["name"].lower())
        found.append((name, operation.http["method"], "{Bucket}" in path, "{Key+}" in path, frozenset(wanted)))
    return found


def s3_accesses(request: Request, body: Callable[[], bytes]) -> list[Access] | None:
    """What a request to S3 (its path names the bucket) does; None if it is no operation of S3's."""
    bucket, _, key = request.path.lstrip("/").partition("/")
    headers = {name.lower(): value for name, value in request.headers.items()}
    operation = s3_operation(request.method, bool(bucket), bool(key), {**request.args, **headers})
    if operation is None:
        return None
    action = f"s3:{_S3_ACTIONS.get(operation, operation)}"
    place = f"arn:aws:s3:::{bucket}"
    if operation == "DeleteObjects":
        keys = [node.text or "" for node in ElementTree.fromstring(body()).iter() if node.tag.endswith("Key")]
        return [Access(action, f"{place}/{each}") for each in keys]
    if not key:
        prefix = request.args.get("prefix")
        context = {} if prefix is None or action != "s3:ListBucket" else {"s3:prefix": prefix}
        return [Access(action, place if bucket else "*", context)]
    needed = [Access(action, f"{place}/{key}")]
    needed += [Access(f"s3:{more}", f"{place}/{key}") for header, more in _S3_HEADERS.items() if header in headers]
    if source := headers.get("x-amz-copy-source"):
        needed.append(Access("s3:GetObject", f"arn:aws:s3:::{unquote(source).lstrip('/').partition('?')[0]}"))
    return needed


def s3_listing(access: Access) -> Access | None:
    """What it takes to learn that an object is not there. A request for an object has no `s3:prefix`."""
    bucket, _, key = access.resource.partition("/")
    return Access("s3:ListBucket", bucket) if access.action == "s3:GetObject" and key else None
