"""The shipped CloudFormation template, deployed on the emulated AWS as a team deploys it in its account."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3

if TYPE_CHECKING:
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
    client.create_stack(
        StackName=name, TemplateBody=TEMPLATE.read_text(), Parameters=given, Capabilities=["CAPABILITY_NAMED_IAM"]
    )
    client.get_waiter("stack_create_complete").wait(StackName=name)
    [stack] = client.describe_stacks(StackName=name)["Stacks"]
    outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
    return Account(outputs["Root"], outputs["DagsterRoleArn"], outputs["JobsRoleArn"])


def policy_of(emulator: SageMakerEmulator, role_arn: str) -> dict[str, Any]:
    """The one policy of a role."""
    iam, role = administrator(emulator, "iam"), role_arn.rpartition("/")[2]
    [name] = iam.list_role_policies(RoleName=role)["PolicyNames"]
    document = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
    # Moto keeps what CloudFormation gives it as an object, and answers with Python's text of it.
    return ast.literal_eval(document) if isinstance(document, str) else document


def remove_statement(emulator: SageMakerEmulator, role_arn: str, sid: str) -> None:
    """Take one statement out of a role's policy."""
    iam, role = administrator(emulator, "iam"), role_arn.rpartition("/")[2]
    document = policy_of(emulator, role_arn)
    left = [statement for statement in document["Statement"] if statement["Sid"] != sid]
    assert len(left) == len(document["Statement"]) - 1, sid
    [name] = iam.list_role_policies(RoleName=role)["PolicyNames"]
    changed = {**document, "Statement": left}
    iam.put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=json.dumps(changed))
