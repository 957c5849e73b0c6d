"""The shipped CloudFormation template, deployed on the emulated AWS as a team deploys it in its account."""

from __future__ import annotations

import ast
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3

if TYPE_CHECKING:
    import pytest

    from tests.sagemaker_emulator import SageMakerEmulator

TEMPLATE = Path(__file__).parents[1] / "deploy" / "sagemaker.cfn.yaml"


@dataclass(frozen=True)
class Account:
    """What the template has made."""

    root: str
    dagster_role: str
    jobs_role: str


def administrator(emulator: SageMakerEmulator, service: str, region: str = "us-east-1") -> Any:
    """A client of somebody who may do everything."""
    return boto3.client(
        service, endpoint_url=emulator.endpoint_url, region_name=region,
        aws_access_key_id="testing", aws_secret_access_key="testing",
    )  # fmt: skip


def deploy(emulator: SageMakerEmulator, bucket: str, region: str = "us-east-1", **parameters: str) -> Account:
    """Deploy the template; `parameters` are its parameters."""
    client, name = administrator(emulator, "cloudformation", region), parameters.get("Name", "housing")
    given = [{"ParameterKey": k, "ParameterValue": v} for k, v in {"BucketName": bucket, **parameters}.items()]
    # Moto makes no bucket policies, and says so once by each of the two.
    logger, level = logging.getLogger("moto"), logging.getLogger("moto").level
    with warnings.catch_warnings(action="ignore"):
        logger.setLevel(logging.ERROR)
        try:
            client.create_stack(
                StackName=name,
                TemplateBody=TEMPLATE.read_text(),
                Parameters=given,
                Capabilities=["CAPABILITY_NAMED_IAM"],
            )
        finally:
            logger.setLevel(level)
    client.get_waiter("stack_create_complete").wait(StackName=name)
    [stack] = client.describe_stacks(StackName=name)["Stacks"]
    outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
    return Account(outputs["Root"], outputs["DagsterRoleArn"], outputs["JobsRoleArn"])


def act_as(role_arn: str, emulator: SageMakerEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the credentials of a role."""
    for name, value in emulator.environment(role_arn).items():
        monkeypatch.setenv(name, value)
    # boto3's default session looks for credentials once.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


def policy_of(emulator: SageMakerEmulator, role_arn: str) -> dict[str, Any]:
    """The one policy of a role."""
    iam, role = administrator(emulator, "iam"), role_arn.rpartition("/")[2]
    [name] = iam.list_role_policies(RoleName=role)["PolicyNames"]
    document = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
    # Moto keeps what CloudFormation gives it as an object, and answers with Python's text of it.
    return ast.literal_eval(document) if isinstance(document, str) else document


def remove_roles(emulator: SageMakerEmulator, account: Account) -> None:
    """Remove the roles, whose names other tests of the same emulator may take."""
    iam = administrator(emulator, "iam")
    for role in (arn.rpartition("/")[2] for arn in (account.dagster_role, account.jobs_role)):
        for name in iam.list_role_policies(RoleName=role)["PolicyNames"]:
            iam.delete_role_policy(RoleName=role, PolicyName=name)
        iam.delete_role(RoleName=role)


@contextmanager
def without_statement(emulator: SageMakerEmulator, role_arn: str, sid: str) -> Iterator[None]:
    """Take one statement out of a role's policy for a time."""
    iam, role = administrator(emulator, "iam"), role_arn.rpartition("/")[2]
    [name] = iam.list_role_policies(RoleName=role)["PolicyNames"]
    whole = policy_of(emulator, role_arn)
    left = {**whole, "Statement": [statement for statement in whole["Statement"] if statement["Sid"] != sid]}
    assert len(left["Statement"]) == len(whole["Statement"]) - 1, sid
    try:
        iam.put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=json.dumps(left))
        yield
    finally:
        iam.put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=json.dumps(whole))
