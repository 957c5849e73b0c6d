"""The shipped CloudFormation template: it is sound, its policies are the documented ones, each statement is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pytest
from botocore.exceptions import ClientError
from pyiceberg.catalog.glue import GlueCatalog

from tests.aws_account import TEMPLATE, Account, administrator, deploy, policy_of, without_statement
from tests.platform_cli import Platform
from tests.rehearse import platform_environment
from tests.sagemaker_emulator import SageMakerEmulator
from tests.sagemaker_emulator.testing import Aws, channel
from tests.waiting import until

PAGE = TEMPLATE.parents[1] / "docs" / "sagemaker.md"
REGION = "eu-west-1"  # other tests have log groups in theirs
PLACES = {
    "Prefix": "housing/of/ours",
    "SourcePrefix": "sales/all",
    "LandingPrefix": "arriving",
    "JobFilesDays": "12",
    "LogDays": "60",
}


@pytest.fixture(scope="module")
def account(emulator: SageMakerEmulator) -> Account:
    return deploy(emulator, "team-bucket", REGION, Name="team", **PLACES)


@pytest.fixture
def small_account(emulator: SageMakerEmulator, aws: Aws) -> Account:
    """Roles for a test's bucket, which the test may change."""
    return deploy(emulator, aws.bucket, Name=aws.bucket, CreateBucket="false", CreateLogGroups="false")


@pytest.fixture
def as_dagster(emulator: SageMakerEmulator, small_account: Account) -> Callable[[str], Any]:
    """Clients with the credentials of the Dagster process."""
    return lambda service: client(emulator, small_account.dagster_role, service)


def client(emulator: SageMakerEmulator, role: str, service: str) -> Any:
    key = emulator.environment(role)["AWS_ACCESS_KEY_ID"]
    return boto3.client(
        service, endpoint_url=emulator.endpoint_url, region_name="us-east-1",
        aws_access_key_id=key, aws_secret_access_key="testing",
    )  # fmt: skip


def documented(region: str) -> Iterator[dict[str, Any]]:
    """The policies of the page, with the values of the deployed stack."""
    values = {"REGION": region, "ACCOUNT": "123456789012", "BUCKET": "team-bucket", "role/housing-": "role/team-"}
    values |= {name: PLACES[key] for name, key in (("PREFIX", "Prefix"), ("SOURCES", "SourcePrefix"))}
    values["LANDING"] = PLACES["LandingPrefix"]
    for block in re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL):
        for name, value in values.items():
            block = block.replace(name, value)
        yield json.loads(block)


def test_the_template_is_sound() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("cfn-lint")), "--include-checks", "I", "--", str(TEMPLATE)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_template_that_is_not_sound_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(TEMPLATE.read_text().replace("SSEAlgorithm: AES256", "SSEAlgorithm: rot13"))
    done = subprocess.run(
        [str(Path(sys.executable).with_name("cfn-lint")), "--", str(wrong)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "rot13" in done.stdout


def test_the_deployed_policies_are_the_documented_ones(emulator: SageMakerEmulator, account: Account) -> None:
    assert list(documented(REGION)) == [policy_of(emulator, r) for r in (account.dagster_role, account.jobs_role)]
    for role in (account.dagster_role, account.jobs_role):
        assert len(json.dumps(policy_of(emulator, role), separators=(",", ":"))) <= 6144, "fits a managed policy"


def test_the_bucket_is_private_and_logs_are_kept_for_a_time(emulator: SageMakerEmulator, account: Account) -> None:
    assert account.root == "s3://team-bucket/housing/of/ours"
    s3, logs = administrator(emulator, "s3", REGION), administrator(emulator, "logs", REGION)
    encryption = s3.get_bucket_encryption(Bucket="team-bucket")["ServerSideEncryptionConfiguration"]["Rules"]
    assert encryption[0]["ApplyServerSideEncryptionByDefault"] == {"SSEAlgorithm": "AES256"}
    groups = logs.describe_log_groups(logGroupNamePrefix="/aws/sagemaker/")["logGroups"]
    assert {group["logGroupName"]: group["retentionInDays"] for group in groups} == {
        "/aws/sagemaker/ProcessingJobs": 60,
        "/aws/sagemaker/TrainingJobs": 60,
        "/aws/sagemaker/Endpoints/housing": 60,
    }
    # Moto's CloudFormation makes a bucket without these.
    stack = administrator(emulator, "cloudformation", REGION).get_template(StackName="team")["TemplateBody"]
    for rule in ("BlockPublicPolicy: true", "RestrictPublicBuckets: true", "aws:SecureTransport", '"${Prefix}/jobs/"'):
        assert rule in str(stack)


def test_roles_are_for_whom_they_are_meant(emulator: SageMakerEmulator, account: Account) -> None:
    iam = administrator(emulator, "iam")
    trusted = [
        iam.get_role(RoleName=role)["Role"]["AssumeRolePolicyDocument"]["Statement"]
        for role in ("team-dagster", "team-jobs")
    ]
    assert [statement["Principal"] for [statement] in trusted] == [
        {"Service": "ecs-tasks.amazonaws.com", "AWS": "arn:aws:iam::123456789012:root"},
        {"Service": "sagemaker.amazonaws.com"},
    ]


def job(small_account: Account, name: str, **changes: Any) -> dict[str, Any]:
    """A request for a training job that ends at once."""
    return {
        "TrainingJobName": name,
        "RoleArn": small_account.jobs_role,
        "AlgorithmSpecification": {"TrainingImage": "i", "TrainingInputMode": "File", "ContainerEntrypoint": ["true"]},
        "OutputDataConfig": {"S3OutputPath": f"{small_account.root}/jobs"},
        "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 10},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
        **changes,
    }


def calls(aws: Aws, name: str, account: Account) -> dict[str, tuple[str, str, dict[str, Any], str]]:
    """A call that each statement of the Dagster role's policy is for: service, method, parameters, the action."""
    bucket = {"Bucket": aws.bucket}
    tagged = {"Tags": [{"Key": "k", "Value": "v"}]}
    return {
        "Jobs": ("sagemaker", "create_training_job", job(account, f"housing-{name}"), "sagemaker:CreateTrainingJob"),
        "NativeTuning": (
            "sagemaker", "describe_hyper_parameter_tuning_job", {"HyperParameterTuningJobName": f"tune-{name}"},
            "sagemaker:DescribeHyperParameterTuningJob",
        ),
        "Lists": ("sagemaker", "list_endpoints", {}, "sagemaker:ListEndpoints"),
        "FeatureStore": (
            "sagemaker", "describe_feature_group", {"FeatureGroupName": f"house_sales-{name}"},
            "sagemaker:DescribeFeatureGroup",
        ),
        "Tables": (
            "glue", "get_table", {"DatabaseName": "sagemaker_featurestore", "Name": f"House_Sales_{name}"},
            "glue:GetTable",
        ),
        "Registry": (
            "sagemaker", "create_model_package_group", {"ModelPackageGroupName": f"housing-{name}"},
            "sagemaker:CreateModelPackageGroup",
        ),
        "Endpoint": (
            "sagemaker-runtime", "invoke_endpoint", {"EndpointName": f"housing-{name}", "Body": b"1"},
            "sagemaker:InvokeEndpoint",
        ),
        "Tag": (
            "sagemaker", "create_training_job", job(account, f"housing-{name}-tagged", **tagged), "sagemaker:AddTags",
        ),
        "ReadTags": (
            "sagemaker", "list_tags",
            {"ResourceArn": f"arn:aws:sagemaker:us-east-1:123456789012:training-job/others-{name}"},
            "sagemaker:ListTags",
        ),
        "PassTheJobsRole": ("sagemaker", "create_training_job", job(account, f"housing-{name}-2"), "iam:PassRole"),
        "Logs": (
            "logs", "describe_log_streams", {"logGroupName": f"/aws/sagemaker/Endpoints/{name}"},
            "logs:DescribeLogStreams",
        ),
        "List": ("s3", "list_objects_v2", {**bucket, "Prefix": "sales/"}, "s3:ListBucket"),
        "Objects": ("s3", "put_object", {**bucket, "Key": "housing/x", "Body": b"x"}, "s3:PutObject"),
        "Sources": ("s3", "get_object", {**bucket, "Key": "landing/x.csv"}, "s3:GetObject"),
    }  # fmt: skip


def error_of(function: Callable[..., Any], params: dict[str, Any]) -> tuple[str, str]:
    """Code and message of AWS's error; empty if there is none."""
    try:
        function(**params)
    except ClientError as error:
        return error.response["Error"]["Code"], error.response["Error"]["Message"]
    return "", ""


def test_every_statement_of_the_dagster_role_is_needed(
    emulator: SageMakerEmulator, aws: Aws, small_account: Account, as_dagster: Callable[[str], Any]
) -> None:
    aws.put("landing/x.csv", "x")
    wanted = calls(aws, aws.bucket[-8:], small_account)
    sids = [statement["Sid"] for statement in policy_of(emulator, small_account.dagster_role)["Statement"]]
    assert sorted(wanted) == sorted(sids)
    for service, method, params, _ in wanted.values():
        assert "AccessDenied" not in error_of(getattr(as_dagster(service), method), params)[0], method
    session = f"arn:aws:sts::123456789012:assumed-role/{aws.bucket}-dagster/caller"
    for sid, (service, method, params, action) in wanted.items():
        with without_statement(emulator, small_account.dagster_role, sid):
            code, message = error_of(getattr(as_dagster(service), method), params)
        assert code == ("AccessDenied" if service == "s3" else "AccessDeniedException"), sid
        assert message.startswith(f"User: {session} is not authorized to perform: {action} on resource: "), sid
        assert message.endswith(f"because no identity-based policy allows the {action} action"), sid


def test_an_iceberg_table_is_made_with_the_creators_rights_and_filled_with_those_of_jobs(
    emulator: SageMakerEmulator, aws: Aws, small_account: Account, as_dagster: Callable[[str], Any]
) -> None:
    name = f"house_sales-{aws.bucket[-8:]}"
    request = {
        "FeatureGroupName": name, "RecordIdentifierFeatureName": "id", "EventTimeFeatureName": "at",
        "FeatureDefinitions": [{"FeatureName": n, "FeatureType": "String"} for n in ("id", "at")],
        "OfflineStoreConfig": {
            "S3StorageConfig": {"S3Uri": f"{small_account.root}/feature_store"}, "TableFormat": "Iceberg",
        },
        "RoleArn": small_account.jobs_role,
    }  # fmt: skip
    sagemaker = as_dagster("sagemaker")
    with without_statement(emulator, small_account.dagster_role, "Tables"):
        code, message = error_of(sagemaker.create_feature_group, request)
    catalog = "arn:aws:glue:us-east-1:123456789012:catalog"
    assert code == "AccessDeniedException"
    assert f"is not authorized to perform: glue:CreateDatabase on resource: {catalog}" in message
    # The data's place is the role's, as the database and the table are the caller's.
    elsewhere = request["OfflineStoreConfig"] | {"DataCatalogConfig": {
        "Catalog": "AwsDataCatalog", "Database": "sagemaker_featurestore", "TableName": "others",
    }}  # fmt: skip
    code, message = error_of(sagemaker.create_feature_group, request | {"OfflineStoreConfig": elsewhere})
    assert code == "AccessDeniedException"
    assert "table/sagemaker_featurestore/others" in message
    sagemaker.create_feature_group(**request)
    described = until(
        lambda: (d := sagemaker.describe_feature_group(FeatureGroupName=name))["FeatureGroupStatus"] != "Creating" and d
    )
    assert described["FeatureGroupStatus"] == "Created", described
    place = described["OfflineStoreConfig"]["DataCatalogConfig"]

    def append() -> None:
        glue = client(emulator, small_account.jobs_role, "glue")
        key = emulator.environment(small_account.jobs_role)["AWS_ACCESS_KEY_ID"]
        s3 = {"s3.endpoint": emulator.endpoint_url, "s3.region": "us-east-1", "s3.access-key-id": key}
        table = GlueCatalog("glue", glue, **s3, **{"s3.secret-access-key": "testing"}).load_table(
            (place["Database"], place["TableName"])
        )
        table.append(pa.table({"id": ["a"], "at": ["2024-05-01T12:00:00Z"]}))
        assert table.scan().to_arrow()["id"].to_pylist() == ["a"]

    append()
    with without_statement(emulator, small_account.jobs_role, "Tables"), pytest.raises(ClientError) as refused:
        append()
    assert f"glue:GetTable on resource: {catalog}" in str(refused.value)


def test_policies_that_are_attached_count_too_and_are_refused_if_not_understood(
    emulator: SageMakerEmulator, small_account: Account, as_dagster: Callable[[str], Any]
) -> None:
    iam, role = administrator(emulator, "iam"), small_account.dagster_role.rpartition("/")[2]

    def attach(name: str, **statement: Any) -> None:
        document = json.dumps({"Version": "2012-10-17", "Statement": [{"Resource": "*", **statement}]})
        arn = iam.create_policy(PolicyName=f"{role}-{name}", PolicyDocument=document)["Policy"]["Arn"]
        iam.attach_role_policy(RoleName=role, PolicyArn=arn)

    client = as_dagster("sagemaker")
    assert error_of(client.list_pipelines, {})[0] == "AccessDeniedException"
    attach("more", Effect="Allow", Action="sagemaker:ListPipelines")
    assert error_of(client.list_pipelines, {})[0] == "NotEmulated", "allowed, and not there"
    attach("less", Effect="Deny", Action="sagemaker:ListE*")
    assert "with an explicit deny in an identity-based policy" in error_of(client.list_endpoints, {})[1]
    assert error_of(client.list_models, {}) == ("", "")
    attach("other", Effect="Deny", NotAction="s3:*")
    code, message = error_of(client.list_models, {})
    assert code == "NotEmulated"
    assert "NotAction" in message


def test_what_is_not_there_is_hidden_from_who_may_not_list(
    emulator: SageMakerEmulator, aws: Aws, small_account: Account, as_dagster: Callable[[str], Any]
) -> None:
    missing = {"Bucket": aws.bucket, "Key": "sales/nothing.csv"}
    s3 = as_dagster("s3")
    assert error_of(s3.get_object, missing)[0] == "NoSuchKey"
    assert error_of(s3.head_object, missing)[0] == "404"
    with without_statement(emulator, small_account.dagster_role, "List"):
        assert error_of(s3.get_object, missing)[0] == "AccessDenied"
        assert error_of(s3.head_object, missing)[0] == "403"


def test_nothing_outside_the_prefixes_can_be_read_or_changed(
    aws: Aws, small_account: Account, as_dagster: Callable[[str], Any]
) -> None:
    aws.put("others/x", "x")
    aws.put("sales/x.csv", "x")
    s3, bucket = as_dagster("s3"), {"Bucket": aws.bucket}
    for method, params in (
        ("get_object", {"Key": "others/x"}),
        ("put_object", {"Key": "others/y", "Body": b"y"}),
        ("put_object", {"Key": "sales/x.csv", "Body": b"y"}),
        ("delete_object", {"Key": "sales/x.csv"}),
        ("delete_objects", {"Delete": {"Objects": [{"Key": "housing/x"}, {"Key": "others/x"}]}}),
        ("list_objects_v2", {"Prefix": "others/"}),
        ("copy_object", {"Key": "housing/x", "CopySource": {**bucket, "Key": "others/x"}}),
        ("delete_bucket", {}),
    ):
        assert error_of(getattr(s3, method), {**bucket, **params})[0] == "AccessDenied", (method, params)
    assert error_of(s3.head_bucket, {"Bucket": f"{aws.bucket}-nowhere"})[0] == "404"
    assert error_of(as_dagster("iam").list_roles, {})[0] == "AccessDenied"
    denied = error_of(as_dagster("sagemaker").create_training_job, job(small_account, "others"))
    assert denied[0] == "AccessDeniedException"
    assert aws.keys() == ["others/x", "sales/x.csv"]


def test_a_role_that_sagemaker_may_not_assume_is_refused(
    emulator: SageMakerEmulator, small_account: Account, as_dagster: Callable[[str], Any]
) -> None:
    iam, role = administrator(emulator, "iam"), small_account.jobs_role.rpartition("/")[2]
    another = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    trust = {"Version": "2012-10-17", "Statement": [another]}
    iam.update_assume_role_policy(RoleName=role, PolicyDocument=json.dumps(trust))
    code, message = error_of(as_dagster("sagemaker").create_training_job, job(small_account, "housing-x"))
    assert code == "ValidationException"
    assert message.startswith(f"Could not assume role {small_account.jobs_role}. Please ensure that the role exists")


JOB = """
import os, boto3
from botocore.exceptions import ClientError
s3 = boto3.client("s3", region_name=os.environ["AWS_REGION"])
for key in ("sales/x.csv", "others/x", "housing/in/x"):
    try:
        print(key, s3.get_object(Bucket="BUCKET", Key=key)["Body"].read())
    except ClientError as error:
        print(key, error.response["Error"]["Message"])
open("/opt/ml/model/model", "w").write("x")
"""


def test_a_job_may_do_what_its_role_may(emulator: SageMakerEmulator, aws: Aws, small_account: Account) -> None:
    for key in ("sales/x.csv", "others/x", "housing/in/x"):
        aws.put(key, "content")
    code = aws.put("housing/code/job.py", JOB.replace("BUCKET", aws.bucket))
    image = "123456789012.dkr.ecr.us-east-1.amazonaws.com/housing:1"
    changes: dict[str, Any] = {
        "RoleArn": small_account.jobs_role,
        "AlgorithmSpecification": {"TrainingImage": image},
        "InputDataConfig": [channel("code", code)],
        "OutputDataConfig": {"S3OutputPath": aws.uri("housing/out")},
    }

    def run(name: str) -> tuple[dict[str, Any], list[str]]:
        done = aws.train(name := f"{aws.bucket}-{name}", "", **changes)
        emulator.services.logs.drain()
        return done, aws.logs(name).get("algo-1", [])

    done, lines = run("all")
    assert done["TrainingJobStatus"] == "Completed", done
    assert [line.split()[0] for line in lines if "b'content'" in line] == ["sales/x.csv", "housing/in/x"]
    [refused] = [line for line in lines if line.startswith("others/x")]
    session = f"arn:aws:sts::123456789012:assumed-role/{aws.bucket}-jobs/SageMaker"
    assert f"User: {session} is not authorized to perform: s3:GetObject on resource" in refused

    with without_statement(emulator, small_account.jobs_role, "Objects"):
        done, _ = run("no-objects")
        assert done["TrainingJobStatus"] == "Failed"
        assert done["FailureReason"].startswith("ClientError:")
        assert "Forbidden" in done["FailureReason"] or "AccessDenied" in done["FailureReason"]
    with without_statement(emulator, small_account.jobs_role, "Image"):
        done, _ = run("no-image")
        assert done["FailureReason"].startswith(f"ClientError: Cannot pull image {image}.")
    with without_statement(emulator, small_account.jobs_role, "Logs"):
        done, lines = run("no-logs")
        assert (done["TrainingJobStatus"], lines) == ("Completed", [])


@pytest.mark.slow
def test_a_run_without_a_statement_fails_with_awss_message(emulator: SageMakerEmulator, tmp_path: Path) -> None:
    bucket = "account-of-a-run"
    account = deploy(emulator, bucket, Name="run", CreateLogGroups="false")
    variables = platform_environment(tmp_path, emulator, bucket, hosts=1, account=account)
    platform = Platform(tmp_path, variables)
    with without_statement(emulator, account.dagster_role, "PassTheJobsRole"):
        done = platform.materialize("raw_csv")
    assert done.returncode != 0
    assert (
        "User: arn:aws:sts::123456789012:assumed-role/run-dagster/caller is not authorized to perform: "
        "iam:PassRole on resource: arn:aws:iam::123456789012:role/run-jobs "
        "because no identity-based policy allows the iam:PassRole action"
    ) in " ".join(done.stdout.split())
