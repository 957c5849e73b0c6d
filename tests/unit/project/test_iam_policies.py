"""The emulator's evaluation of IAM policies, and what it takes a request to need."""

from __future__ import annotations

import fnmatch
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request

from tests.sagemaker_emulator.iam_policies import (
    Access,
    Decision,
    PolicyError,
    arn_matches,
    decide,
    matches,
    parse_policy,
)
from tests.sagemaker_emulator.iam_requests import accesses, image_accesses, s3_accesses, s3_operation, s3_operations

PREFIX = "arn:aws:sagemaker:us-east-1:123456789012:"
ACTIONS = st.sampled_from(["s3:GetObject", "s3:PutObject", "s3:*", "*", "s3:Get*", "S3:getobject", "sagemaker:*"])
RESOURCES = st.sampled_from(["*", "arn:aws:s3:::b/*", "arn:aws:s3:::b/k", "arn:aws:s3:::b/?", "arn:aws:s3:::c/*"])
CONDITIONS = st.sampled_from(
    [None, {"StringLike": {"s3:prefix": "p/*"}}, {"StringLikeIfExists": {"s3:prefix": ["p/*", "q"]}}]
)
STATEMENTS = st.builds(
    lambda effect, action, resource, condition: {
        **{"Effect": effect, "Action": action, "Resource": resource},
        **({"Condition": condition} if condition else {}),
    },
    st.sampled_from(["Allow", "Deny"]), ACTIONS, RESOURCES, CONDITIONS,
)  # fmt: skip
ACCESSES = st.builds(
    Access,
    st.sampled_from(["s3:GetObject", "s3:PutObject", "s3:ListBucket"]),
    st.sampled_from(["arn:aws:s3:::b/k", "arn:aws:s3:::b/long/key", "arn:aws:s3:::c/k"]),
    st.sampled_from([{}, {"s3:prefix": "p/x"}, {"s3:prefix": "q"}, {"s3:prefix": "other"}]),
)
TEXT = st.text("ab/:-.[]*?", max_size=8)


def policy(*statements: dict[str, Any]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


def verdict(access: Access, *statements: dict[str, Any]) -> Decision:
    return decide(parse_policy(policy(*statements)), access)


def allow(action: Any, resource: Any = "*", **condition: Any) -> dict[str, Any]:
    more = {"Condition": condition} if condition else {}
    return {"Effect": "Allow", "Action": action, "Resource": resource, **more}


@given(st.lists(STATEMENTS, min_size=1, max_size=6), ACCESSES)
def test_a_deny_beats_every_allow_whatever_the_order(statements: list[dict[str, Any]], access: Access) -> None:
    alone = [(s["Effect"], verdict(access, {**s, "Effect": "Allow"}) is Decision.ALLOWED) for s in statements]
    expected = Decision.NOT_ALLOWED
    if any(applies for effect, applies in alone if effect == "Allow"):
        expected = Decision.ALLOWED
    if any(applies for effect, applies in alone if effect == "Deny"):
        expected = Decision.DENIED
    assert verdict(access, *statements) is expected
    assert verdict(access, *reversed(statements)) is expected


@given(st.lists(STATEMENTS, min_size=1, max_size=5), STATEMENTS, ACCESSES)
def test_another_statement_only_ever_allows_or_denies_more(
    statements: list[dict[str, Any]], another: dict[str, Any], access: Access
) -> None:
    before, after = verdict(access, *statements), verdict(access, *statements, another)
    if before is not after:
        assert after is (Decision.ALLOWED if another["Effect"] == "Allow" else Decision.DENIED)


@given(TEXT, TEXT)
def test_wildcards_are_those_of_a_shell_without_its_brackets(pattern: str, text: str) -> None:
    assert matches(pattern, text) == fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))


@given(st.text("abc/-.", max_size=10), st.text("abc/-.", max_size=10))
def test_a_prefix_with_an_asterisk_covers_what_begins_so(prefix: str, rest: str) -> None:
    assert arn_matches(f"arn:aws:s3:::{prefix}*", f"arn:aws:s3:::{prefix}{rest}")
    assert arn_matches(f"arn:aws:s3:::{prefix}", f"arn:aws:s3:::{prefix}{rest}") is (not rest)


def test_a_wildcard_does_not_leave_its_part_of_the_arn() -> None:
    job = "arn:aws:sagemaker:us-east-1:123456789012:training-job/housing-a"
    assert arn_matches("arn:aws:sagemaker:*:123456789012:training-job/*", job)
    assert not arn_matches("arn:aws:sagemaker:*:training-job/housing-a", job)
    assert not arn_matches("arn:aws:sagemaker:us-east-1:1234:training-job/*", job)
    assert arn_matches(
        "arn:aws:logs:us-east-1:1:log-group:/a/*", "arn:aws:logs:us-east-1:1:log-group:/a/b:log-stream:c"
    )


def test_actions_are_compared_without_case_and_resources_with() -> None:
    access = Access("s3:GetObject", "arn:aws:s3:::bucket/Key")
    assert verdict(access, allow("s3:getobject", "arn:aws:s3:::bucket/Key")) is Decision.ALLOWED
    assert verdict(access, allow("s3:GetObject", "arn:aws:s3:::bucket/key")) is Decision.NOT_ALLOWED


def test_a_condition_needs_its_key_unless_it_says_otherwise() -> None:
    bucket = "arn:aws:s3:::b"
    inside, outside, without = (
        Access("s3:ListBucket", bucket, context) for context in ({"s3:prefix": "p/x"}, {"s3:prefix": "x"}, {})
    )
    like = allow("s3:ListBucket", bucket, StringLike={"s3:prefix": ["p", "p/*"]})
    assert [verdict(a, like) is Decision.ALLOWED for a in (inside, outside, without)] == [True, False, False]
    if_exists = allow("s3:ListBucket", bucket, StringLikeIfExists={"s3:prefix": ["p", "p/*"]})
    assert [verdict(a, if_exists) is Decision.ALLOWED for a in (inside, outside, without)] == [True, False, True]
    both = allow("iam:PassRole", "*", StringEquals={"iam:PassedToService": "sagemaker.amazonaws.com"})
    assert verdict(Access("iam:PassRole", "r", {"iam:PassedToService": "ec2.amazonaws.com"}), both) is not (
        Decision.ALLOWED
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "no JSON"),
        (json.dumps({"Version": "2008-10-17", "Statement": [allow("*")]}), "2012-10-17"),
        (json.dumps({"Version": "2012-10-17"}), "without a Statement"),
        (policy({"Effect": "Allow", "NotAction": "s3:*", "Resource": "*"}), "with NotAction, which is not emulated"),
        (policy({"Effect": "Deny", "Action": "s3:*", "NotResource": "*"}), "with NotResource"),
        (policy({**allow("s3:*"), "Principal": "*"}), "with Principal"),
        (policy({**allow("s3:*"), "Effect": "allow"}), "Effect must be"),
        (policy(allow("GetObject")), "GetObject is no action"),
        (policy(allow([])), "Action must be a text or a list"),
        (policy(allow("s3:*", "bucket/*")), "bucket/\\* is no ARN"),
        (policy(allow("s3:*", "arn:aws:s3:::home/${aws:username}/*")), "policy variable"),
        (policy(allow("s3:*", StringNotLike={"s3:prefix": "x"})), "operator StringNotLike is not emulated"),
        (policy(allow("s3:*", StringLike={"aws:SourceIp": "x"})), "condition key aws:SourceIp is not emulated"),
    ],
)
def test_what_is_not_understood_is_refused(document: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse_policy(document)


@pytest.mark.parametrize(
    ("operation", "params", "wanted"),
    [
        ("CreateTrainingJob", {"TrainingJobName": "Housing-A"}, ["training-job/housing-a"]),
        ("DescribeProcessingJob", {"ProcessingJobName": "p"}, ["processing-job/p"]),
        ("StopHyperParameterTuningJob", {"HyperParameterTuningJobName": "t"}, ["hyper-parameter-tuning-job/t"]),
        ("DescribeModelPackageGroup", {"ModelPackageGroupName": "g"}, ["model-package-group/g"]),
        ("CreateModelPackage", {"ModelPackageGroupName": "g"}, ["model-package/g/*"]),
        ("UpdateModelPackage", {"ModelPackageArn": f"{PREFIX}model-package/g/1"}, ["model-package/g/1"]),
        ("DescribeModelPackage", {"ModelPackageName": f"{PREFIX}model-package/g/1"}, ["model-package/g/1"]),
        ("ListTrainingJobs", {"NameContains": "x"}, ["*"]),
        ("ListTrainingJobsForHyperParameterTuningJob", {"HyperParameterTuningJobName": "t"},
         ["hyper-parameter-tuning-job/t"]),
        ("UpdateEndpoint", {"EndpointName": "e", "EndpointConfigName": "c"}, ["endpoint/e", "endpoint-config/c"]),
        ("InvokeEndpoint", {"EndpointName": "e"}, ["endpoint/e"]),
        ("GetRecord", {"FeatureGroupName": "f"}, ["feature-group/f"]),
        ("BatchWriteRecord", {"Entries": [{"FeatureGroupName": "f"}] * 2}, ["feature-group/f"]),
        ("ListTags", {"ResourceArn": f"{PREFIX}model/m"}, ["model/m"]),
        ("AddTags", {"ResourceArn": f"{PREFIX}model/m", "Tags": [{}]}, ["model/m"]),
    ],
)  # fmt: skip
def test_operations_of_sagemaker_need_their_own_action_on_what_they_name(
    operation: str, params: dict[str, Any], wanted: list[str]
) -> None:
    found = accesses("sagemaker", operation, params, "us-east-1")
    assert {access.action for access in found} == {f"sagemaker:{operation}"}
    assert [access.resource.removeprefix(PREFIX) for access in found] == wanted


@pytest.mark.parametrize(
    ("operation", "params", "wanted"),
    [
        ("CreateDatabase", {"DatabaseInput": {"Name": "D"}}, ["catalog", "database/d"]),
        ("GetDatabase", {"Name": "d"}, ["catalog", "database/d"]),
        ("GetDatabases", {}, ["catalog"]),
        ("GetTable", {"DatabaseName": "d", "Name": "T"}, ["catalog", "database/d", "table/d/t"]),
        ("GetTables", {"DatabaseName": "d"}, ["catalog", "database/d", "table/d/*"]),
        ("UpdateTable", {"DatabaseName": "d", "TableInput": {"Name": "t"}}, ["catalog", "database/d", "table/d/t"]),
        ("GetTableVersions", {"DatabaseName": "d", "TableName": "t"}, ["catalog", "database/d", "table/d/t"]),
    ],
)
def test_operations_of_glue_need_the_catalog_too(operation: str, params: dict[str, Any], wanted: list[str]) -> None:
    found = accesses("glue", operation, params, "us-east-1")
    assert {access.action for access in found} == {f"glue:{operation}"}
    assert [access.resource.removeprefix("arn:aws:glue:us-east-1:123456789012:") for access in found] == wanted


@pytest.mark.parametrize("given", [None, {"Catalog": "AwsDataCatalog", "Database": "D", "TableName": "T"}])
def test_who_creates_an_iceberg_table_needs_glue_too(given: dict[str, str] | None) -> None:
    config = {"TableFormat": "Iceberg", **({"DataCatalogConfig": given} if given else {})}
    params = {"FeatureGroupName": "A-b", "OfflineStoreConfig": config}
    needed = [a for a in accesses("sagemaker", "CreateFeatureGroup", params, "us-east-1") if "glue" in a.action]
    assert [access.action for access in needed] == ["glue:CreateDatabase"] * 2 + ["glue:CreateTable"] * 3
    table = "table/d/t" if given else r"table/sagemaker_featurestore/a_b_\d+"
    assert re.fullmatch(f".*:{table}", needed[-1].resource)
    params = {"FeatureGroupName": "A-b", "OfflineStoreConfig": {"DisableGlueTableCreation": True}}
    assert [a.action for a in accesses("sagemaker", "CreateFeatureGroup", params, "us-east-1")] == [
        "sagemaker:CreateFeatureGroup"
    ]


def test_tags_in_a_request_need_the_permission_to_add_them() -> None:
    found = accesses("sagemaker", "CreateModel", {"ModelName": "m", "Tags": [{}]}, "us-east-1")
    assert found == [
        Access("sagemaker:CreateModel", f"{PREFIX}model/m"),
        Access("sagemaker:AddTags", f"{PREFIX}model/m"),
    ]


@pytest.mark.parametrize(
    ("operation", "params"),
    [
        ("CreateTrainingJob", {"RoleArn": "R"}),
        ("CreateModel", {"ExecutionRoleArn": "R"}),
        ("CreateFeatureGroup", {"RoleArn": "R"}),
        ("CreateHyperParameterTuningJob", {"TrainingJobDefinition": {"RoleArn": "R"}}),
        ("CreateHyperParameterTuningJob", {"TrainingJobDefinitions": [{"RoleArn": "R"}, {"RoleArn": "R"}]}),
    ],
)
def test_a_role_in_a_request_is_passed_wherever_it_stands(operation: str, params: dict[str, Any]) -> None:
    passed = [a for a in accesses("sagemaker", operation, params, "us-east-1") if a.action == "iam:PassRole"]
    assert passed == [Access("iam:PassRole", "R", {"iam:PassedToService": "sagemaker.amazonaws.com"})]


def test_rollback_alarms_are_described_by_who_updates() -> None:
    params = {
        "EndpointName": "e",
        "DeploymentConfig": {"AutoRollbackConfiguration": {"Alarms": [{"AlarmName": "housing-5xx"}]}},
    }
    alarm = "arn:aws:cloudwatch:us-east-1:123456789012:alarm:housing-5xx"
    assert Access("cloudwatch:DescribeAlarms", alarm) in accesses("sagemaker", "UpdateEndpoint", params, "us-east-1")


def test_every_operation_of_s3_is_recognised() -> None:
    known = s3_operations()
    same: dict[tuple[str, bool, bool, frozenset[str]], set[str]] = {}
    for name, method, bucket, key, wanted in known:
        same.setdefault((method, bucket, key, wanted), set()).add(name)
    for (method, bucket, key, wanted), names in same.items():
        assert s3_operation(method, bucket, key, dict.fromkeys(wanted)) in names
    assert len(same) > 0.9 * len(known)


def s3(method: str, path: str, body: bytes = b"", **headers: str) -> list[str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = Request(EnvironBuilder(path, method=method, headers=list(named.items()), data=body).get_environ())
    return [
        f"{a.action} {a.resource} {dict(a.context) or ''}".rstrip() for a in s3_accesses(request, lambda: body) or []
    ]


def test_requests_to_s3() -> None:
    b = "arn:aws:s3:::b"
    assert s3("GET", "/") == ["s3:ListAllMyBuckets *"]
    assert s3("GET", "/b?list-type=2&prefix=p%2F&delimiter=%2F") == [f"s3:ListBucket {b} {{'s3:prefix': 'p/'}}"]
    assert s3("GET", "/b?prefix=p") == [f"s3:ListBucket {b} {{'s3:prefix': 'p'}}"]
    assert s3("GET", "/b?list-type=2") == [f"s3:ListBucket {b}"]
    assert s3("HEAD", "/b") == [f"s3:ListBucket {b}"]
    assert s3("GET", "/b?location") == [f"s3:GetBucketLocation {b}"]
    assert s3("HEAD", "/b/k/l%20m") == [f"s3:GetObject {b}/k/l m"]
    assert s3("GET", "/b/k", range="bytes=0-9") == [f"s3:GetObject {b}/k"]
    assert s3("PUT", "/b/k") == [f"s3:PutObject {b}/k"]
    assert s3("PUT", "/b/k", x_amz_acl="bucket-owner-full-control")[1] == f"s3:PutObjectAcl {b}/k"
    assert s3("PUT", "/b/k", x_amz_copy_source="/c/l%2Bm") == [f"s3:PutObject {b}/k", "s3:GetObject arn:aws:s3:::c/l+m"]
    assert s3("POST", "/b/k?uploads") == [f"s3:PutObject {b}/k"]
    assert s3("PUT", "/b/k?partNumber=1&uploadId=u") == [f"s3:PutObject {b}/k"]
    assert s3("POST", "/b/k?uploadId=u") == [f"s3:PutObject {b}/k"]
    assert s3("DELETE", "/b/k?uploadId=u") == [f"s3:AbortMultipartUpload {b}/k"]
    assert s3("GET", "/b/k?uploadId=u") == [f"s3:ListMultipartUploadParts {b}/k"]
    keys = b'<Delete xmlns="http://s3.amazonaws.com/doc/2006-03-01/">%s</Delete>' % (
        b"<Object><Key>x</Key></Object><Object><Key>y</Key></Object>"
    )
    assert s3("POST", "/b?delete", keys) == [f"s3:DeleteObject {b}/x", f"s3:DeleteObject {b}/y"]
    assert s3("DELETE", "/b/k") == [f"s3:DeleteObject {b}/k"]


def test_images_of_ecr_need_a_login_and_their_layers() -> None:
    found = image_accesses("us-east-1", "683313688378.dkr.ecr.us-east-1.amazonaws.com/sagemaker-xgboost:3.2-0")
    assert {a.action for a in found} == {
        *("ecr:GetAuthorizationToken", "ecr:BatchCheckLayerAvailability"),
        *("ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage"),
    }
    assert found[-1].resource == "arn:aws:ecr:us-east-1:683313688378:repository/sagemaker-xgboost"
    assert image_accesses("us-east-1", "docker.io/library/python:3") == []
